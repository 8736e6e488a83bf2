"""The kernels on TensorFlow's tensors: for sizes unknown in a graph, and differentiable once more."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from polywhiten._types import Shape
from polywhiten.kernels import Kernels
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


KERNELS = TensorFlowKernels(xp)
