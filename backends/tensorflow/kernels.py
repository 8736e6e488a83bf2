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

# all as measured on a CPU
_FEW_MATRICES = 4  # are solved one by one
_SMALL = 128  # channels of matrices that are transposed by a product
_FEW_GROUPS, _MANY_SAMPLES = 16, 4096  # of channels-last arrays whose groups are multiplied one by one


class TensorFlowKernels(Kernels):
    """Kernels whose every derivative TensorFlow knows."""

    def shape(self, x: Tensor) -> Shape:
        """Integers, and scalar tensors for what isn't known before the graph runs."""
        known = x.shape.as_list()
        sizes = tf.shape(x) if None in known else known
        return tuple(sizes[i] if size is None else size for i, size in enumerate(known))

    def sample_count(self, x: Tensor, block_axis: int, least: int = 0) -> Any:
        """M, as a scalar of the statistics' dtype where it isn't known yet."""
        shape = self.shape(x)
        count = shape[1 - block_axis] * shape[3]
        if isinstance(count, int):
            return max(count, least)
        return tf.maximum(tf.cast(count, self.accumulation_dtype(x.dtype)), least)

    def is_wide(self, x: Tensor) -> bool:
        """A size that isn't known is that of a picture; transpositions cost more than elsewhere."""
        d, l = x.shape[2:]
        return l is None or bool(l > 1 and 4 * l >= 3 * d)

    def _products(self, a: Tensor, b: Tensor, block_axis: int) -> Tensor:
        """A B' of every block; products of a batch with one axis, as XLA makes slow ones of more."""
        if not self.is_wide(b):
            return super()._products(a, b, block_axis)
        p, q, d, l = self.shape(b)  # of x: a gradient's may be unknown
        a, b = (tf.reshape(each, (p * q, d, l)) for each in (a, b))
        return tf.reduce_sum(tf.reshape(tf.matmul(a, b, transpose_b=True), (p, q, d, d)), 1 - block_axis)

    def _apply(self, matrix: Tensor, x: Tensor, block_axis: int) -> Tensor:
        """A X of every block; likewise in graphs on CPUs, where copies of the matrices are small beside x."""
        p, q, d, l = self.shape(x)
        if not (isinstance(l, int) and 2 * d <= l and _is_for_cpus()):
            return super()._apply(matrix, x, block_axis)
        matrices = tf.broadcast_to(tf.expand_dims(matrix, 1 - block_axis), (p, q, d, d))
        return tf.reshape(tf.reshape(matrices, (p * q, d, d)) @ tf.reshape(x, (p * q, d, l)), (p, q, d, l))

    def moments(self, x: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance; of channels-last arrays with sums as products, which use all cores."""
        if not _is_channels_last(x, block_axis):
            return super().moments(x, block_axis)
        groups, count = _Groups.of(x), self.sample_count(x, block_axis, least=1)
        means, covs = [], []
        for rows in groups.rows(self.to_accumulation_dtype(x)):
            mean = _sums(rows) / count
            centred = rows - mean[..., None, :]
            lost = _sums(centred) / count
            means.append(mean + lost)
            covs.append(tf.matmul(centred, centred, transpose_a=True) / count - outer_square(lost))
        return groups.joined(means), groups.joined(covs)

    def affine_map(
        self,
        terms: Sequence[Term],
        bias: Tensor | None,
        block_axis: int,
        dtype: tf.DType,
        *,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        """Centres folded into the bias, for no centred copy.

        A mean of 1e4 deviations costs float32 three digits of y so, two with centred copies.
        """
        terms = self.scaled(terms, row_scale)
        # not as products: these take ten times as long for a vector
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
            given = zip(groups.rows(self.to_accumulation_dtype(array)), groups.each(matrix), strict=True)
            products = [tf.matmul(rows, own, transpose_b=True) for rows, own in given]
            plus, others = (tf.add, sums) if sums else (_plus_vector, groups.each(offset))
            sums = list(map(plus, products, others))
        return tf.cast(groups.restored(sums), dtype)

    def cross_moments(self, dy: Tensor, x: Tensor, mean: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        """S and K; of channels-last arrays with sums as products."""
        if not _is_channels_last(x, block_axis):
            return super().cross_moments(dy, x, mean, block_axis)
        groups = _Groups.of(x)
        gradients, samples = (groups.rows(self.to_accumulation_dtype(array)) for array in (dy, x))
        given = zip(gradients, samples, groups.each(mean), strict=True)
        products = [tf.matmul(rows, own - centre[..., None, :], transpose_a=True) for rows, own, centre in given]
        return groups.joined(list(map(_sums, gradients))), groups.joined(products)

    def inverse_sqrt(self, solver: Solver, cov: Tensor, eps: float = 0.0) -> Tensor:
        """W = (cov + eps I)^(-1/2), with the solver's own derivative."""

        @tf.custom_gradient
        def run(cov: Tensor) -> Any:
            w = _one_by_one(solver.inverse_sqrt, unrecorded(cov))
            return w, lambda grad: self.inverse_sqrt_adjoint(solver, cov, grad)

        return run(regularized(xp, cov, eps))

    def inverse_sqrt_adjoint(self, solver: Solver, cov: Tensor, grad: Tensor, eps: float = 0.0) -> Tensor:
        """Gradient with respect to cov; that of "eigh" with a derivative that equal eigenvalues don't disturb."""
        cov = regularized(xp, cov, eps)
        adjoint_vjp = solver.adjoint_vjp
        if adjoint_vjp is None:
            return _one_by_one(solver.adjoint, cov, grad)

        @tf.custom_gradient
        def run(cov: Tensor, grad: Tensor) -> Any:
            ds = solver.adjoint(xp, unrecorded(cov), unrecorded(grad))
            return ds, lambda direction: adjoint_vjp(xp, cov, grad, direction)

        return run(cov, grad)


def unrecorded(tensor: Tensor) -> Tensor:
    """An input of an operation with a gradient of its own: what an eager tape doesn't see inside it doesn't keep.

    A graph keeps what its gradient asks for, and `tf.vectorized_map` differentiates the inside of such operations.
    """
    return tf.stop_gradient(tensor) if tf.executing_eagerly() else tensor


def _is_channels_last(x: Tensor, block_axis: int) -> bool:
    return block_axis == 1 and x.shape[3] == 1


@dataclass(frozen=True)
class _Groups:
    """Those of a channels-last array (samples, groups, d, 1): each by itself if `apart`, else all in one batch."""

    number: int
    apart: bool

    @classmethod
    def of(cls, x: Tensor) -> _Groups:
        """Apart where products are large: that is faster than a batch."""
        samples, number, *_ = x.shape
        many = samples is None or samples >= _MANY_SAMPLES
        return cls(number, number == 1 or (number <= _FEW_GROUPS and many and _is_for_cpus()))

    def rows(self, x: Tensor) -> list[Tensor]:
        """(samples, d) of each; or, of the batch, (groups, samples, d)."""
        if self.number == 1:
            return [tf.squeeze(x, (1, 3))]
        samples = tf.squeeze(x, 3)
        return tf.unstack(samples, self.number, axis=1) if self.apart else [tf.transpose(samples, (1, 0, 2))]

    def restored(self, rows: list[Tensor]) -> Tensor:
        """The array of its rows."""
        return (tf.stack(rows, 1) if self.apart else tf.transpose(rows[0], (1, 0, 2)))[..., None]

    def each(self, statistics: Tensor) -> list[Tensor]:
        """Statistics (groups, ...) of each, or of the batch."""
        return tf.unstack(statistics, self.number) if self.apart else [statistics]

    def joined(self, statistics: list[Tensor]) -> Tensor:
        """Statistics (groups, ...)."""
        return tf.stack(statistics) if self.apart else statistics[0]


def _sums(rows: Tensor) -> Tensor:
    """Sums over the samples, (..., d)."""
    return tf.squeeze(tf.matmul(tf.ones_like(rows[..., :1]), rows, transpose_a=True), -2)


def _plus_vector(product: Tensor, vector: Tensor) -> Tensor:
    """A vector (..., d) added to rows; TensorFlow does it on the product's way, where that is none of a batch."""
    return tf.nn.bias_add(product, vector) if product.shape.rank == 2 else product + vector[:, None]


def _one_by_one(solve: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    """A solver's result; few matrices by themselves, as small products in a batch take longer in TensorFlow."""
    shape, for_cpus = matrices[0].shape, _is_for_cpus()
    number = shape[0] if shape.rank == 3 else None
    if number != 1 and not (for_cpus and number in range(2, _FEW_MATRICES + 1)):
        return solve(xp, *matrices)
    own = small_xp if for_cpus and shape[-1] in range(1, _SMALL + 1) else xp
    each = zip(*(tf.unstack(given, number) for given in matrices), strict=True)
    return tf.stack([solve(own, *given) for given in each])


def _is_for_cpus() -> bool:
    """Whether this is a graph that will run on CPUs; elsewhere each operation costs more than a small product."""
    return not tf.executing_eagerly() and {each.device_type for each in tf.config.get_visible_devices()} == {"CPU"}


KERNELS = TensorFlowKernels(xp)
