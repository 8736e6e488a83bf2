"""Keras layers: `IterNorm` replaces BatchNormalization, `GroupWhitening` replaces GroupNormalization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import initializers, ops

from polywhiten import checks
from polywhiten.backend import Backend
from polywhiten.blocks import ChannelGroups, SampleGroups
from polywhiten.feasibility import batch_objection, sample_objection
from polywhiten.keras.whitening_layer import Tensor, WhiteningLayer
from polywhiten.layer_entry import whiten_masked, whiten_nothing
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import TRACKED, WhiteningStats, whitener_of

_TRACKS_COVARIANCE = "tracks_covariance"  # what a file of weights has beside an IterNorm's variables


@keras.saving.register_keras_serializable(package="polywhiten")
class IterNorm(WhiteningLayer):
    """Iterative normalization: whitens groups of channels over the batch.

    This layer replaces `keras.layers.BatchNormalization`. It takes the same
    arguments in the same order up to `gamma_constraint`, and the others by
    keyword; there is no `renorm`. `from_config` accepts configurations of both.
    Batch normalization divides every channel by its standard deviation. This
    layer multiplies every group of channels by the inverse square root of its
    covariance, so that they have variance 1 and are uncorrelated:

    `outputs = gamma * (cov + epsilon * I)^(-1/2) @ (inputs - mean) + beta`

    Like batch normalization, it works differently in training and in inference.
    In training (`fit()`, or a call with `training=True`) mean and covariance
    are those of the batch; in inference (`evaluate()`, `predict()`, or a call
    with `training=False`, the default) the moving averages are used:
    `moving_x = moving_x * momentum + batch_x * (1 - momentum)`.

    Args:
        axis: Integer, the axis of the channels. Use 1 for
            `data_format="channels_first"`. Defaults to `-1`.
        momentum: Float from 0 to 1, momentum of the moving averages.
            Defaults to `0.99`.
        epsilon: Float, added to the diagonal of the covariance.
            Defaults to `1e-5`.
        center: Whether to learn an offset `beta`. Defaults to `True`.
        scale: Whether to learn a factor `gamma`. Defaults to `True`.
        beta_initializer: Initializer of beta. Defaults to `"zeros"`.
        gamma_initializer: Initializer of gamma. Defaults to `"ones"`.
        moving_mean_initializer: Initializer of the moving mean. Defaults to
            `"zeros"`.
        moving_variance_initializer: Initializer of the channels' variances.
            The moving covariance starts as the diagonal matrix of these, the
            moving whitener as that of `1 / sqrt(variance)`, where epsilon
            replaces smaller variances. So an untrained layer begins with
            the variances of `BatchNormalization`. Defaults to `"ones"`.
        beta_regularizer: Optional regularizer of beta.
        gamma_regularizer: Optional regularizer of gamma.
        beta_constraint: Optional constraint of beta.
        gamma_constraint: Optional constraint of gamma.
        synchronized: Whether the replicas of a `tf.distribute` strategy share
            the statistics of their joined batch. Only the TensorFlow backend
            supports this. (With JAX they always share them, as Keras gives the
            layer the whole batch.) Defaults to `False`.
        group_size: Integer, the channels that are whitened together. The last
            group is smaller if this doesn't divide the number of channels; 1 is
            batch normalization. Defaults to `64`.
        method: `"newton"`, the papers' iteration, which whitens small
            directions in part; `"eigh"`, exact, as in decorrelated batch
            normalization; or `"minimax"`, exact up to 1e-4 in few steps.
            Defaults to `"newton"`.
        iterations: Integer, the steps of `"newton"` and `"minimax"`; `None` is 5.
            `"eigh"` has none. Defaults to `None`.
        relative_epsilon: Whether epsilon is a fraction of the mean variance of
            the channels that are whitened together, for inputs whose variances
            are far from 1. Defaults to `False`.
        track: `"whitener"`, whose moving average the paper takes, or
            `"covariance"`, from which the whitener is computed in inference.
            The covariance is the better estimate, above all with `"eigh"`.
            Defaults to `"whitener"`.
        **kwargs: Base layer keyword arguments (e.g. `name` and `dtype`).

    Call arguments:
        inputs: Tensor of rank 2 or more.
        training: Boolean, whether to normalize by the batch and to update the
            moving averages, or by the moving averages.
        mask: Boolean tensor of the shape of `inputs` without its channel axis:
            the statistics leave out positions where it is `False`.

    Input shape:
        Arbitrary, `(batch_size, ..., channels)` with the channels at `axis`,
        whose number has to be known.

    Output shape:
        As `inputs`, in the layer's compute dtype.

    Weights:
        `gamma` and `beta`, `(channels,)`; not trainable: `moving_mean`,
        `(channels,)`, and `moving_whitener` or `moving_covariance`,
        `(groups, d, d)`, where a smaller last group stands in the upper left
        corner of its matrix and the identity fills the rest.

    Raises:
        ValueError: An argument or an input doesn't fit.

    Warns:
        polywhiten.analysis.InfeasibleWarning: In training, if a batch has fewer
            samples, batch size times positions, than whitening so many channels
            together needs, and their number is known while graphs are traced.
            It is given once for a network, when its layers have run, and says
            how many layers are concerned and the first one's path; the
            warning's `layers` has them all.

    With `layer.trainable = False` the layer runs in inference mode, as
    `BatchNormalization` does. Three kinds of batches never enter the moving
    averages: those whose statistics aren't finite, whose outputs aren't finite
    either, so that `keras.callbacks.TerminateOnNaN` stops training there; those
    that would make an average infinite in its own dtype; and those of one
    sample, which has no covariance and whose outputs are `beta`. A batch of no
    samples is returned empty. Statistics are computed in float32 for half
    precision.

    Example:

    >>> import numpy as np
    >>> from polywhiten.keras import IterNorm
    >>> layer = IterNorm(group_size=8)
    >>> layer(np.random.normal(size=(4, 5, 5, 16)), training=True).shape == (4, 5, 5, 16)
    True

    Reference:

    - [Huang et al., 2019](https://arxiv.org/abs/1904.03441).
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        *,
        synchronized: bool = False,
        group_size: int = 64,
        method: str = "newton",
        iterations: int | None = None,
        relative_epsilon: bool = False,
        track: str = "whitener",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            axis=axis,
            epsilon=epsilon,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            method=method,
            iterations=iterations,
            relative_epsilon=relative_epsilon,
            **kwargs,
        )
        if synchronized and keras.backend.backend() != "tensorflow":
            raise ValueError(
                f"synchronized=True needs Keras' TensorFlow backend, not {keras.backend.backend()}: leave it out"
            )
        self.momentum = checks.check_momentum(momentum)
        self.moving_mean_initializer = initializers.get(moving_mean_initializer)
        self.moving_variance_initializer = initializers.get(moving_variance_initializer)
        self.synchronized = synchronized
        self.group_size = checks.check_positive("group_size", group_size)
        self.track = checks.check_choice("track", track, TRACKED)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        channels = self._build_affine(input_shape, 0)
        d = min(self.group_size, channels)
        matrices = (-(-channels // d), d, d)
        moving = {"trainable": False, "autocast": False, "aggregation": "mean"}  # of a strategy's replicas
        self.moving_mean = self.add_weight(
            shape=(channels,), name="moving_mean", initializer=self.moving_mean_initializer, **moving
        )
        weight = self.add_weight(
            shape=matrices, name=f"moving_{self.track}", initializer=partial(self._initial_matrices, channels), **moving
        )
        setattr(self, f"moving_{self.track}", weight)

    def _initial_matrices(self, channels: int, shape: tuple[int, int, int], dtype: str) -> Tensor:
        """Return diagonal covariances of the initial variances, or their whiteners, padded with the identity."""
        groups, d, _ = shape
        full = "float64" if dtype == "float64" else "float32"  # epsilon may be too small for half precision
        values = ops.cast(self.moving_variance_initializer((channels,), dtype=dtype), full)
        if self.track == "whitener":
            # not of their sum with epsilon: the papers' average starts as the identity
            values = ops.rsqrt(ops.maximum(values, self.epsilon * (ops.mean(values) if self.relative_epsilon else 1)))
        values = ops.concatenate([values, ops.ones((groups * d - channels,), dtype=full)])
        return ops.cast(ops.reshape(values, (groups, d, 1)) * ops.eye(d, dtype=full), dtype)

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        store[_TRACKS_COVARIANCE] = np.array([self.track == "covariance"])

    def load_own_variables(self, store: Any) -> None:
        """Load the variables, which Keras tells apart by their order alone; matrices of the other kind are an error."""
        entries = {name: store[name] for name in store.keys()}  # noqa: SIM118  # a store isn't iterable
        marked = entries.pop(_TRACKS_COVARIANCE, None)
        if marked is not None and bool(np.asarray(marked)[0]) != (self.track == "covariance"):
            other = "whitener" if self.track == "covariance" else "covariance"
            raise ValueError(f"{self.path} has track={self.track!r}, and the saved weights are of track={other!r}")
        super().load_own_variables(entries)

    def call(self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None) -> Tensor:
        backend, x, axis, gamma, beta = self._prepared(inputs)
        if mask is not None:
            self._check_mask(mask, x, axis)
        if not (training and self.trainable):
            return self._frozen(backend, x, axis, gamma, beta)
        unknown = self.synchronized or mask is not None  # how many samples count
        self._take_notice(None if unknown else self._objection(x, axis))
        if 0 in x.shape and not self.synchronized:  # else this replica still takes part in the exchange
            return whiten_nothing(backend, x, gamma, beta, axis)
        spec = WhiteningSpec(ChannelGroups(axis, self.group_size), self._solver, self._shift, self._all_reduce)
        if mask is None:
            y, stats = backend.whiten_with_statistics(spec, x, gamma, beta)
            shape = backend.kernels.shape(x)
            count = math.prod(shape[:axis]) * math.prod(shape[axis + 1 :])
            if self.synchronized:
                count = self._all_reduce(ops.cast(count, "float32"))
        else:
            keep = ops.cast(mask, "bool")
            y, stats, count = whiten_masked(backend, spec, x, keep, gamma, beta)
        self._update(stats, count)
        return y

    def _objection(self, x: Tensor, axis: int) -> str | None:
        sizes = (*x.shape[:axis], *x.shape[axis + 1 :])
        return batch_objection(self.group_size, x.shape[axis], math.prod(sizes)) if _are_known(sizes) else None

    def _check_mask(self, mask: Tensor, x: Tensor, axis: int) -> None:
        shape = (*x.shape[:axis], *x.shape[axis + 1 :])
        mask_shape = tuple(mask.shape)
        if len(mask_shape) != len(shape) or any(
            None not in sizes and len(set(sizes)) > 1 for sizes in zip(mask_shape, shape, strict=True)
        ):
            raise ValueError(f"mask has shape {mask_shape}: that of inputs without the channel axis is needed, {shape}")

    @property
    def _moving(self) -> tuple[Any, Any]:
        return self.moving_mean, getattr(self, f"moving_{self.track}")

    @property
    def _all_reduce(self) -> Any:
        if not self.synchronized:
            return None
        from polywhiten.tensorflow.replicas import sum_over_replicas

        return sum_over_replicas

    def _frozen(self, backend: Backend, x: Tensor, axis: int, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        mean, matrices = (backend.snapshot(backend.tensor(moving.value), x, gamma, beta) for moving in self._moving)
        if self.track == "covariance":
            full = backend.kernels.to_accumulation_dtype(matrices)
            matrices = whitener_of(backend.kernels_for(full), full, x.shape[axis], self._solver, self._shift)
        return backend.apply_frozen(axis, x, mean, matrices, gamma, beta)

    def _update(self, stats: WhiteningStats, count: Any) -> None:
        """Update the moving averages.

        They stay as they are if the batch has one sample, which has no covariance, if its statistics aren't finite, or
        if an average would become infinite in its own dtype.
        """
        usable, newest = count > 1, []
        for variable, batch in zip(self._moving, (stats.mean, getattr(stats, self.track)), strict=True):
            dtypes = variable.dtype, keras.backend.standardize_dtype(batch.dtype)
            full = "float64" if "float64" in dtypes else "float32"
            newer = ops.cast(variable.value, full) * self.momentum + ops.cast(batch, full) * (1 - self.momentum)
            newest.append(ops.cast(newer, variable.dtype))
        for values in (*newest, stats.whitener):
            usable = ops.logical_and(usable, ops.all(ops.isfinite(values)))
        for variable, newer in zip(self._moving, newest, strict=True):
            variable.assign(ops.where(usable, newer, variable.value))

    @property
    def _may_be_infeasible(self) -> bool:
        return bool(self.trainable)

    def get_config(self) -> dict[str, Any]:
        names = ("momentum", "synchronized", "group_size", "track")
        config = {name: getattr(self, name) for name in names}
        for name in ("moving_mean_initializer", "moving_variance_initializer"):
            config[name] = initializers.serialize(getattr(self, name))
        return {**super().get_config(), **config}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> IterNorm:
        """Return a layer for a configuration of this class or of `keras.layers.BatchNormalization`."""
        config = dict(config)
        if config.pop("renorm", False):
            raise ValueError("renorm=True: IterNorm has no batch renormalization, set it to False in the configuration")
        for name in ("renorm_clipping", "renorm_momentum"):  # without a meaning where renorm is False
            config.pop(name, None)
        layer: IterNorm = super().from_config(config)
        return layer


@keras.saving.register_keras_serializable(package="polywhiten")
class GroupWhitening(WhiteningLayer):
    """Group whitening: whitens groups of channels against each other, within every sample.

    This layer replaces `keras.layers.GroupNormalization`, and takes the same
    arguments in the same order up to `gamma_constraint`. The channels of a
    sample are cut into `groups` groups, whose covariance `(groups, groups)` is
    taken over all positions and over the channels of a group. Training and
    inference are the same:

    `outputs = gamma * (cov + epsilon * I)^(-1/2) @ (inputs - mean) + beta`

    Args:
        groups: Integer, the number of groups, which has to divide the number of
            channels; -1 means as many groups as channels. Defaults to `32`.
        axis: Integer, the axis of the channels. Use 1 for
            `data_format="channels_first"`. Defaults to `-1`.
        epsilon: Float, added to the diagonal of the covariance.
            Defaults to `1e-5`.
        center: Whether to learn an offset `beta`. Defaults to `True`.
        scale: Whether to learn a factor `gamma`. Defaults to `True`.
        beta_initializer: Initializer of beta. Defaults to `"zeros"`.
        gamma_initializer: Initializer of gamma. Defaults to `"ones"`.
        beta_regularizer: Optional regularizer of beta.
        gamma_regularizer: Optional regularizer of gamma.
        beta_constraint: Optional constraint of beta.
        gamma_constraint: Optional constraint of gamma.
        method: `"newton"`, the papers' iteration, which whitens small
            directions in part; `"eigh"`, exact; or `"minimax"`, exact up to 1e-4
            in few steps. Defaults to `"newton"`.
        iterations: Integer, the steps of `"newton"` and `"minimax"`; `None` is 5.
            `"eigh"` has none. Defaults to `None`.
        relative_epsilon: Whether epsilon is a fraction of the mean variance of
            the channels that are whitened together, for inputs whose variances
            are far from 1. Defaults to `False`.
        **kwargs: Base layer keyword arguments (e.g. `name` and `dtype`).

    Input shape:
        Arbitrary, `(batch_size, ..., channels)` with the channels at `axis`,
        whose number has to be known.

    Output shape:
        As `inputs`, in the layer's compute dtype.

    Weights:
        `gamma` and `beta`, `(channels,)`.

    Raises:
        ValueError: An argument or an input doesn't fit; a group has one value a
            sample.

    Warns:
        polywhiten.analysis.InfeasibleWarning: If samples have fewer values,
            channels times positions, than whitening so many groups needs. It is
            given once for a network, as by `IterNorm`.

    Statistics are computed in float32 for half precision. A mask is passed on to
    the next layer and not used, as by `GroupNormalization`.

    Example:

    >>> import numpy as np
    >>> from polywhiten.keras import GroupWhitening
    >>> layer = GroupWhitening(groups=8)
    >>> layer(np.random.normal(size=(4, 5, 5, 16))).shape == (4, 5, 5, 16)
    True

    Reference:

    - [Huang et al., 2021](https://arxiv.org/abs/2009.13333).
    """

    def __init__(
        self,
        groups: int = 32,
        axis: int = -1,
        epsilon: float = 1e-5,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        *,
        method: str = "newton",
        iterations: int | None = None,
        relative_epsilon: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            axis=axis,
            epsilon=epsilon,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            method=method,
            iterations=iterations,
            relative_epsilon=relative_epsilon,
            **kwargs,
        )
        groups = checks.check_integer("groups", groups)
        self.groups = groups if groups == -1 else checks.check_positive("groups", groups)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        channels = self._build_affine(input_shape, 1)
        self._groups = channels if self.groups == -1 else checks.check_num_groups(self.groups, channels, "groups")

    def call(self, inputs: Tensor) -> Tensor:
        backend, x, axis, gamma, beta = self._prepared(inputs)
        if 0 in x.shape:
            return whiten_nothing(backend, x, gamma, beta, axis)
        groups = checks.check_sample_groups(x, self._groups, axis)
        y = backend.whiten(WhiteningSpec(SampleGroups(axis, groups), self._solver, self._shift), x, gamma, beta)
        known = _are_known(x.shape[1:])
        objection = sample_objection(self._groups, x.shape[axis], math.prod(x.shape[1:]), "groups") if known else None
        self._take_notice(objection)
        return y

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "groups": self.groups}


def _are_known(sizes: Sequence[Any]) -> bool:
    return all(isinstance(size, int) for size in sizes)
