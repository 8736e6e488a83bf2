"""The kernels on TensorFlow's tensors: for sizes unknown in a graph, and differentiable once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from polywhiten._types import Shape
from polywhiten.kernels import Kernels, Term, regularized
from polywhiten.solvers import Solver
from polywhiten.solvers.eigh import Eigh
from polywhiten.tensorflow.namespace import Tensor, xp

_FEW = 4  # matrices, as measured on a CPU


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

    def moments(self, x: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance; of channels-last arrays with sums as products, which use all cores."""
        if not _is_channels_last(x, block_axis):
            return super().moments(x, block_axis)
        count, rows = self.sample_count(x, block_axis, least=1), self._rows(self.for_statistics(x), block_axis)
        mean = _sums(rows) / count
        centred = rows - mean
        lost = _sums(centred) / count
        cov = _product(centred, centred, transpose_a=True) / count - _product(lost, lost, transpose_a=True)
        return (mean + lost)[:, 0], cov

    def affine_map(self, terms: Sequence[Term], bias: Tensor | None, block_axis: int, dtype: tf.DType) -> Tensor:
        """Centres folded into the bias, for no centred copy.

        A mean of 1e4 deviations costs float32 three digits of y here, the plain kernel two.
        """
        x = terms[0].array
        if not _is_channels_last(x, block_axis):
            return super().affine_map(terms, bias, block_axis, dtype)
        offset = -tf.add_n([tf.linalg.matvec(matrix, centre) for matrix, _, centre in terms])
        if bias is not None:
            offset += bias
        result = None
        for matrix, array, _ in terms:
            rows = self._rows(self.for_statistics(array), block_axis)
            if result is None:
                result = _product(rows, matrix, offset, transpose_b=True)
            else:
                result += _product(rows, matrix, transpose_b=True)
        return tf.cast(self._from_rows(result, self.shape(x), block_axis), dtype)

    def cross_moments(self, dy: Tensor, x: Tensor, mean: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        """S and K; of channels-last arrays with sums as products."""
        if not _is_channels_last(x, block_axis):
            return super().cross_moments(dy, x, mean, block_axis)
        dy, x = (self._rows(self.for_statistics(array), block_axis) for array in (dy, x))
        return _sums(dy)[:, 0], _product(dy, x - mean[:, None], transpose_a=True)

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


def _sums(rows: Tensor) -> Tensor:
    """Sums over the samples, (blocks, 1, d)."""
    return _product(tf.ones_like(rows[..., :1]), rows, transpose_a=True)


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None, **transposed: bool) -> Tensor:
    """A B + bias; TensorFlow is faster with a product that is not one of a batch, and adds the bias on its way."""
    if a.shape[0] == 1:
        single = tf.matmul(a[0], b[0], **transposed)
        return (single if bias is None else tf.nn.bias_add(single, bias[0]))[None]
    products = tf.matmul(a, b, **transposed)
    return products if bias is None else products + bias[:, None]


def _one_by_one(solve: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    """A solver's result; few matrices by themselves, as small products in a batch take longer in TensorFlow."""
    if matrices[0].shape.rank == 3 and matrices[0].shape[0] in range(1, _FEW + 1):
        return tf.stack([solve(xp, *each) for each in zip(*map(tf.unstack, matrices), strict=True)])
    return solve(xp, *matrices)


KERNELS = TensorFlowKernels(xp)
