"""What both layers have in common: scale and bias, the arguments of every whitening, and masks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from polywhiten import checks
from polywhiten._types import AllReduce
from polywhiten.feasibility import InfeasibleWarning
from polywhiten.jax import BACKEND, psum
from polywhiten.solvers import Solver, regularized_solver

_psum: Callable[..., Any] = jax.lax.psum  # which JAX has left without types


class WhiteningLayer(nnx.Module):  # type: ignore[misc]  # type checkers skip Flax
    """Base class of both layers.

    Attributes are read in every call, so that `set_attributes` changes what a layer does.
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float,
        dtype: Any,
        param_dtype: Any,
        use_bias: bool,
        use_scale: bool,
        bias_init: Callable[..., Array],
        scale_init: Callable[..., Array],
        axis_name: Any,
        axis_index_groups: Sequence[Sequence[int]] | None,
        promote_dtype: Callable[..., Any],
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any],
        scale_metadata: Mapping[str, Any],
        method: str,
        iterations: int | None,
        relative_epsilon: bool,
    ) -> None:
        self.num_features = checks.check_positive("num_features", num_features)
        self.epsilon = checks.check_eps(epsilon, "epsilon")
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        if axis_index_groups is not None and axis_name is None:
            raise ValueError(f"axis_index_groups={axis_index_groups!r} needs axis_name, the axis that has the indices")
        self.axis_index_groups = axis_index_groups
        self.promote_dtype = promote_dtype
        self.method = method
        self.iterations = iterations
        self.relative_epsilon = relative_epsilon
        self._solver()  # which checks its arguments
        # Flax's layers draw the keys in this order
        self.scale = self._parameter(use_scale, scale_init, rngs, scale_metadata)
        self.bias = self._parameter(use_bias, bias_init, rngs, bias_metadata)

    def _parameter(
        self, wanted: bool, init: Callable[..., Array], rngs: nnx.Rngs, metadata: Mapping[str, Any]
    ) -> nnx.Param | None:
        if not wanted:
            return nnx.data(None)
        return nnx.Param(init(rngs.params(), (self.num_features,), self.param_dtype), **metadata)

    def _solver(self) -> tuple[Solver, float]:
        """Return the solver, and the number to add to the covariance's diagonal before solving."""
        return regularized_solver(self.method, self.iterations, self.epsilon, self.relative_epsilon)

    def _affine(self) -> tuple[Array | None, Array | None]:
        scale, bias = (None if parameter is None else parameter[...] for parameter in (self.scale, self.bias))
        return scale, bias

    def _check_input(self, x: Array, axis: int) -> None:
        checks.check_array(BACKEND.kernels.xp, x)
        if x.shape[axis] != self.num_features:
            raise ValueError(
                f"x has shape {x.shape}, with {x.shape[axis]} channels at axis {axis}: "
                f"num_features={self.num_features} of {type(self).__name__} has to be their number"
            )

    @property
    def _all_reduce(self) -> AllReduce | None:
        return None if self.axis_name is None else psum(self.axis_name, self.axis_index_groups)

    def _joined(self, count: Any) -> Any:
        """Return a number of samples, the same on every device, of the joined batch."""
        if self.axis_name is None:
            return count
        return count * _psum(1, self.axis_name, axis_index_groups=self.axis_index_groups)  # which communicates nothing

    def _take_notice(self, objection: str | None) -> None:
        """Warn where the layer is called of what is infeasible in this call.

        A module doesn't know its network. Compiled functions call it while they are traced, and in others Python shows
        a warning once for every line of code.
        """
        if objection is not None:
            name = type(self).__name__
            warnings.warn(InfeasibleWarning(f"{name}: {objection}", {name: objection}), stacklevel=3)


def kept_positions(mask: Any, x: Array, axis: int) -> Array:
    """Return where a mask is true, in the shape of x with one channel.

    Parameters
    ----------
    mask : array
        Broadcastable to x, with size 1 at the channel axis.
    x : array
    axis : int
        The channel axis, counted from the front.

    Raises
    ------
    ValueError
        The mask has another shape.
    """
    mask = jnp.asarray(mask)
    wanted = tuple(1 if i == axis else size for i, size in enumerate(x.shape))
    shape = (1,) * (x.ndim - mask.ndim) + mask.shape
    if len(shape) != x.ndim or any(size not in (1, full) for size, full in zip(shape, wanted, strict=True)):
        raise ValueError(
            f"mask has shape {mask.shape}: {wanted} or one that broadcasts to it is needed, "
            "as a position counts for all channels or for none"
        )
    return jnp.broadcast_to(mask.reshape(shape).astype(bool), wanted)
