"""The layers: `IterNorm` replaces BatchNorm1d, 2d and 3d, and `GroupWhitening` replaces GroupNorm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from polywhiten import checks
from polywhiten.blocks import ChannelGroups, SampleGroups
from polywhiten.feasibility import batch_objection, sample_objection
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import TRACKED, WhiteningStats, whitener_of
from polywhiten.torch.averages import RunningAverages, update_averages
from polywhiten.torch.backend import BACKEND
from polywhiten.torch.checkpoints import AveragesWanted, convert_averages
from polywhiten.torch.coloring import color, colored_whitener, diagonal_matrices
from polywhiten.torch.masks import check_mask
from polywhiten.torch.processes import WORLD, SumOverProcesses
from polywhiten.torch.shuffling import statistics_in_order, whiten_shuffled
from polywhiten.torch.whitening_layer import WhiteningLayer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ON_NONFINITE = ("skip", "raise")


class IterNorm(WhiteningLayer):
    r"""Iterative normalization: whitens groups of channels over the batch.

    Replaces `torch.nn.BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d`. It takes their arguments in their order up to
    `track_running_stats`, and the others by keyword:

    .. math:: Y = \Sigma^{-1/2} (X - \mu) \cdot \gamma + \beta, \quad
              \Sigma = \tfrac{1}{M} (X - \mu)(X - \mu)^T + \epsilon I

    Parameters
    ----------
    num_features : int
        C, the number of channels of the input, (N, C, ...) by default.
    eps : float
        Added to the diagonal of the covariance, so it has the units of the squared input.
    momentum : float or None
        Weight of the newest batch in the running averages. None takes the plain average of all batches.
    affine : bool or "coloring"
        Whether to learn a weight and a bias for every channel. "coloring" learns a matrix for every group in place of
        the weights, which mixes the whitened channels as in whitening and coloring (Siarohin et al.).
    track_running_stats : bool
        Whether to keep running averages for evaluation mode. Without them, every input is whitened by its own batch.
    bias : bool
        Whether an affine layer has a bias as well as a weight.
    group_size : int
        Number of channels whitened together; the last group is smaller if this doesn't divide C. 1 is batch
        normalization.
    method : {"newton", "eigh", "minimax"}
        As for `polywhiten.iter_norm`; "eigh" is decorrelated batch normalization.
    iterations : int, optional
        Steps of "newton" and "minimax", 5 by default; "eigh" has none.
    relative_eps : bool
        Whether eps is a fraction of each group's mean variance instead, as for `polywhiten.iter_norm`.
    shuffle : bool
        Whether each training step whitens other groups, of channels drawn at random, as shuffled decorrelated batch
        normalization does in self-supervised learning (Hua et al.). In evaluation, groups are adjacent channels.
    axis : int
        Axis of the channels, -1 for inputs (N, ..., C) such as sequences (N, L, C). An axis below 0 counts from the
        last one.
    track : {"whitener", "covariance"}
        Which matrix is averaged: the whitener, as in the paper, or the covariance, from which every evaluation computes
        the whitener. The covariance is the better estimate, above all with "eigh".
    on_nonfinite : {"skip", "raise"}
        What to do with a batch that would make statistics or running averages NaN or infinite, in their own dtype. Such
        a batch never changes the running averages. "skip" ignores it silently; if its statistics aren't finite, its
        output is NaN. "raise" raises a ValueError, which takes a synchronization with the device in every step, and a
        graph break in `torch.compile`.
    process_group : ProcessGroup or "world", optional
        Processes of `torch.distributed` that share a batch in training, as with `torch.nn.SyncBatchNorm`: statistics
        are those of their joined batch. "world" is the default group at the time of the call. By default, and where
        `torch.distributed` isn't initialized, each process takes statistics of its own batch.
    device, dtype
        Of the parameters and running averages.

    Attributes
    ----------
    weight, bias : Parameter, shape (C,), or None
        With `affine="coloring"`, the weight has the shape (groups, d, d) of the running matrices and begins as the
        identity. If the last group is smaller, the upper left corner of its matrix counts.
    running_mean : Tensor, shape (C,), or None
    running_whitener or running_covariance : Tensor, shape (groups, d, d), or None
        If the last group is smaller, its matrix is in the upper left corner and the identity fills the rest. As with
        batch normalization, you may set both averages to None; then every input is whitened by its own batch.
    num_batches_tracked : Tensor, shape (), or None
        If it is None, `momentum=None` averages nothing.
    eps, momentum : float
        May be set at any time. `method`, `iterations` and `relative_eps` can't.
    process_group : ProcessGroup, "world" or None
        May be set at any time, in all processes alike.
    frozen_stats : bool
        Whether the layer stays in evaluation mode when its network is trained. `polywhiten.torch.freeze_stats` sets it.

    Raises
    ------
    ValueError
        An argument or an input is invalid, this process isn't in `process_group`, or a training batch has one sample
        per channel. The latter isn't checked if several processes share the batch.
    TypeError
        The input isn't a floating-point tensor.

    Warns
    -----
    polywhiten.analysis.InfeasibleWarning
        In training, if a batch has fewer samples (batch size times positions) than whitening this group size needs.
        There is one warning for a network, after its layers have run. It gives their number and the first one's name,
        and has all of them in its attribute `layers`. Compiled code doesn't warn. If processes share a batch, the
        others count as if they had as many samples as this one.

    Notes
    -----
    For half precision, statistics are computed in float32, also under autocast; the output has the dtype and memory
    format of the input. An empty batch, which one of several processes may get, is returned as it is and changes no
    average, unless the processes share it.

    `layer(x, mask)` leaves padded positions out of the statistics. Everywhere else, output, gradients and running
    averages are those of a batch without them. If the mask is true at one position or none, the batch changes no
    average. Evaluation by running averages doesn't depend on the mask. With a mask, PyTorch records the operations one
    by one, so a training step takes longer and backward keeps several arrays of the size of the input.

    With `affine="coloring"`, the output is C W (x - mean) + bias for a group's whitener W and its learned matrix C. In
    evaluation C W is one matrix. In training, the product with C is another pass, and backward keeps the whitened input
    beside the input.

    With `shuffle=True`, the order of the channels is drawn in each training step from PyTorch's default generator for
    the input's device, as by `torch.nn.Dropout`, so `torch.manual_seed` makes it reproducible and checkpointed blocks
    draw the same order again. Every channel keeps its place, its weight and its bias. The running averages are those of
    groups of adjacent channels, as without `shuffle`: averages of groups that change would belong to no group. They
    take another pass over the batch, which `track_running_stats=False` saves.

    If processes share a batch, a training step exchanges once forward and once backward, and evaluation never. Masks
    and `shuffle` take further exchanges. All processes have to call the layer, forward and backward, equally often. A
    batch that isn't finite in one process is left out by all, and with "raise" all raise the error. The gradient of the
    input is that of the sum of the processes' losses. Each process has the gradients of weight and bias for its own
    loss, and `DistributedDataParallel` averages them like all others: if parts are equal and the loss is a mean over
    samples, they are those of one process. A layer with a ProcessGroup can be copied, but not pickled.

    Tools that detect batch normalization by its class, such as `torch.optim.swa_utils.update_bn`, do not recognize this
    layer: use `polywhiten.torch.update_stats` in its place.

    `load_state_dict` also accepts checkpoints of other layers, for a whole network or for one layer. Those of batch
    normalization become averages with which the output in evaluation is that of batch normalization if `eps` is the
    same; with `track="covariance"`, this needs `method="eigh"`. From those of the authors' PyTorch layers for
    IterNorm and decorrelated batch normalization, it takes the averages if `group_size` is the same. Their files don't
    tell whether whiteners or covariances were averaged: use `track="covariance"` for those of their classes `DBN2` and
    `IterNormSigma`. The number of batches becomes 0 if the checkpoint has none.

    ONNX has no eigendecomposition, so `torch.onnx.export` replaces "eigh" by Newton's iteration with enough steps to be
    as exact. It can't do so for a module that `torch.export` has already converted.

    References
    ----------
    Huang et al., Iterative Normalization, CVPR 2019, arXiv:1904.03441.

    Siarohin et al., Whitening and Coloring Batch Transform for GANs, ICLR 2019, arXiv:1806.00420.

    Hua et al., On Feature Decorrelation in Self-Supervised Learning, ICCV 2021, arXiv:2105.00470.

    Examples
    --------
    >>> import torch
    >>> from polywhiten.torch import IterNorm
    >>> layer = IterNorm(16, group_size=8)
    >>> layer(torch.randn(4, 16, 5, 5)).shape
    torch.Size([4, 16, 5, 5])

    Sequences of different lengths, padded to the longest one:

    >>> lengths = torch.tensor([7, 3, 5, 6])
    >>> mask = torch.arange(7) < lengths[:, None]  # true at the positions that count
    >>> layer = IterNorm(16, group_size=8, axis=-1)
    >>> layer(torch.randn(4, 7, 16), mask).shape
    torch.Size([4, 7, 16])
    """

    channels_argument = "num_features"

    running_mean: Tensor | None
    num_batches_tracked: Tensor | None
    frozen_stats: bool = False  # of the class, so that layers pickled without it have it too
    _sum_over_processes: SumOverProcesses | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool | str = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        group_size: int = 64,
        method: str = "newton",
        iterations: int | None = None,
        relative_eps: bool = False,
        shuffle: bool = False,
        axis: int = 1,
        track: str = "whitener",
        on_nonfinite: str = "skip",
        process_group: ProcessGroup | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        num_features = checks.check_positive("num_features", num_features)
        group_size = checks.check_positive("group_size", group_size)
        if isinstance(affine, str):
            checks.check_choice("affine", affine, ("coloring",))
        d = min(group_size, num_features)
        matrices_shape = (-(-num_features // d), d, d)
        super().__init__(
            num_features,
            eps=eps,
            affine=affine,
            bias=bias,
            method=method,
            iterations=iterations,
            relative_eps=relative_eps,
            axis=axis,
            device=device,
            dtype=dtype,
            weight_shape=matrices_shape if affine == "coloring" else (num_features,),
        )
        self.num_features = num_features
        self.group_size = group_size
        self.shuffle = shuffle
        if momentum is not None:
            momentum = checks.check_momentum(momentum, ", or None for the plain average")
        self.momentum = momentum
        self.track_running_stats = track_running_stats
        self.track = checks.check_choice("track", track, TRACKED)
        self.on_nonfinite = checks.check_choice("on_nonfinite", on_nonfinite, ON_NONFINITE)
        self.process_group = process_group
        for name, shape in (("running_mean", (num_features,)), (self._matrices, matrices_shape)):
            averages = torch.empty(shape, device=device, dtype=dtype) if track_running_stats else None
            self.register_buffer(name, averages)
        count = torch.empty((), dtype=torch.long, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", count)
        self.reset_parameters()

    @property
    def _matrices(self) -> str:
        """Name of the buffer with the running average of the tracked matrix."""
        return f"running_{self.track}"

    @property
    def process_group(self) -> ProcessGroup | str | None:
        """The processes that share statistics in training; None if each takes those of its own batch."""
        total_of = self._sum_over_processes
        return None if total_of is None else total_of.process_group or WORLD

    @process_group.setter
    def process_group(self, group: ProcessGroup | str | None) -> None:
        self._sum_over_processes = None if group is None else SumOverProcesses.of(group)

    def train(self, mode: bool = True) -> Self:
        """Set training mode, or evaluation mode if `mode` is False or the statistics are frozen."""
        return super().train(mode and not self.frozen_stats)

    def reset_running_stats(self) -> None:
        """Reset the running mean to 0, the running matrices to the identity, and the number of batches to 0."""
        averages = self._averages()
        with torch.no_grad():
            if averages is not None:
                mean, matrices = averages
                mean.zero_()
                matrices.copy_(torch.eye(matrices.shape[-1], device=matrices.device))
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Set the weight to 1, or its matrices to the identity, the bias to 0, and reset the running averages."""
        self.reset_running_stats()
        super().reset_parameters()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Whiten x: by the statistics of its batch in training, else by the running averages.

        Parameters
        ----------
        x : Tensor
            A batch with its channels at `axis`.
        mask : Tensor of booleans, optional
            False at padded positions, which the statistics leave out. Its shape is that of x without the channel axis,
            for example (N, L) for sequences (N, L, C).

        Returns
        -------
        Tensor
            All positions of x, the padded ones too, whitened by the same mean and matrix.
        """
        axis = self._check_input(x)
        if mask is not None:
            check_mask(mask, x, axis)
        averages = self._averages()
        if averages is not None and not self.training:
            return self._whiten_by_averages(x, axis, *averages)
        all_reduce = self._sum_over_processes if self.training else None
        number = 1 if all_reduce is None else all_reduce.number
        if number == 1:
            if x.numel() == 0:
                return self._whiten_nothing(x, axis)
            if mask is None:
                checks.check_batch(x, axis)
            all_reduce = None
        num_samples = number * x.numel() // self.num_features if mask is None else None
        self._take_notice(batch_objection, self.group_size, self.num_features, num_samples)
        spec = WhiteningSpec(ChannelGroups(axis, self.group_size), self._solver, self._shift, all_reduce)
        coloring = self._coloring
        affine = (self.weight, self.bias) if coloring is None else (None, None)
        if self.training and self.shuffle and 1 < self.group_size < self.num_features:
            y = self._whiten_shuffled(spec, x, mask, averages, *affine)
        else:
            y = self._whiten_in_order(spec, x, mask, averages, *affine)
        return y if coloring is None else color(y, coloring, self.bias, axis)

    @property
    def _coloring(self) -> Tensor | None:
        """The matrices that multiply the whitened channels, or None if each channel has a weight or none."""
        return self.weight if self.weight is not None and self.weight.ndim == 3 else None

    def _whiten_in_order(
        self,
        spec: WhiteningSpec,
        x: Tensor,
        mask: Tensor | None,
        averages: tuple[Tensor, Tensor] | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """Whiten groups of adjacent channels by their own statistics, and average these."""
        y: Tensor
        tracks = self.training and self.track_running_stats
        if mask is not None:
            y, stats, count = BACKEND.whiten_masked(spec, x, mask, weight, bias)
            if tracks:
                self._update_averages(stats, averages, count)
            return y
        if not tracks:
            return BACKEND.whiten(spec, x, weight, bias)
        if averages is not None and self.on_nonfinite == "skip":  # such kernels don't tell the host of a bad batch
            matrix_is_covariance = self.track == "covariance"
            running = RunningAverages(*averages, self.num_batches_tracked, self.momentum, matrix_is_covariance)
            joined = BACKEND.whiten_and_average(spec, x, weight, bias, running)
            if joined is not None:
                return joined
        y, stats = BACKEND.whiten_with_statistics(spec, x, weight, bias)
        self._update_averages(stats, averages)
        return y

    def _whiten_shuffled(
        self,
        spec: WhiteningSpec,
        x: Tensor,
        mask: Tensor | None,
        averages: tuple[Tensor, Tensor] | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """Whiten groups of channels drawn at random, and average the statistics of groups of adjacent channels.

        The latter are another pass over x, because averages over groups that change would mean nothing.
        """
        y = whiten_shuffled(spec, x, mask, weight, bias)
        if self.track_running_stats:
            stats, count = statistics_in_order(spec, x, mask)
            self._update_averages(stats, averages, count)
        return y

    def _averages(self) -> tuple[Tensor, Tensor] | None:
        """Return the running mean and matrices, or None if the layer has neither."""
        mean, matrices = self.running_mean, getattr(self, self._matrices)
        if mean is not None and matrices is not None:
            return mean, matrices
        if mean is not None or matrices is not None:
            missing, other = ("running_mean", self._matrices)[:: 1 if mean is None else -1]
            raise ValueError(f"{missing} is None and {other} isn't: set both to None to whiten every batch by itself")
        return None

    def _from_checkpoint(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        own = super()._from_checkpoint(entries)
        weight, coloring = own.get("weight"), self._coloring
        if coloring is not None and isinstance(weight, Tensor) and weight.shape == (self.num_features,):
            own["weight"] = diagonal_matrices(weight.detach(), coloring)
        if self.running_mean is None or getattr(self, self._matrices) is None:
            return own
        arguments = self.num_features, self.group_size, self.track, self.method, self.eps, self.relative_eps
        return convert_averages(own, AveragesWanted(*arguments))

    def evaluation_statistics(self) -> tuple[Tensor, Tensor] | None:
        """Return the mean, shape (C,), and the whitener, (groups, d, d), by which an evaluation whitens its input.

        They are None if the layer whitens every input by its own batch. If the last group is smaller, its whitener is
        in the upper left corner. Both may be the layer's own buffers.
        """
        averages = self._averages()
        if averages is None:
            return None
        mean, matrices = averages
        return mean, self._whitener(matrices)

    def _whiten_by_averages(self, x: Tensor, axis: int, mean: Tensor, matrices: Tensor) -> Tensor:
        """Whiten x by the running averages."""
        affine = self.weight, self.bias
        mean, matrices = (BACKEND.snapshot(state, x, *affine) for state in (mean, matrices))
        whitener, coloring = self._whitener(matrices), self._coloring
        if coloring is not None:
            affine = None, self.bias
            whitener = colored_whitener(coloring, whitener, BACKEND.kernels.accumulation_dtype(x.dtype))
        return BACKEND.apply_frozen(axis, x, mean, whitener, *affine)

    def _whitener(self, matrices: Tensor) -> Tensor:
        """Return the whitener of tracked matrices, which are whiteners already unless the covariance is tracked."""
        if self.track == "whitener":
            return matrices
        covariance = BACKEND.kernels.to_accumulation_dtype(matrices)
        kernels = BACKEND.kernels_for(covariance)
        whitener: Tensor = whitener_of(kernels, covariance, self.num_features, self._solver, self._shift)
        return whitener

    @torch.no_grad()
    def _update_averages(
        self, stats: WhiteningStats, averages: tuple[Tensor, Tensor] | None, count: Tensor | None = None
    ) -> None:
        """Update the running averages and the number of batches, unless one of them would not be finite.

        `count` is the number of samples where only the device knows it. One sample, which has no covariance, changes
        nothing, and neither does none.
        """
        newest = stats.mean, getattr(stats, self.track)
        checked: tuple[Tensor, ...] = () if self.track == "whitener" else (stats.whitener,)
        if count is not None:
            checked = *checked, torch.where(count > 1, count, math.inf)
        if averages is None:  # only the number of batches changes
            finite = update_averages((), (), newest + checked, self.num_batches_tracked, self.momentum)
        else:
            finite = update_averages(averages, newest, checked, self.num_batches_tracked, self.momentum)
        if self.on_nonfinite == "raise" and not finite and (count is None or count > 1):
            others = ", here or in another process" if self._sum_over_processes is not None else ""
            raise ValueError(
                f"x has NaN or infinity{others}, or values too large for its dtype or for that of the running averages "
                "(on_nonfinite='raise')"
            )

    def extra_repr(self) -> str:
        """Return the arguments, as `repr` shows them."""
        names = (
            "eps momentum affine bias track_running_stats group_size method iterations relative_eps shuffle axis track"
        )
        shared = ["process_group"] if self._sum_over_processes is not None else []
        frozen = ["frozen_stats"] if self.frozen_stats else []
        return self._described(self.num_features, names=names.split() + shared + frozen)


class GroupWhitening(WhiteningLayer):
    r"""Group whitening: whitens groups of channels against each other, within every sample.

    Replaces `torch.nn.GroupNorm` and takes its arguments in its order. Training and evaluation are the same:

    .. math:: Y = \Sigma^{-1/2} (X - \mu) \cdot \gamma + \beta, \quad
              \Sigma = \tfrac{1}{M} (X - \mu)(X - \mu)^T + \epsilon I

    where X is one sample as a matrix (num_groups, M).

    Parameters
    ----------
    num_groups : int
        g, the size of the covariance matrix; divides num_channels.
    num_channels : int
        C, the number of channels of the input, (N, C, ...) by default.
    eps : float
        Added to the diagonal of the covariance, so it has the units of the squared input.
    affine : bool
        Whether to learn a weight and a bias for every channel.
    bias : bool
        Whether an affine layer has a bias as well as a weight.
    method : {"newton", "eigh", "minimax"}
        As for `polywhiten.iter_norm`.
    iterations : int, optional
        Steps of "newton" and "minimax", 5 by default; "eigh" has none.
    relative_eps : bool
        Whether eps is a fraction of each sample's mean variance instead, as for `polywhiten.iter_norm`.
    axis : int
        Axis of the channels, as for `IterNorm`, but not 0, which holds the samples.
    device, dtype
        Of the parameters.

    Attributes
    ----------
    weight, bias : Parameter, shape (C,), or None

    Raises
    ------
    ValueError
        An argument or an input is invalid, or a group has one value per sample.
    TypeError
        The input isn't a floating-point tensor.

    Warns
    -----
    polywhiten.analysis.InfeasibleWarning
        In training, if a sample has fewer values (channels times positions) than whitening this number of groups needs.
        There is one warning for a network, as with `IterNorm`. Compiled code doesn't warn.

    Notes
    -----
    For half precision, statistics are computed in float32, also under autocast; the output has the dtype and memory
    format of the input. "eigh" is exported to ONNX as with `IterNorm`. `load_state_dict` accepts checkpoints of group
    normalization and of the authors' group whitening, which adds no `eps` in its iterative version.

    References
    ----------
    Huang et al., Group Whitening, CVPR 2021, arXiv:2009.13333.

    Examples
    --------
    >>> import torch
    >>> from polywhiten.torch import GroupWhitening
    >>> layer = GroupWhitening(8, 16)
    >>> layer(torch.randn(4, 16, 5, 5)).shape
    torch.Size([4, 16, 5, 5])
    """

    channels_argument = "num_channels"
    first_axis = 1

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        bias: bool = True,
        method: str = "newton",
        iterations: int | None = None,
        relative_eps: bool = False,
        axis: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        num_channels = checks.check_positive("num_channels", num_channels)
        num_groups = checks.check_num_groups(num_groups, num_channels)
        if isinstance(affine, str):
            raise ValueError(
                f"affine={affine!r}: group whitening has one weight for each channel or none, so use True or False; "
                "IterNorm has affine='coloring', whose matrices mix the channels of a group"
            )
        super().__init__(
            num_channels,
            eps=eps,
            affine=affine,
            bias=bias,
            method=method,
            iterations=iterations,
            relative_eps=relative_eps,
            axis=axis,
            device=device,
            dtype=dtype,
        )
        self.num_channels = num_channels
        self.num_groups = num_groups
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Whiten every sample of x, which has its channels at `axis`."""
        axis = self._check_input(x)
        if x.numel() == 0:
            return self._whiten_nothing(x, axis)
        num_groups = checks.check_sample_groups(x, self.num_groups, axis)
        spec = WhiteningSpec(SampleGroups(axis, num_groups), self._solver, self._shift)
        y = BACKEND.whiten(spec, x, self.weight, self.bias)
        self._take_notice(sample_objection, self.num_groups, self.num_channels, math.prod(x.shape[1:]))
        return y

    def extra_repr(self) -> str:
        """Return the arguments, as `repr` shows them."""
        names = "eps affine bias method iterations relative_eps axis"
        return self._described(self.num_groups, self.num_channels, names=names.split())
