"""GroupWhitening, in place of `nnx.GroupNorm`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from jax import Array

from polywhiten import checks
from polywhiten._types import Shape
from polywhiten.blocks import ChannelGroups, SampleGroups
from polywhiten.feasibility import sample_objection
from polywhiten.flax.whitening_layer import WhiteningLayer, kept_positions
from polywhiten.jax import BACKEND
from polywhiten.layer_entry import whiten_masked, whiten_nothing
from polywhiten.spec import WhiteningSpec


class GroupWhitening(WhiteningLayer):
    """Group whitening: whitens groups of channels against each other, within every sample.

    This layer replaces `nnx.GroupNorm` and takes the same arguments, except `use_fast_variance`. The channels of a
    sample, at the last axis, are cut into groups, whose covariance (groups, groups) is taken over all positions and
    over the channels of a group. Training and evaluation are the same::

        y = scale * (cov + epsilon * I)^(-1/2) @ (x - mean) + bias

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    num_groups : int or None
        The number of groups, which has to divide the number of channels.
    group_size : int, optional
        Channels a group, in place of `num_groups`, which has to be None then.
    epsilon : float
        Added to the diagonal of the covariance; 1e-5, as in the papers, and not Flax's 1e-6.
    dtype : dtype, optional
        That of the output; None is what `promote_dtype` finds for input, scale and bias.
    param_dtype : dtype
        That of scale and bias.
    use_bias, use_scale : bool
        Whether to learn an offset and a factor for every channel after whitening.
    bias_init, scale_init : callable
        Initializers of bias and scale.
    reduction_axes : int or sequence of int, optional
        The axes that make up one sample, the last one among them; None is all but the first. All others count samples.
    axis_name : hashable or tuple of hashables, optional
        Names of mapped axes of `nnx.vmap`, `nnx.pmap`, `jax.shard_map` and so on over which the positions of every
        sample are spread.
    axis_index_groups : sequence of sequences of int, optional
        Indices along `axis_name` that share samples, in groups of equal size; None for all of them.
    promote_dtype : callable
        Maps a tuple `(x, scale, bias)` to one with the dtype `dtype=`.
    rngs : nnx.Rngs
        Gives the keys of the initializers.
    bias_metadata, scale_metadata : mapping
        Metadata of the two variables.
    method : {"newton", "eigh", "minimax"}
        "newton" is the papers' iteration, which whitens small directions in part; "eigh" is exact; "minimax" is exact
        up to 1e-4 in few steps.
    iterations : int, optional
        Steps of "newton" and "minimax", 5 by default; "eigh" has none.
    relative_epsilon : bool
        Whether epsilon is a fraction of the mean variance of the groups of a sample, for inputs whose variances are far
        from 1.

    Attributes
    ----------
    scale, bias : nnx.Param or None, shape (C,)

    Raises
    ------
    TypeError, ValueError
        An argument or an input doesn't fit, or a group has one value a sample, which has no covariance.

    Warns
    -----
    polywhiten.analysis.InfeasibleWarning
        If samples without a mask have fewer values than whitening so many groups needs. In compiled functions it is
        issued when they are traced.

    Notes
    -----
    A batch of no samples is returned empty. Statistics are computed in float32 for half precision.

    References
    ----------
    Huang et al., Group Whitening, CVPR 2021, arXiv:2009.13333.

    Examples
    --------
    >>> import jax
    >>> from flax import nnx
    >>> from polywhiten.flax import GroupWhitening
    >>> layer = GroupWhitening(16, num_groups=8, rngs=nnx.Rngs(0))
    >>> layer(jax.random.normal(jax.random.key(0), (4, 5, 5, 16))).shape
    (4, 5, 5, 16)
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Callable[..., Array] = nnx.initializers.zeros,
        scale_init: Callable[..., Array] = nnx.initializers.ones,
        reduction_axes: int | Sequence[int] | None = None,
        axis_name: Any = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        promote_dtype: Callable[..., Any] = flax_promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        method: str = "newton",
        iterations: int | None = None,
        relative_epsilon: bool = False,
    ) -> None:
        super().__init__(
            num_features,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
            method=method,
            iterations=iterations,
            relative_epsilon=relative_epsilon,
        )
        self.num_groups = _number_of_groups(self.num_features, num_groups, group_size)
        self.group_size = self.num_features // self.num_groups
        if reduction_axes is not None:
            axes = (reduction_axes,) if isinstance(reduction_axes, int) else reduction_axes
            reduction_axes = tuple(checks.check_integer("reduction_axes", axis) for axis in axes)
        self.reduction_axes = reduction_axes

    def __call__(self, x: Any, *, mask: Any = None) -> Array:
        """Whiten every sample.

        Parameters
        ----------
        x : array, shape (N, ..., C)
        mask : array of bool, optional
            Positions to count in the statistics, which leave out the others. Its shape broadcasts to that of x, and has
            size 1 at the last axis.

        Returns
        -------
        array, of the shape of x
        """
        x, scale, bias = self.promote_dtype((x, *self._affine()), dtype=self.dtype)
        batch_axes = self._batch_axes(x)
        self._check_input(x, x.ndim - 1)
        keep = None if mask is None else _as_samples(kept_positions(mask, x, x.ndim - 1), batch_axes)
        samples = _as_samples(x, batch_axes)
        y: Array
        if 0 in x.shape:
            y = whiten_nothing(BACKEND, x, scale, bias, x.ndim - 1)
            return y
        positions = samples.shape[1:-1]
        count = self._joined(math.prod(positions))
        checks.check_sample_count([count, self.group_size], x.shape, "values a group", "use fewer groups")
        if keep is not None:
            y = self._whiten_masked(samples, keep, scale, bias)
        else:
            if isinstance(count, int):  # not a symbolic size of `jax.export`
                self._take_notice(sample_objection(self.num_groups, self.num_features, count * self.num_features))
            axis = samples.ndim - 1
            spec = WhiteningSpec(SampleGroups(axis, self.num_groups), *self._solver(), self._all_reduce)
            y = BACKEND.whiten(spec, samples, scale, bias)
        return _from_samples(y, x.shape, batch_axes)

    def _batch_axes(self, x: Array) -> tuple[int, ...]:
        """Return the axes that count samples."""
        if x.ndim == 0:
            raise ValueError("x has shape (): at least 1 dimension is needed, the channels")
        if self.reduction_axes is None:
            return (0,) if x.ndim > 1 else ()
        if any(not -x.ndim <= axis < x.ndim for axis in self.reduction_axes):
            raise ValueError(f"reduction_axes={self.reduction_axes} has an axis that x of shape {x.shape} hasn't")
        sample_axes = {axis % x.ndim for axis in self.reduction_axes}
        if x.ndim - 1 not in sample_axes:
            raise ValueError(
                f"reduction_axes={self.reduction_axes} leaves out the channels, the last axis of x of shape {x.shape}: "
                "include it"
            )
        return tuple(i for i in range(x.ndim) if i not in sample_axes)

    def _whiten_masked(self, x: Array, keep: Array, scale: Array | None, bias: Array | None) -> Array:
        """Whiten samples (N, ..., C) by the statistics of the positions where `keep` (N, ..., 1) is true.

        A sample (positions, groups, channels a group) is whitened as IterNorm whitens a batch whose channels are these
        groups.
        """
        groups = ChannelGroups(1, self.num_groups)
        spec = WhiteningSpec(groups, *self._solver(), self._all_reduce)
        split = BACKEND.kernels.to_accumulation_dtype(x).reshape(x.shape[0], -1, self.num_groups, self.group_size)
        kept = jnp.broadcast_to(keep.reshape(x.shape[0], -1, 1), (*split.shape[:2], self.group_size))
        whiten = partial(whiten_masked, BACKEND, spec, weight=None, bias=None)
        y: Array = jax.vmap(lambda sample, mask: whiten(sample, mask)[0])(split, kept).reshape(x.shape)
        y = y if scale is None else y * scale.astype(y.dtype)
        y = y if bias is None else y + bias.astype(y.dtype)
        return y.astype(x.dtype)


def _number_of_groups(num_features: int, num_groups: int | None, group_size: int | None) -> int:
    if num_groups is not None and group_size is None:
        return checks.check_num_groups(num_groups, num_features)
    if group_size is not None and num_groups is None:
        return num_features // checks.check_num_groups(group_size, num_features, "group_size")
    raise ValueError(
        f"num_groups={num_groups} and group_size={group_size}: one of them is needed, and None for the other"
    )


def _as_samples(x: Array, batch_axes: tuple[int, ...]) -> Array:
    """Return x as (N, ..., C), with all axes that count samples as one."""
    ordered = jnp.moveaxis(x, batch_axes, range(len(batch_axes)))
    return ordered.reshape(math.prod(ordered.shape[: len(batch_axes)]), *ordered.shape[len(batch_axes) :])


def _from_samples(y: Array, shape: Shape, batch_axes: tuple[int, ...]) -> Array:
    """Return y in the given shape, that of the array that `_as_samples` has made samples of."""
    rest = tuple(i for i in range(len(shape)) if i not in batch_axes)
    ordered = y.reshape([shape[i] for i in batch_axes + rest])
    return jnp.moveaxis(ordered, range(len(batch_axes)), batch_axes)
