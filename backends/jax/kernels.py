"""The kernels on JAX arrays: in full precision on every device, differentiable twice, and for symbolic sizes."""

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
    """The arrays, each varying over every mesh axis of `shard_map` that one of them varies over.

    A `custom_vjp` needs it: what is replicated and what is sharded get gradients of one kind there, and JAX sums those
    of the replicated over the devices where it made them vary, which is here. Outside `shard_map`, and with
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
    """Products of float32 with all its digits, unless users have chosen otherwise: GPUs and TPUs leave some out.

    Small directions are a difference of large products: what these lack comes out multiplied by the whitener.
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
    """Where a solver works in float64, let JAX have it: without the context it takes float32 instead."""
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
    """W = S^(-1/2) with the solver's own derivative."""
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
    """A solver's adjoint where JAX can't differentiate it by itself.

    That is "eigh", whose derivative by JAX is NaN for equal eigenvalues, and what works in float64 for a while.
    """
    with _with_float64(solver, cov):
        result: Array = solver.adjoint(xp, cov, grad)
    return result


def _adjoint_forward(solver: Solver, cov: Array, grad: Array) -> tuple[Array, tuple[Array, Array]]:
    return _adjoint(solver, cov, grad), (cov, grad)


@full_precision
def _adjoint_backward(solver: Solver, given: tuple[Array, Array], direction: Array) -> tuple[Array, Array]:
    cov, grad = given
    if solver.adjoint_vjp is not None:
        return solver.adjoint_vjp(xp, cov, grad, direction)
    with _with_float64(solver, cov):
        _, pullback = jax.vjp(partial(solver.adjoint, xp), cov, grad)
        gradients: tuple[Array, Array] = pullback(direction)
    return gradients


_adjoint.defvjp(_adjoint_forward, _adjoint_backward)


class JaxKernels(Kernels):
    """The plain kernels, whose every derivative JAX knows, with the solvers' own."""

    reads_any_order = True  # the compiler chooses how arrays lie

    moments = full_precision(Kernels.moments)
    affine_map = full_precision(Kernels.affine_map)
    cross_moments = full_precision(Kernels.cross_moments)

    @full_precision
    def inverse_sqrt(self, solver: Solver, cov: Array, eps: float = 0.0) -> Array:
        """W = (cov + eps I)^(-1/2)."""
        return _inverse_sqrt(solver, regularized(xp, cov, eps))

    @full_precision
    def inverse_sqrt_adjoint(self, solver: Solver, cov: Array, grad: Array, eps: float = 0.0) -> Array:
        """Gradient with respect to cov."""
        cov = regularized(xp, cov, eps)
        if solver.adjoint_vjp is not None or _needs_float64(solver, cov):
            return _adjoint(solver, *varying_alike((cov, grad)))
        result: Array = solver.adjoint(xp, cov, grad)
        return result

    def sample_count(self, x: Array, block_axis: int, least: int = 0) -> Any:
        """As everywhere; of sizes that `jax.export` doesn't know too."""
        count = x.shape[1 - block_axis] * x.shape[3]
        return max(count, least) if isinstance(count, int) else xp.maximum(xp.asarray(count), least)

    def is_wide(self, x: Array) -> bool:
        """As everywhere; yes where `jax.export` doesn't know the image's size, and so can't compare it."""
        return not isinstance(x.shape[3], int) or super().is_wide(x)


KERNELS = JaxKernels(xp)
