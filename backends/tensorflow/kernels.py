"""The kernels on TensorFlow's tensors: for sizes unknown in a graph, and differentiable once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import tensorflow as tf

from polywhiten._types import Shape
from polywhiten.kernels import Kernels, Term, along, outer_square, regularized
from polywhiten.solvers import Solver
from polywhiten.solvers.eigh import Eigh
from polywhiten.tensorflow.namespace import Tensor, small_xp, xp

# as measured on a CPU: matrices that are solved one by one, and groups whose rows are multiplied one by one where
# these are many; the largest of the matrices
_FEW, _FEW_GROUPS, _MANY, _SMALL = 4, 16, 4096, 128


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
        return tf.maximum(tf.cast(count, self.statistics_dtype(x.dtype)), least)

    def is_wide(self, x: Tensor) -> bool:
        """A size that isn't known is that of a picture; transpositions cost more than elsewhere."""
        d, l = x.shape[2:]
        return l is None or bool(l > 1 and 4 * l >= 3 * d)

    def _products(self, a: Tensor, b: Tensor, block_axis: int) -> Tensor:
        """A B' of every block; products of a batch with one axis, as XLA makes slow ones of more."""
        if not self.is_wide(a):
            return super()._products(a, b, block_axis)
        p, q, d, l = self.shape(a)
        a, b = (tf.reshape(each, (p * q, d, l)) for each in (a, b))
        return tf.reduce_sum(tf.reshape(tf.matmul(a, b, transpose_b=True), (p, q, d, d)), 1 - block_axis)

    def _apply(self, matrix: Tensor, x: Tensor, block_axis: int) -> Tensor:
        """A X of every block; likewise, where copies of the matrices are not more than x."""
        p, q, d, l = self.shape(x)
        if not self.is_wide(x) or not isinstance(l, int) or d > l:
            return super()._apply(matrix, x, block_axis)
        matrices = tf.broadcast_to(tf.expand_dims(matrix, 1 - block_axis), (p, q, d, d))
        return tf.reshape(tf.reshape(matrices, (p * q, d, d)) @ tf.reshape(x, (p * q, d, l)), (p, q, d, l))

    def moments(self, x: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance; of channels-last arrays with sums as products, which use all cores."""
        if not _is_channels_last(x, block_axis):
            return super().moments(x, block_axis)
        count = self.sample_count(x, block_axis, least=1)
        means, covs = [], []
        for rows in _rows(self.for_statistics(x)):
            mean = _sums(rows) / count
            centred = rows - mean[..., None, :]
            lost = _sums(centred) / count
            means.append(mean + lost)
            covs.append(tf.matmul(centred, centred, transpose_a=True) / count - outer_square(lost))
        return _joined(means, x), _joined(covs, x)

    def affine_map(self, terms: Sequence[Term], bias: Tensor | None, block_axis: int, dtype: tf.DType) -> Tensor:
        """Centres folded into the bias, for no centred copy.

        A mean of 1e4 deviations costs float32 three digits of y here, the plain kernel two.
        """
        # not as products: these take ten times as long for a vector
        offset = -tf.add_n([tf.reduce_sum(matrix * centre[:, None], -1) for matrix, _, centre in terms])
        if bias is not None:
            offset += bias
        x = terms[0].array
        if not _is_channels_last(x, block_axis):
            result = along(offset, block_axis)
            for matrix, array, _ in terms:
                result = self._apply(matrix, self.for_statistics(array), block_axis) + result
            return tf.cast(result, dtype)
        results = None
        for matrix, array, _ in terms:
            given = zip(_rows(self.for_statistics(array)), _by_group(matrix, x), strict=True)
            products = [tf.matmul(rows, own, transpose_b=True) for rows, own in given]
            if results is None:
                results = list(map(_plus_vector, products, _by_group(offset, x)))
            else:
                results = list(map(tf.add, results, products))
        return tf.cast(_from_rows(results, x), dtype)

    def cross_moments(self, dy: Tensor, x: Tensor, mean: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        """S and K; of channels-last arrays with sums as products."""
        if not _is_channels_last(x, block_axis):
            return super().cross_moments(dy, x, mean, block_axis)
        gradients, samples = (_rows(self.for_statistics(array)) for array in (dy, x))
        given = zip(gradients, samples, _by_group(mean, x), strict=True)
        products = [tf.matmul(rows, own - centre[..., None, :], transpose_a=True) for rows, own, centre in given]
        return _joined(list(map(_sums, gradients)), x), _joined(products, x)

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
        if not isinstance(solver, Eigh):
            return _one_by_one(solver.adjoint, cov, grad)

        @tf.custom_gradient
        def run(cov: Tensor, grad: Tensor) -> Any:
            def derivative(direction: Tensor) -> tuple[Tensor, Tensor]:
                return solver.second(xp, cov, grad, direction), self.inverse_sqrt_adjoint(solver, cov, direction)

            return solver.adjoint(xp, unrecorded(cov), unrecorded(grad)), derivative

        return run(cov, grad)


def unrecorded(tensor: Tensor) -> Tensor:
    """An input of an operation with a gradient of its own: what an eager tape doesn't see inside it doesn't keep.

    A graph keeps what its gradient asks for, and `tf.vectorized_map` differentiates the inside of such operations.
    """
    return tf.stop_gradient(tensor) if tf.executing_eagerly() else tensor


def _is_channels_last(x: Tensor, block_axis: int) -> bool:
    return block_axis == 1 and x.shape[3] == 1


def _by_themselves(x: Tensor) -> bool:
    """Whether a channels-last array's groups are whitened one by one: large products are faster than in a batch."""
    samples, groups, *_ = x.shape
    return groups == 1 or (groups <= _FEW_GROUPS and (samples is None or samples >= _MANY) and _is_for_cpus())


def _is_for_cpus() -> bool:
    """Whether this is about a graph that will run on CPUs; elsewhere each operation costs more than a small product."""
    return not tf.executing_eagerly() and _has_only_cpus()


@cache
def _has_only_cpus() -> bool:
    return {device.device_type for device in tf.config.list_physical_devices()} == {"CPU"}


def _rows(x: Tensor) -> list[Tensor]:
    """A channels-last array as (samples, d) for each of few groups, else as one array (groups, samples, d)."""
    samples = tf.squeeze(x, 3)
    if x.shape[1] == 1:
        return [tf.squeeze(samples, 1)]
    return list(tf.unstack(samples, axis=1)) if _by_themselves(x) else [tf.transpose(samples, (1, 0, 2))]


def _from_rows(rows: list[Tensor], x: Tensor) -> Tensor:
    """As x again."""
    return (tf.stack(rows, 1) if _by_themselves(x) else tf.transpose(rows[0], (1, 0, 2)))[..., None]


def _by_group(statistics: Tensor, x: Tensor) -> list[Tensor]:
    """Statistics of the groups, as there are rows."""
    return list(tf.unstack(statistics)) if _by_themselves(x) else [statistics]


def _joined(statistics: list[Tensor], x: Tensor) -> Tensor:
    """Of all groups."""
    return tf.stack(statistics) if _by_themselves(x) else statistics[0]


def _sums(rows: Tensor) -> Tensor:
    """Sums over the samples, (..., d)."""
    return tf.squeeze(tf.matmul(tf.ones_like(rows[..., :1]), rows, transpose_a=True), -2)


def _plus_vector(rows: Tensor, vector: Tensor) -> Tensor:
    """On a product's way, where it is none of a batch."""
    return tf.nn.bias_add(rows, vector) if rows.shape.rank == 2 else rows + vector[:, None]


def _one_by_one(solve: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    """A solver's result; few matrices by themselves, as small products in a batch take longer in TensorFlow."""
    number, _, d = matrices[0].shape if matrices[0].shape.rank == 3 else (None,) * 3
    if number != 1 and not (number in range(2, _FEW + 1) and _is_for_cpus()):
        return solve(xp, *matrices)
    own = small_xp if d in range(1, _SMALL + 1) and _has_only_cpus() else xp
    return tf.stack([solve(own, *each) for each in zip(*map(tf.unstack, matrices), strict=True)])


KERNELS = TensorFlowKernels(xp)
