"""The kernels on TensorFlow's tensors: for sizes unknown in a graph, and differentiable once more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from polywhiten._types import Shape
from polywhiten.kernels import Kernels, Term
from polywhiten.solvers import Solver
from polywhiten.solvers.eigh import Eigh
from polywhiten.tensorflow.namespace import Tensor, xp


class TensorFlowKernels(Kernels):
    """Kernels whose every derivative TensorFlow knows."""

    def shape(self, x: Tensor) -> Shape:
        """Integers, and scalar tensors for what isn't known before the graph runs."""
        known = x.shape.as_list()
        sizes = tf.shape(x) if None in known else known
        return tuple(sizes[i] if size is None else size for i, size in enumerate(known))

    def sample_count(self, x: Tensor, block_axis: int, least: int = 0) -> Any:
        """M, as a scalar of the statistics' dtype where it isn't known yet."""
        count = super().shape(x)[1 - block_axis], super().shape(x)[3]
        if None not in count:
            return super().sample_count(x, block_axis, least)
        shape = self.shape(x)
        unknown = tf.cast(shape[1 - block_axis] * shape[3], self.for_statistics(x[:0]).dtype)
        return tf.maximum(unknown, least)

    def is_wide(self, x: Tensor) -> bool:
        """A size that isn't known is that of a picture."""
        return x.shape[3] is None or super().is_wide(x)

    def moments(self, x: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance; of channels-last arrays group by group as they lie in memory."""
        if not _is_channels_last(x, block_axis):
            return super().moments(x, block_axis)
        count = self.sample_count(x, block_axis, least=1)
        groups = [_centred(rows, count) for rows in self._groups(x)]
        means = [mean for _, mean in groups]
        lost = [_sums(rows) / count for rows, _ in groups]
        covs = [tf.matmul(rows, rows, transpose_a=True) / count for rows, _ in groups]
        mean, lost = tf.concat(means, 0), tf.concat(lost, 0)
        return mean + lost, tf.stack(covs) - lost[..., :, None] * lost[..., None, :]

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
        arrays = [self._groups(array) for _, array, _ in terms]
        results = []
        for group, rows in enumerate(zip(*arrays, strict=True)):
            products = [tf.matmul(r, term.matrix[group], transpose_b=True) for r, term in zip(rows, terms, strict=True)]
            results.append(tf.nn.bias_add(tf.add_n(products), offset[group]))
        return tf.cast(tf.reshape(tf.concat(results, 1), self.shape(x)), dtype)

    def cross_moments(self, dy: Tensor, x: Tensor, mean: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        """S and K; of channels-last arrays group by group as they lie in memory."""
        if not _is_channels_last(x, block_axis):
            return super().cross_moments(dy, x, mean, block_axis)
        groups = list(zip(self._groups(dy), self._groups(x), tf.unstack(mean), strict=True))
        products = [tf.matmul(dy, rows - mean, transpose_a=True) for dy, rows, mean in groups]
        return tf.concat([_sums(dy) for dy, _, _ in groups], 0), tf.stack(products)

    def _groups(self, x: Tensor) -> list[Tensor]:
        """The samples (M, d) of every block of a channels-last array."""
        _, groups, d, _ = x.shape
        rows = tf.reshape(self.for_statistics(x), (-1, groups * d))
        return [rows] if groups == 1 else tf.split(rows, groups, axis=1)

    def inverse_sqrt(self, solver: Solver, cov: Tensor) -> Tensor:
        """W = S^(-1/2), with the solver's own derivative."""

        @tf.custom_gradient
        def run(cov: Tensor) -> Any:
            return solver.inverse_sqrt(xp, tf.stop_gradient(cov)), lambda g: self.inverse_sqrt_adjoint(solver, cov, g)

        return run(cov)

    def inverse_sqrt_adjoint(self, solver: Solver, cov: Tensor, grad: Tensor) -> Tensor:
        """Gradient with respect to S; that of "eigh" with a derivative that equal eigenvalues don't disturb."""
        if not isinstance(solver, Eigh):
            return solver.adjoint(xp, cov, grad)

        @tf.custom_gradient
        def run(cov: Tensor, grad: Tensor) -> Any:
            def derivative(direction: Tensor) -> tuple[Tensor, Tensor]:
                return solver.second(xp, cov, grad, direction), self.inverse_sqrt_adjoint(solver, cov, direction)

            return solver.adjoint(xp, tf.stop_gradient(cov), tf.stop_gradient(grad)), derivative

        return run(cov, grad)


def _is_channels_last(x: Tensor, block_axis: int) -> bool:
    return block_axis == 1 and x.shape[3] == 1


def _sums(rows: Tensor) -> Tensor:
    """Column sums (1, d): a product uses all cores, which TensorFlow's reduction doesn't."""
    return tf.matmul(tf.ones_like(rows[:, :1]), rows, transpose_a=True)


def _centred(rows: Tensor, count: Any) -> tuple[Tensor, Tensor]:
    mean = _sums(rows) / count
    return rows - mean, mean


KERNELS = TensorFlowKernels(xp)
