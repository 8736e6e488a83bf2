"""The kernels on TensorFlow's tensors: for sizes unknown in a graph, and differentiable once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from polywhiten._types import Shape
from polywhiten.kernels import Kernels, Term, along, outer_square, regularized
from polywhiten.solvers import Solver
from polywhiten.tensorflow.namespace import Tensor, small_xp, xp

# Each as measured on a CPU.
MAX_SINGLE_MATRICES = 4  # as many matrices are solved one by one rather than in a batch
MAX_TRANSPOSED_BY_PRODUCT = 128  # channels up to which a product with the identity is the faster transposition
MAX_SINGLE_GROUPS, MIN_SAMPLES = 16, 4096  # channels-last arrays whose groups are multiplied one by one


class TensorFlowKernels(Kernels):
    """Kernels that TensorFlow can differentiate once more."""

    def shape(self, x: Tensor) -> Shape:
        """Return the sizes of x: integers, and scalar tensors for those that only the running graph knows."""
        known = x.shape.as_list()
        sizes = tf.shape(x) if None in known else known
        return tuple(sizes[i] if size is None else size for i, size in enumerate(known))

    def sample_count(self, x: Tensor, block_axis: int, least: int = 0) -> Any:
        """Return M, as a scalar of the accumulation dtype if only the running graph knows it."""
        shape = self.shape(x)
        count = shape[1 - block_axis] * shape[3]
        if isinstance(count, int):
            return max(count, least)
        return tf.maximum(tf.cast(count, self.accumulation_dtype(x.dtype)), least)

    def is_wide(self, x: Tensor) -> bool:
        """Take an unknown size for that of a picture; transpositions cost more in TensorFlow than elsewhere."""
        d, l = x.shape[2:]
        return l is None or bool(l > 1 and 4 * l >= 3 * d)

    def _products(self, a: Tensor, b: Tensor, block_axis: int) -> Tensor:
        """Return A B' of every block, by products with one batch axis: XLA is slow with more of them."""
        if _is_channels_last(b, block_axis):
            groups = _Groups.of(b)
            pairs = zip(groups.rows(a), groups.rows(b), strict=True)
            return groups.joined([tf.matmul(left, right, transpose_a=True) for left, right in pairs])
        if not self.is_wide(b):
            return super()._products(a, b, block_axis)
        p, q, d, l = self.shape(b)  # of x: a gradient's may be unknown
        a, b = (tf.reshape(each, (p * q, d, l)) for each in (a, b))
        return tf.reduce_sum(tf.reshape(tf.matmul(a, b, transpose_b=True), (p, q, d, d)), 1 - block_axis)

    def _apply(self, matrix: Tensor, x: Tensor, block_axis: int) -> Tensor:
        """Return A X of every block, in graphs on CPUs with one batch axis if the matrices are small beside x."""
        p, q, d, l = self.shape(x)
        if not (isinstance(l, int) and 2 * d <= l and is_for_cpus()):
            return super()._apply(matrix, x, block_axis)
        matrices = tf.broadcast_to(tf.expand_dims(matrix, 1 - block_axis), (p, q, d, d))
        return tf.reshape(tf.reshape(matrices, (p * q, d, d)) @ tf.reshape(x, (p * q, d, l)), (p, q, d, l))

    def _sums(self, x: Tensor, block_axis: int) -> Tensor:
        """Return the sums of the samples; those of channels-last arrays by a product, which uses all cores."""
        if not _is_channels_last(x, block_axis):
            return super()._sums(x, block_axis)
        p, q, d, _ = self.shape(x)
        return tf.reshape(sums_of_rows(tf.reshape(x, (p, q * d))), (q, d))

    def affine_map(
        self,
        terms: Sequence[Term],
        bias: Tensor | None,
        block_axis: int,
        dtype: tf.DType,
        *,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        """Return the sum of the terms, whose centres are part of the bias: no centred copy is made.

        With a mean of 1e4 standard deviations, y loses three digits of float32 this way, two with centred copies.
        """
        terms = self.scaled(terms, row_scale)
        # sums, as products with a vector take ten times as long
        offset = -tf.add_n([tf.reduce_sum(matrix * centre[:, None], -1) for matrix, _, centre in terms])
        if bias is not None:
            offset += bias
        x = terms[-1].array  # of two, that which is no gradient, whose sizes may be unknown
        if not _is_channels_last(x, block_axis):
            result = along(offset, block_axis)
            for matrix, array, _ in terms:
                result = self._apply(matrix, self.to_accumulation_dtype(array), block_axis) + result
            return tf.cast(result, dtype)
        groups = _Groups.of(x)
        sums: list[Tensor] = []
        for matrix, array, _ in terms:
            pairs = zip(groups.rows(self.to_accumulation_dtype(array)), groups.each(matrix), strict=True)
            products = [tf.matmul(rows, weights, transpose_b=True) for rows, weights in pairs]
            plus, others = (tf.add, sums) if sums else (_plus_vector, groups.each(offset))
            sums = list(map(plus, products, others))
        return tf.cast(groups.restored(sums), dtype)

    def inverse_sqrt(self, solver: Solver, cov: Tensor, eps: float = 0.0) -> Tensor:
        """Return W = (cov + eps I)^(-1/2), whose gradient is the solver's adjoint."""

        @tf.custom_gradient
        def run(cov: Tensor) -> Any:
            w = _one_by_one(solver.inverse_sqrt, unrecorded(cov))
            return w, lambda grad: self.inverse_sqrt_adjoint(solver, cov, grad)

        return run(regularized(xp, cov, eps))

    def inverse_sqrt_adjoint(self, solver: Solver, cov: Tensor, grad: Tensor, eps: float = 0.0) -> Tensor:
        """Return the gradient with respect to cov; that of "eigh" can be differentiated at equal eigenvalues too."""
        cov = regularized(xp, cov, eps)
        adjoint_vjp = solver.adjoint_vjp
        if adjoint_vjp is None:
            return _one_by_one(solver.adjoint, cov, grad)

        @tf.custom_gradient
        def run(cov: Tensor, grad: Tensor) -> Any:
            ds = solver.adjoint(xp, unrecorded(cov), unrecorded(grad))
            return ds, lambda direction: adjoint_vjp(xp, cov, grad, direction)

        return run(cov, grad)


@dataclass(frozen=True)
class NearZeroKernels(TensorFlowKernels):
    """Kernels for arrays whose means are no more than a few standard deviations: they make no centred copy."""

    def mean(self, x: Tensor, block_axis: int) -> Tensor:
        return self._sums(x, block_axis) / self.sample_count(x, block_axis, least=1)

    def moments(self, x: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        x, count = self.to_accumulation_dtype(x), self.sample_count(x, block_axis, least=1)
        mean = self.mean(x, block_axis)
        return mean, self._products(x, x, block_axis) / count - outer_square(mean)

    def cross_moments(self, dy: Tensor, x: Tensor, mean: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        dy, x = self.to_accumulation_dtype(dy), self.to_accumulation_dtype(x)
        s, products = self._sums(dy, block_axis), self._products(dy, x, block_axis)
        k = products - s[..., :, None] * mean[..., None, :]
        k.set_shape(products.shape)  # which s doesn't know if dy has unknown channels
        return s, k


def unrecorded(tensor: Tensor) -> Tensor:
    """Return an input of an operation with a custom gradient so that an eager tape keeps nothing from inside it.

    In graphs it is returned as it is: they keep only what the gradient needs, and `tf.vectorized_map` differentiates
    the inside of such operations.
    """
    return tf.stop_gradient(tensor) if tf.executing_eagerly() else tensor


def _is_channels_last(x: Tensor, block_axis: int) -> bool:
    return block_axis == 1 and x.shape[3] == 1


@dataclass(frozen=True)
class _Groups:
    """The groups of a channels-last array (samples, groups, d, 1): a product for each if `apart`, else one for all."""

    number: int
    apart: bool

    @classmethod
    def of(cls, x: Tensor) -> _Groups:
        """Keep groups apart if products are large, which is faster than a batch of them."""
        samples, number, *_ = x.shape
        many = samples is None or samples >= MIN_SAMPLES
        return cls(number, number == 1 or (number <= MAX_SINGLE_GROUPS and many and is_for_cpus()))

    def rows(self, x: Tensor) -> list[Tensor]:
        """Return (samples, d) for each group, or (groups, samples, d) for the batch."""
        if self.number == 1:
            return [tf.squeeze(x, (1, 3))]
        samples = tf.squeeze(x, 3)
        return tf.unstack(samples, self.number, axis=1) if self.apart else [tf.transpose(samples, (1, 0, 2))]

    def restored(self, rows: list[Tensor]) -> Tensor:
        """Return the array that `rows` was made of."""
        return (tf.stack(rows, 1) if self.apart else tf.transpose(rows[0], (1, 0, 2)))[..., None]

    def each(self, statistics: Tensor) -> list[Tensor]:
        """Return statistics (groups, ...) of each group, or of the batch."""
        return tf.unstack(statistics, self.number) if self.apart else [statistics]

    def joined(self, statistics: list[Tensor]) -> Tensor:
        """Return statistics as one tensor (groups, ...)."""
        return tf.stack(statistics) if self.apart else statistics[0]


def sums_of_rows(rows: Tensor) -> Tensor:
    """Return sums over the samples, (..., d)."""
    return tf.squeeze(tf.matmul(tf.ones_like(rows[..., :1]), rows, transpose_a=True), -2)


def _plus_vector(product: Tensor, vector: Tensor) -> Tensor:
    """Add a vector (..., d) to rows; TensorFlow fuses that into a product that is none of a batch."""
    return tf.nn.bias_add(product, vector) if product.shape.rank == 2 else product + vector[:, None]


def _one_by_one(solve: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    """Return a solver's result, for few matrices one by one: small products in a batch take longer in TensorFlow."""
    shape, for_cpus = matrices[0].shape, is_for_cpus()
    number = shape[0] if shape.rank == 3 else None
    if number != 1 and not (for_cpus and number in range(2, MAX_SINGLE_MATRICES + 1)):
        return solve(xp, *matrices)
    namespace = small_xp if for_cpus and shape[-1] in range(1, MAX_TRANSPOSED_BY_PRODUCT + 1) else xp
    each = zip(*(tf.unstack(batch, number) for batch in matrices), strict=True)
    return tf.stack([solve(namespace, *single) for single in each])


def is_for_cpus() -> bool:
    """Return whether this is a graph for CPUs; elsewhere the launch of an operation costs more than a small product."""
    return not tf.executing_eagerly() and {each.device_type for each in tf.config.get_visible_devices()} == {"CPU"}


KERNELS = TensorFlowKernels(xp)
