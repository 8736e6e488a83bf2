"""Layers: `IterNorm` in place of BatchNorm1d/2d/3d, `GroupWhitening` in place of GroupNorm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from polywhiten import checks
from polywhiten.blocks import ChannelGroups, SampleGroups
from polywhiten.feasibility import batch_objection, sample_objection
from polywhiten.layer_entry import whiten_nothing
from polywhiten.notices import Framework, Notice
from polywhiten.solvers import regularized_solver
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import TRACKED, WhiteningStats, whitener_of
from polywhiten.torch.averages import RunningAverages, update_averages
from polywhiten.torch.backend import BACKEND
from polywhiten.torch.leaf import LeafModule

ON_NONFINITE = ("skip", "raise")


class IterNorm(LeafModule):
    r"""Iterative normalization: whitens groups of channels over the batch.

    In place of `torch.nn.BatchNorm1d`, `BatchNorm2d` or `BatchNorm3d`, with their arguments in their order up to
    `track_running_stats`, the others by keyword:

    .. math:: Y = \Sigma^{-1/2} (X - \mu) \cdot \gamma + \beta, \quad
              \Sigma = \tfrac{1}{M} (X - \mu)(X - \mu)^T + \epsilon I

    Parameters
    ----------
    num_features : int
        C, the channels of the input (N, C, ...).
    eps : float
        Added to the diagonal of the covariance, so in units of the squared input.
    momentum : float or None
        Weight of the newest batch in the running averages; None: the plain average of all batches.
    affine : bool
        Whether to learn a weight and a bias for every channel.
    track_running_stats : bool
        Whether to keep running averages for evaluation mode. Without them every input is whitened by its own batch.
    bias : bool
        Whether an affine layer has a bias beside its weight.
    group_size : int
        Channels whitened together; the last group is smaller where this doesn't divide C. 1 is batch normalization.
    method : {"newton", "eigh", "minimax"}
        As for `polywhiten.iter_norm`; "eigh" is decorrelated batch normalization.
    iterations : int, optional
        Steps of "newton" and "minimax", 5 by default; "eigh" has none.
    track : {"whitener", "covariance"}
        What is averaged: the whitener as in the paper, or the covariance, from which the whitener is derived in every
        evaluation. The covariance is the better estimate, above all for "eigh".
    relative_eps : bool
        Whether eps is a fraction of each group's mean variance instead, as for `polywhiten.iter_norm`.
    on_nonfinite : {"skip", "raise"}
        What to do with a batch whose statistics aren't finite, or with which a running average wouldn't be in its own
        dtype. It never enters the running averages. "skip": such a batch leaves them as they were, without a word (its
        output is NaN in the first case). "raise": a ValueError, at the price of a synchronization with the device, and
        of a graph break in `torch.compile`.
    device, dtype
        Of the parameters and running averages.

    Attributes
    ----------
    weight, bias : Parameter, shape (C,), or None
    running_mean : Tensor, shape (C,), or None
    running_whitener or running_covariance : Tensor, shape (groups, d, d), or None
        Where the last group is smaller, its matrix stands in the upper left corner and the identity fills the rest.
        As of batch normalization, both averages may be set to None: every input is then whitened by its own batch.
    num_batches_tracked : Tensor, shape (), or None
        Set to None, nothing is averaged for momentum None.

    Raises
    ------
    ValueError
        An argument or an input doesn't fit; in training, one sample a channel.
    TypeError
        An input that isn't floating point.

    Warns
    -----
    polywhiten.analysis.InfeasibleWarning
        In training, where a batch has fewer samples, batch size times positions, than whitening the group size takes.
        Once for a network, when its layers have run, with their number and the first one's name; the warning's
        `layers` has them all. Not in compiled code.

    Notes
    -----
    Statistics are computed in float32 for half precision, under autocast too; the output has the input's dtype and
    memory format. A batch of no samples, as a process of several may get, is returned empty and changes no average.
    Statistics are this process's own; `polywhiten.iter_norm` shares them with `all_reduce`. What looks
    for batch normalization by PyTorch's own class, as `torch.optim.swa_utils.update_bn` does, doesn't find this one.
    ONNX has no eigendecomposition: `torch.onnx.export` of a module writes "eigh" as so many of Newton's steps that they
    are as exact. Of what `torch.export` has made of a module before, it can't.

    References
    ----------
    Huang et al., Iterative Normalization, CVPR 2019, arXiv:1904.03441.

    Examples
    --------
    >>> import torch
    >>> from polywhiten.torch import IterNorm
    >>> layer = IterNorm(16, group_size=8)
    >>> layer(torch.randn(4, 16, 5, 5)).shape
    torch.Size([4, 16, 5, 5])
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        group_size: int = 64,
        method: str = "newton",
        iterations: int | None = None,
        relative_eps: bool = False,
        track: str = "whitener",
        on_nonfinite: str = "skip",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._notice = Notice()  # that the layer is infeasible
        self.num_features = checks.check_positive("num_features", num_features)
        self.group_size = checks.check_positive("group_size", group_size)
        self.eps = checks.check_eps(eps)
        self.relative_eps = relative_eps
        if momentum is not None:
            momentum = checks.check_momentum(momentum, ", or None for the plain average")
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.method = method
        self._solver, self._shift = regularized_solver(method, iterations, self.eps, relative_eps)
        self.track = checks.check_choice("track", track, TRACKED)
        self.on_nonfinite = checks.check_choice("on_nonfinite", on_nonfinite, ON_NONFINITE)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        _register_affine(self, num_features, bias, factory)
        d = min(self.group_size, num_features)
        for name, shape in (("running_mean", (num_features,)), (self._matrices, (-(-num_features // d), d, d))):
            self.register_buffer(name, torch.empty(shape, **factory) if track_running_stats else None)
        count = torch.empty((), dtype=torch.long, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", count)
        self.reset_parameters()

    @property
    def iterations(self) -> int | None:
        """Steps of the iterative methods; None for "eigh"."""
        return getattr(self._solver, "iterations", None)

    @property
    def _matrices(self) -> str:
        """Name of the buffer of what is tracked beside the mean."""
        return f"running_{self.track}"

    def reset_running_stats(self) -> None:
        """Forget the running averages: mean 0, whitener or covariance the identity."""
        averages = self._averages()
        with torch.no_grad():
            if averages is not None:
                mean, matrices = averages
                mean.zero_()
                matrices.copy_(torch.eye(matrices.shape[-1], device=matrices.device))
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, and no running averages."""
        self.reset_running_stats()
        _reset_affine(self)

    def forward(self, x: Tensor) -> Tensor:
        """Whiten x, shape (N, num_features, ...): by its batch in training, else by the running averages."""
        _check_input(x, self.num_features, "num_features")
        averages = self._averages()
        if averages is not None and not self.training:
            return self._frozen(x, *averages)
        if x.numel() == 0:
            return _whiten_nothing(self, x)
        checks.check_batch(x, 1)
        _take_notice(self, batch_objection, self.group_size, self.num_features, x.numel() // self.num_features)
        updates = self.training and self.track_running_stats
        running = self._running(averages) if updates else None
        spec = WhiteningSpec(ChannelGroups(1, self.group_size), self._solver, self._shift)
        if not updates:
            return BACKEND.whiten(spec, x, self.weight, self.bias)
        y = None if running is None else BACKEND.whiten_and_average(spec, x, self.weight, self.bias, running)
        if y is None:
            y, stats = BACKEND.whiten_with_statistics(spec, x, self.weight, self.bias)
            self._update(stats, averages)
        return y

    def _averages(self) -> tuple[Tensor, Tensor] | None:
        """The running averages; None where a user has set both to None, or there have never been any."""
        mean, matrices = self.running_mean, getattr(self, self._matrices)
        if mean is not None and matrices is not None:
            return mean, matrices
        if mean is not None or matrices is not None:
            missing, other = ("running_mean", self._matrices)[:: 1 if mean is None else -1]
            raise ValueError(f"{missing} is None and {other} isn't: set both to None to whiten every batch by itself")
        return None

    def _running(self, averages: tuple[Tensor, Tensor] | None) -> RunningAverages | None:
        """Return the averages for kernels that update them, or None where an error is to be raised for a bad batch.

        Such kernels leave it out of the averages without telling the host.
        """
        if averages is None or self.on_nonfinite != "skip":
            return None
        return RunningAverages(*averages, self.num_batches_tracked, self.momentum, self.track == "covariance")

    def _frozen(self, x: Tensor, mean: Tensor, whitener: Tensor) -> Tensor:
        affine = self.weight, self.bias
        mean, whitener = (BACKEND.snapshot(each, x, *affine) for each in (mean, whitener))
        if self.track == "covariance":
            full = BACKEND.kernels.to_accumulation_dtype(whitener)
            whitener = whitener_of(BACKEND.kernels_for(full), full, self.num_features, self._solver, self._shift)
        return BACKEND.apply_frozen(1, x, mean, whitener, *affine)

    @torch.no_grad()
    def _update(self, stats: WhiteningStats, averages: tuple[Tensor, Tensor] | None) -> None:
        batch = stats.mean, getattr(stats, self.track)
        others = () if self.track == "whitener" else (stats.whitener,)
        # without averages batches are counted all the same
        given: tuple[Any, Any, Any] = ((), (), batch + others) if averages is None else (averages, batch, others)
        finite = update_averages(*given, self.num_batches_tracked, self.momentum)
        if self.on_nonfinite == "raise" and not finite:
            raise ValueError(
                "x has NaN or infinity, or values too large for its dtype or for that of the running averages "
                "(on_nonfinite='raise')"
            )

    def extra_repr(self) -> str:
        """Arguments, as `repr` shows them."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}, "
            f"group_size={self.group_size}, method={self.method!r}, iterations={self.iterations}, "
            f"relative_eps={self.relative_eps}, track={self.track!r}"
        )


class GroupWhitening(LeafModule):
    r"""Group whitening: whitens groups of channels against each other, within every sample.

    In place of `torch.nn.GroupNorm`, with its arguments in their order. Training and evaluation are the same:

    .. math:: Y = \Sigma^{-1/2} (X - \mu) \cdot \gamma + \beta, \quad
              \Sigma = \tfrac{1}{M} (X - \mu)(X - \mu)^T + \epsilon I

    for every sample as a matrix X (num_groups, M).

    Parameters
    ----------
    num_groups : int
        g, the size of the covariance matrix; divides num_channels.
    num_channels : int
        C, the channels of the input (N, C, ...).
    eps : float
        Added to the diagonal of the covariance, so in units of the squared input.
    affine : bool
        Whether to learn a weight and a bias for every channel.
    bias : bool
        Whether an affine layer has a bias beside its weight.
    method : {"newton", "eigh", "minimax"}
        As for `polywhiten.iter_norm`.
    iterations : int, optional
        Steps of "newton" and "minimax", 5 by default; "eigh" has none.
    relative_eps : bool
        Whether eps is a fraction of each sample's mean variance instead, as for `polywhiten.iter_norm`.
    device, dtype
        Of the parameters.

    Attributes
    ----------
    weight, bias : Parameter, shape (C,), or None

    Raises
    ------
    ValueError
        An argument or an input doesn't fit; one value a group and sample.
    TypeError
        An input that isn't floating point.

    Warns
    -----
    polywhiten.analysis.InfeasibleWarning
        In training, where a sample has fewer values, channels times positions, than whitening so many groups takes.
        Once for a network, as that of `IterNorm`. Not in compiled code.

    Notes
    -----
    Statistics are computed in float32 for half precision, under autocast too; the output has the input's dtype and
    memory format. "eigh" is exported to ONNX as by `IterNorm`.

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

    weight: nn.Parameter | None
    bias: nn.Parameter | None

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._notice = Notice()  # that the layer is infeasible
        self.num_channels = checks.check_positive("num_channels", num_channels)
        self.num_groups = checks.check_num_groups(num_groups, num_channels)
        self.eps = checks.check_eps(eps)
        self.relative_eps = relative_eps
        self.affine = affine
        self.method = method
        self._solver, self._shift = regularized_solver(method, iterations, self.eps, relative_eps)
        _register_affine(self, num_channels, bias, {"device": device, "dtype": dtype})
        self.reset_parameters()

    @property
    def iterations(self) -> int | None:
        """Steps of the iterative methods; None for "eigh"."""
        return getattr(self._solver, "iterations", None)

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        _reset_affine(self)

    def forward(self, x: Tensor) -> Tensor:
        """Whiten every sample of x, shape (N, num_channels, ...)."""
        _check_input(x, self.num_channels, "num_channels")
        if x.numel() == 0:
            return _whiten_nothing(self, x)
        num_groups = checks.check_sample_groups(x, self.num_groups, 1)
        spec = WhiteningSpec(SampleGroups(1, num_groups), self._solver, self._shift)
        y = BACKEND.whiten(spec, x, self.weight, self.bias)
        _take_notice(self, sample_objection, self.num_groups, self.num_channels, math.prod(x.shape[1:]))
        return y

    def extra_repr(self) -> str:
        """Arguments, as `repr` shows them."""
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, "
            f"bias={self.bias is not None}, method={self.method!r}, iterations={self.iterations}, "
            f"relative_eps={self.relative_eps}"
        )


def _check_input(x: Tensor, channels: int, name: str) -> None:
    if not isinstance(x, Tensor):
        if isinstance(x, Proxy):
            raise TypeError(
                "x is a torch.fx.Proxy: torch.fx records a whitening layer as one call by the module that has it; "
                "trace that module, or torch.nn.Sequential(layer)"
            )
        raise TypeError(f"x is a {type(x).__module__}.{type(x).__qualname__}: pass a tensor, as torch.as_tensor(x)")
    checks.check_channels(x, channels, name)
    checks.check_array(BACKEND.kernels.xp, x)


def _whiten_nothing(layer: IterNorm | GroupWhitening, x: Tensor) -> Tensor:
    y: Tensor = whiten_nothing(BACKEND, x, layer.weight, layer.bias, 1)
    return y


def _take_notice(layer: IterNorm | GroupWhitening, objection: Callable[..., str | None], *sizes: Any) -> None:
    """In training; compiled code has no place for it, nor tracers' symbols."""
    if layer.training and not torch.compiler.is_compiling() and type(sizes[-1]) is int:
        layer._notice.run(_FRAMEWORK, layer, objection(*sizes))


def _layers_in_training(network: nn.Module) -> dict[str, nn.Module]:
    return {
        f"{name} ({type(module).__name__})" if name else type(module).__name__: module
        for name, module in network.named_modules()
        if isinstance(module, IterNorm | GroupWhitening) and module.training
    }


_FRAMEWORK = Framework(nn.Module, lambda network: type(network).__name__, _layers_in_training)


def _register_affine(layer: IterNorm | GroupWhitening, channels: int, bias: bool, factory: dict[str, Any]) -> None:
    for name, wanted in (("weight", layer.affine), ("bias", layer.affine and bias)):
        layer.register_parameter(name, nn.Parameter(torch.empty(channels, **factory)) if wanted else None)


def _reset_affine(layer: IterNorm | GroupWhitening) -> None:
    if layer.weight is not None:
        nn.init.ones_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
