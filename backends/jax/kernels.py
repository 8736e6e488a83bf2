"""The kernels on JAX's arrays: in full precision on every device, differentiable twice, and for symbolic sizes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as xp
from jax import Array

from polywhiten.kernels import Kernels, regularized
from polywhiten.solvers import Solver

P = ParamSpec("P")
R = TypeVar("R")
Tree = TypeVar("Tree")


def varying_alike(tree: Tree) -> Tree:
    """Return the arrays, each varying over every mesh axis of `shard_map` that one of them varies over.

    A `custom_vjp` needs that, as its backward returns gradients that all vary alike. JAX sums those of replicated
    arrays over the devices at the place where it made the arrays vary, which is here. Outside `shard_map`, and with
    `check_vma=False`, nothing varies.
    """
    lax: Any = jax.lax  # JAX has renamed the function in it, and the attribute of `_varying_axes`
    axes: frozenset[Any] = frozenset().union(*map(_varying_axes, jax.tree.leaves(tree)))

    def vary(x: Array) -> Array:
        missing = tuple(sorted(axes - _varying_axes(x), key=str))
        if not missing:
            return x
        result: Array = lax.pcast(x, missing, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, missing)
        return result

    result: Tree = jax.tree.map(vary, tree)
    return result


def _varying_axes(x: Array) -> frozenset[Any]:
    kind: Any = jax.typeof(x)
    axes = kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else getattr(kind, "vma", ())
    return frozenset(axes)


def full_precision(kernel: Callable[P, R]) -> Callable[P, R]:
    """Compute products of float32 in full precision, unless users have chosen otherwise.

    By default GPUs and TPUs round the factors. Small directions are differences of large products, and whitening
    multiplies their rounding errors by the whitener.
    """

    @wraps(kernel)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        config: Any = jax.config
        if config.jax_default_matmul_precision is not None:
            return kernel(*args, **kwargs)
        with jax.default_matmul_precision("highest"):
            return kernel(*args, **kwargs)

    return run


def _with_float64(solver: Solver, cov: Array) -> AbstractContextManager[object]:
    """Return a context that allows float64 if the solver works in it; otherwise JAX would use float32 silently."""
    if not _needs_float64(solver, cov):
        return nullcontext()
    home: Any = jax if hasattr(jax, "enable_x64") else import_module("jax.experimental")  # before 0.8
    context: AbstractContextManager[object] = home.enable_x64(True)
    return context


def _needs_float64(solver: Solver, cov: Array) -> bool:
    info: Any = jax.numpy.finfo  # which JAX has left without types
    return solver.needs_float64(float(info(cov.dtype).eps))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _inverse_sqrt(solver: Solver, cov: Array) -> Array:
    """Return W = S^(-1/2), whose gradient is the solver's adjoint."""
    with _with_float64(solver, cov):
        result: Array = solver.inverse_sqrt(xp, cov)
    return result


def _inverse_sqrt_forward(solver: Solver, cov: Array) -> tuple[Array, Array]:
    return _inverse_sqrt(solver, cov), cov


def _inverse_sqrt_backward(solver: Solver, cov: Array, grad: Array) -> tuple[Array]:
    return (KERNELS.inverse_sqrt_adjoint(solver, cov, grad),)


_inverse_sqrt.defvjp(_inverse_sqrt_forward, _inverse_sqrt_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adjoint(solver: Solver, cov: Array, grad: Array) -> Array:
    """Return the adjoint of a solver that JAX can't differentiate by itself.

    JAX's derivative of "eigh" is NaN for equal eigenvalues, and it can't follow a solver that changes to float64.
    """
    with _with_float64(solver, cov):
        result: Array = solver.adjoint(xp, cov, grad)
    return result


def _adjoint_forward(solver: Solver, cov: Array, grad: Array) -> tuple[Array, tuple[Array, Array]]:
    return _adjoint(solver, cov, grad), (cov, grad)


@full_precision
def _adjoint_backward(solver: Solver, residuals: tuple[Array, Array], direction: Array) -> tuple[Array, Array]:
    cov, grad = residuals
    if solver.adjoint_vjp is not None:
        return solver.adjoint_vjp(xp, cov, grad, direction)
    with _with_float64(solver, cov):
        _, pullback = jax.vjp(partial(solver.adjoint, xp), cov, grad)
        gradients: tuple[Array, Array] = pullback(direction)
    return gradients


_adjoint.defvjp(_adjoint_forward, _adjoint_backward)


class JaxKernels(Kernels):
    """The plain kernels, with the solvers' own derivatives; JAX differentiates everything else."""

    reads_any_order = True  # the compiler chooses how arrays lie

    moments = full_precision(Kernels.moments)
    affine_map = full_precision(Kernels.affine_map)
    cross_moments = full_precision(Kernels.cross_moments)

    @full_precision
    def inverse_sqrt(self, solver: Solver, cov: Array, eps: float = 0.0) -> Array:
        """Return W = (cov + eps I)^(-1/2)."""
        return _inverse_sqrt(solver, regularized(xp, cov, eps))

    @full_precision
    def inverse_sqrt_adjoint(self, solver: Solver, cov: Array, grad: Array, eps: float = 0.0) -> Array:
        """Return the gradient with respect to cov."""
        cov = regularized(xp, cov, eps)
        if solver.adjoint_vjp is not None or _needs_float64(solver, cov):
            return _adjoint(solver, *varying_alike((cov, grad)))
        result: Array = solver.adjoint(xp, cov, grad)
        return result

    def sample_count(self, x: Array, block_axis: int, least: int = 0) -> Any:
        """Return M, also for symbolic sizes of `jax.export`."""
        count = x.shape[1 - block_axis] * x.shape[3]
        return max(count, least) if isinstance(count, int) else xp.maximum(xp.asarray(count), least)

    def is_wide(self, x: Array) -> bool:
        """Return whether one product for each of (p, q) is efficient; True for symbolic sizes."""
        return not isinstance(x.shape[3], int) or super().is_wide(x)


KERNELS = JaxKernels(xp)
