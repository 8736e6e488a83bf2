"""The five kernels in Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polywhiten.kernels import Term
from polywhiten.solvers import Solver
from polywhiten.torch.kernels import TorchKernels, on_device_of
from polywhiten.torch.triton.affine_map import affine_map
from polywhiten.torch.triton.combine_cross_moments import combine_cross_moments
from polywhiten.torch.triton.combine_moments import combine_moments
from polywhiten.torch.triton.inverse_sqrt import inverse_sqrt
from polywhiten.torch.triton.inverse_sqrt_adjoint import inverse_sqrt_adjoint
from polywhiten.torch.triton.partial_cross_moments import partial_cross_moments
from polywhiten.torch.triton.partial_moments import partial_moments


class TritonKernels(TorchKernels):
    """One or two launches for each kernel, for tensors that `SeparateImplementation.supports`.

    Solvers that a compiled kernel can't replace use PyTorch's own operations.
    """

    def moments(self, x: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        """Return mean and covariance from one pass over x."""
        with on_device_of(x):
            return combine_moments(partial_moments(x, block_axis), self.sample_count(x, block_axis))

    def cross_moments(self, dy: Tensor, x: Tensor, mean: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        """Return s and K from one pass over dy and x."""
        with on_device_of(x):
            partial = partial_cross_moments(dy, x, mean, block_axis)
            moments = combine_cross_moments(*partial, self.sample_count(x, block_axis))
            return moments.s, moments.k

    def affine_map(
        self,
        terms: Sequence[Term],
        bias: Tensor | None,
        block_axis: int,
        dtype: torch.dtype,
        *,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        """Return the sum of one or two terms from one pass, which subtracts the centres in registers."""
        with on_device_of(terms[0].array):
            return affine_map(terms, bias, block_axis, dtype, row_scale)

    def inverse_sqrt(self, solver: Solver, cov: Tensor, eps: float = 0.0) -> Tensor:
        """Return W, with all of Newton's steps in one launch."""
        steps = solver.newton_steps(cov.element_size())
        if steps is None:
            return super().inverse_sqrt(solver, cov, eps)
        with on_device_of(cov):
            return inverse_sqrt(cov, eps, steps)

    def inverse_sqrt_adjoint(self, solver: Solver, cov: Tensor, grad: Tensor, eps: float = 0.0) -> Tensor:
        """Return the gradient with respect to cov, with all of Newton's steps in one launch."""
        steps = solver.newton_steps(cov.element_size())
        if steps is None:
            return super().inverse_sqrt_adjoint(solver, cov, grad, eps)
        with on_device_of(cov):
            return inverse_sqrt_adjoint(cov, grad, eps, steps)
