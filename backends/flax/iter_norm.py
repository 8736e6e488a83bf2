"""IterNorm, in place of `nnx.BatchNorm`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from jax import Array

from polywhiten import checks
from polywhiten.blocks import ChannelGroups
from polywhiten.feasibility import batch_objection
from polywhiten.flax.whitening_layer import WhiteningLayer, kept_positions
from polywhiten.jax import BACKEND
from polywhiten.layer_entry import whiten_masked, whiten_nothing
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import TRACKED, WhiteningStats, whitener_of

_pmean: Callable[..., WhiteningStats] = jax.lax.pmean  # which JAX has left without types


class IterNorm(WhiteningLayer):
    """Iterative normalization: whitens groups of channels over the batch.

    This layer replaces `nnx.BatchNorm` and takes the same arguments, except `use_fast_variance`. Batch normalization
    divides every channel by its standard deviation. This layer multiplies every group of channels by the inverse square
    root of its covariance, so that they have variance 1 and are uncorrelated::

        y = scale * (cov + epsilon * I)^(-1/2) @ (x - mean) + bias

    In training, mean and covariance are those of the batch. In evaluation, after `model.eval()` or with
    `use_running_average=True`, they are the running averages:
    `average = momentum * average + (1 - momentum) * batch`.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    use_running_average : bool or None
        Whether to normalize by the running averages. None means that every call has to say it.
    axis : int
        The channel axis of inputs.
    momentum : float
        From 0 to 1, how much of a running average stays in every training step.
    epsilon : float
        Added to the diagonal of the covariance.
    dtype : dtype, optional
        That of the output; None is what `promote_dtype` finds for input, averages, scale and bias, which are float32
        by default.
    param_dtype : dtype
        That of scale and bias. The averages have it too, but at least float32.
    use_bias, use_scale : bool
        Whether to learn an offset and a factor for every channel after whitening.
    bias_init, scale_init : callable
        Initializers of bias and scale.
    axis_name : hashable or tuple of hashables, optional
        Names of mapped axes of `nnx.vmap`, `nnx.pmap`, `jax.shard_map` and so on. Statistics are then those of the
        joined batch.
    axis_index_groups : sequence of sequences of int, optional
        Indices along `axis_name` that share statistics, in groups of equal size; None for all of them.
    promote_dtype : callable
        Maps a tuple `(x, mean, matrices, scale, bias)`, where `matrices` are the averaged whiteners or covariances, to
        one with the dtype `dtype=`. The layer uses the results for x, scale and bias; the averages stay in their own
        dtype, as a whitener in half precision has lost small directions.
    rngs : nnx.Rngs
        Gives the keys of the initializers.
    bias_metadata, scale_metadata : mapping
        Metadata of the two variables.
    group_size : int
        Channels that are whitened together. The last group is smaller if this doesn't divide the number of channels; 1
        is batch normalization.
    method : {"newton", "eigh", "minimax"}
        "newton" is the papers' iteration, which whitens small directions in part; "eigh" is exact, as in decorrelated
        batch normalization; "minimax" is exact up to 1e-4 in few steps.
    iterations : int, optional
        Steps of "newton" and "minimax", 5 by default; "eigh" has none.
    relative_epsilon : bool
        Whether epsilon is a fraction of the mean variance of the channels that are whitened together, for inputs whose
        variances are far from 1.
    track : {"whitener", "covariance"}
        What is averaged, beside the mean: the whitener, as in the paper, or the covariance, from which evaluation
        computes the whitener. The covariance is the better estimate, above all with "eigh".

    Attributes
    ----------
    scale, bias : nnx.Param or None, shape (C,)
    mean : nnx.BatchStat, shape (C,)
    whitener or covariance : nnx.BatchStat, shape (groups, d, d)
        Where the last group is smaller, it stands in the upper left corner of its matrix and the identity fills the
        rest.

    Raises
    ------
    TypeError, ValueError
        An argument or an input doesn't fit.

    Warns
    -----
    polywhiten.analysis.InfeasibleWarning
        In training, if a batch without a mask has fewer samples, batch size times positions, than whitening so many
        channels together needs. In compiled functions it is issued when they are traced.

    Notes
    -----
    Three kinds of batches never enter the averages: those whose statistics aren't finite, whose outputs aren't finite
    either; those that would make an average infinite in its own dtype; and those of one sample, which has no covariance
    and whose outputs are the bias. A batch of no samples is returned empty. Statistics are computed in float32 for half
    precision.

    References
    ----------
    Huang et al., Iterative Normalization, CVPR 2019, arXiv:1904.03441.

    Examples
    --------
    >>> import jax
    >>> from flax import nnx
    >>> from polywhiten.flax import IterNorm
    >>> x = jax.random.normal(jax.random.key(0), (8, 5, 5, 16))
    >>> layer = IterNorm(16, group_size=8, rngs=nnx.Rngs(0))
    >>> layer(x).shape  # whitened by the batch, which enters the running averages
    (8, 5, 5, 16)
    >>> layer.mean.shape, layer.whitener.shape
    ((16,), (2, 8, 8))
    >>> layer.eval()
    >>> layer(x[:1]).shape  # whitened by the running averages
    (1, 5, 5, 16)
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Callable[..., Array] = nnx.initializers.zeros,
        scale_init: Callable[..., Array] = nnx.initializers.ones,
        axis_name: Any = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        promote_dtype: Callable[..., Any] = flax_promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        group_size: int = 64,
        method: str = "newton",
        iterations: int | None = None,
        relative_epsilon: bool = False,
        track: str = "whitener",
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
        self.use_running_average = use_running_average
        self.axis = checks.check_integer("axis", axis)
        self.momentum = checks.check_momentum(momentum)
        self.group_size = checks.check_positive("group_size", group_size)
        self.track = checks.check_choice("track", track, TRACKED)
        d = min(self.group_size, self.num_features)
        full = jnp.promote_types(param_dtype, jnp.float32)
        self.mean = nnx.BatchStat(jnp.zeros(self.num_features, full))
        identities = nnx.BatchStat(jnp.tile(jnp.eye(d, dtype=full), (-(-self.num_features // d), 1, 1)))
        setattr(self, self.track, identities)

    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Array:
        """Whiten a batch.

        Parameters
        ----------
        x : array, shape (N, ..., C) or with the channels at `axis`
        use_running_average : bool, optional
            Takes precedence over the attribute.
        mask : array of bool, optional
            Positions to count in the statistics, which leave out the others. Its shape broadcasts to that of x, and has
            size 1 at the channel axis.

        Returns
        -------
        array, of the shape of x
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise ValueError(
                "use_running_average=None doesn't say how to normalize: pass True or False to the call or to IterNorm, "
                "or use model.train() and model.eval()"
            )
        scale, bias = self._affine()
        mean, matrices = (average[...] for average in self._averages)
        x, _, _, scale, bias = self.promote_dtype((x, mean, matrices, scale, bias), dtype=self.dtype)
        axis = checks.check_channel_axis(x, self.axis)
        self._check_input(x, axis)
        keep = None if mask is None else kept_positions(mask, x, axis).squeeze(axis)
        if use_running_average:
            return self._frozen(axis, x, mean, matrices, scale, bias)
        y: Array
        if 0 in x.shape:
            y = whiten_nothing(BACKEND, x, scale, bias, axis)
            return y
        spec = WhiteningSpec(ChannelGroups(axis, self.group_size), *self._solver(), self._all_reduce)
        if keep is None:
            y, stats = BACKEND.whiten_with_statistics(spec, x, scale, bias)
            count = self._joined(math.prod(x.shape) // x.shape[axis])
            if isinstance(count, int):  # not a symbolic size of `jax.export`
                self._take_notice(batch_objection(self.group_size, self.num_features, count))
        else:
            y, stats, count = whiten_masked(BACKEND, spec, x, keep, scale, bias)
        self._update(self._same_everywhere(stats), count)
        return y

    @property
    def _averages(self) -> tuple[nnx.BatchStat, nnx.BatchStat]:
        return self.mean, getattr(self, self.track)

    def _frozen(
        self, axis: int, x: Array, mean: Array, matrices: Array, scale: Array | None, bias: Array | None
    ) -> Array:
        if self.track == "covariance":
            matrices = whitener_of(BACKEND.kernels_for(matrices), matrices, self.num_features, *self._solver())
        y: Array = BACKEND.apply_frozen(axis, x, mean, matrices, scale, bias)
        return y

    def _same_everywhere(self, stats: WhiteningStats) -> WhiteningStats:
        """Return statistics that JAX knows to be equal along `axis_name`, as averages that all devices share need it.

        Those that come with a whitened array seem to vary along the axis, as the array does.
        """
        stats = jax.lax.stop_gradient(stats)
        if self.axis_name is None:
            return stats
        return _pmean(stats, self.axis_name, axis_index_groups=self.axis_index_groups)

    def _update(self, stats: WhiteningStats, count: Any) -> None:
        """Update the averages, unless the batch is one that never enters them."""
        usable, newest = jnp.asarray(count) > 1, []
        for average, batch in zip(self._averages, (stats.mean, getattr(stats, self.track)), strict=True):
            old = average[...]
            newest.append((old * self.momentum + batch * (1 - self.momentum)).astype(old.dtype))
        for values in (*newest, stats.whitener):
            usable = usable & jnp.all(jnp.isfinite(values))
        for average, newer in zip(self._averages, newest, strict=True):
            average[...] = jnp.where(usable, newer, average[...])

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Set the attribute for `nnx.view`.

        Parameters
        ----------
        use_running_average : bool, optional
            Whether the view normalizes by the running averages; None leaves it as it is.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
