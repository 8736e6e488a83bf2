"""Set the running averages of a network to the exact statistics of a data set."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from polywhiten import checks
from polywhiten.blocks import ChannelGroups
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import whitener_of
from polywhiten.torch._internals import BatchNorm
from polywhiten.torch.backend import BACKEND
from polywhiten.torch.kernels import on_device_of
from polywhiten.torch.masks import check_mask
from polywhiten.torch.modules import IterNorm
from polywhiten.torch.networks.streaming_moments import StreamingMoments
from polywhiten.torch.shuffling import statistics_in_order


@torch.no_grad()
def update_stats(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    device: torch.device | str | int | None = None,
    progress: bool = False,
) -> None:
    """Set the running averages of a network's normalization layers to the exact statistics of a data set.

    Call it after training, or for an average of weights, which was never trained itself. For `IterNorm` and batch
    normalization together, it is what `torch.optim.swa_utils.update_bn` is for batch normalization.

    Parameters
    ----------
    model : Module
        The network, for example a `torch.optim.swa_utils.AveragedModel`.
    loader : iterable
        Yields batches: an input of `model`, or a tuple or list whose first entry is the input. It is passed once.
    device : torch.device, str or int, optional
        Where to move the inputs; by default they are used where they are.
    progress : bool
        Whether to show a progress bar on the terminal, which needs the package `rich`.

    Raises
    ------
    TypeError
        `model` isn't a module, or `loader` isn't iterable.
    ValueError
        The loader yields nothing, or a layer's averages would not be finite in their own dtype. A layer with
        `on_nonfinite="raise"` got NaN or infinity.
    ModuleNotFoundError
        `progress` is True, and `rich` isn't installed.

    Warns
    -----
    UserWarning
        The model has no layer to update. Or layers left batches out that aren't finite, or got no samples and keep
        their averages.

    Notes
    -----
    The whole network runs in training mode, as with `update_bn`, so each layer sees activations that were normalized by
    the statistics of their own batch, and dropout is active. Each `IterNorm` gets the mean and the covariance of all
    samples in all batches, whatever the batches' sizes, and the whitener of this covariance. An average of the batches'
    whiteners, as training takes it, is different: it depends on the batch size. `num_batches_tracked` becomes the
    number of the layer's calls, which is that of batches for a layer that is called once a pass.

    Batch normalization gets what `update_bn` gives it, the plain average over batches. Layers without running averages,
    and layers that `freeze_stats` has frozen, stay as they are. Modes and momenta are restored at the end. After an
    error, all running averages are restored too.

    If the layer has `track="whitener"`, an evaluation now whitens by the whitener of the data set's covariance. With an
    iterative method this is as far from exact whitening as the iteration is.

    Positions that a mask leaves out don't count. Layers with `shuffle=True` get the statistics of adjacent channels.
    Compiled models run without compilation here. Under `torch.distributed`, a layer with a `process_group` gets the
    statistics of all its processes' loaders, which have to yield equally many batches. Other layers have those of their
    own process' loader.

    Examples
    --------
    >>> import torch
    >>> from torch.optim.swa_utils import AveragedModel
    >>> from polywhiten.torch import IterNorm, update_stats
    >>> model = torch.nn.Sequential(IterNorm(8, method="eigh"), torch.nn.ReLU())
    >>> averaged = AveragedModel(model)
    >>> data = torch.randn(100, 8)
    >>> update_stats(averaged, data.split(40))
    >>> y = averaged.eval().module[0](data)
    >>> torch.allclose(y.T @ y / 100, torch.eye(8), atol=1e-3)
    True
    """
    if not isinstance(model, nn.Module):
        raise checks.wrong_type(model, "model", "a torch.nn.Module")
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise checks.wrong_type(loader, "loader", "a torch.utils.data.DataLoader, or another iterable of batches")
    batches = _with_progress(loader) if progress else loader
    with _training_mode(model):
        whitening = {
            name or type(layer).__name__: layer
            for name, layer in model.named_modules()
            if isinstance(layer, IterNorm) and layer.training and layer._averages() is not None
        }
        batch_norms = [layer for layer in model.modules() if isinstance(layer, BatchNorm) and layer.training]
        if not whitening and not batch_norms:
            warnings.warn(
                "nothing to update: the model has neither batch normalization nor an IterNorm with running averages "
                "that aren't frozen",
                stacklevel=3,  # the first frame is that of torch.no_grad
            )
            return
        with _averaging_plainly(batch_norms), _measuring(whitening) as moments:
            empty = True
            for batch in batches:
                empty = False
                x = batch[0] if isinstance(batch, (list, tuple)) else batch
                model(x if device is None else x.to(device))
            if empty:
                raise ValueError("loader yields no batches: an iterator that was used before has none left")
            averages = {name: _averages_of(name, layer, moments[name]) for name, layer in whitening.items()}
    for name, layer in whitening.items():
        _set_averages(layer, moments[name], *averages[name])
    _warn_of_batches(moments)


@contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    """Put a network into training mode, without compilation, and every module back into its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code might not call the hooks
            model.train()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _averaging_plainly(batch_norms: list[Any]) -> Iterator[None]:
    """Let batch normalization take plain averages of the next batches; they are as before after an error."""
    before = [(layer.momentum, [buffer.clone() for buffer in layer.buffers()]) for layer in batch_norms]
    try:
        for layer in batch_norms:
            layer.reset_running_stats()
            layer.momentum = None
        yield
    except BaseException:
        for layer, (_, buffers) in zip(batch_norms, before, strict=True):
            for buffer, old in zip(layer.buffers(), buffers, strict=True):
                buffer.copy_(old)
        raise
    finally:
        for layer, (momentum, _) in zip(batch_norms, before, strict=True):
            layer.momentum = momentum


@contextmanager
def _measuring(layers: dict[str, IterNorm]) -> Iterator[dict[str, StreamingMoments]]:
    """Measure the inputs of layers, which don't update their running averages meanwhile."""
    moments, handles = {}, []
    tracking = [(layer, layer.track_running_stats) for layer in layers.values()]
    try:
        for name, layer in layers.items():
            averages = layer._averages()
            assert averages is not None, "only layers with running averages"
            moments[name] = StreamingMoments(*averages)
            layer.track_running_stats = False
            handles.append(layer.register_forward_pre_hook(_measurement(name, moments[name]), with_kwargs=True))
        yield moments
    finally:
        for handle in handles:
            handle.remove()
        for layer, tracks in tracking:
            layer.track_running_stats = tracks


def _measurement(name: str, moments: StreamingMoments) -> Any:
    """Return the hook that adds a layer's input to its moments."""

    def hook(layer: IterNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["x"]
        mask: Tensor | None = args[1] if len(args) > 1 else kwargs.get("mask")
        axis = layer._check_input(x)
        if mask is not None:
            check_mask(mask, x, axis)
        all_reduce = layer._sum_over_processes
        if all_reduce is not None and all_reduce.number == 1:
            all_reduce = None
        if x.numel() == 0 and all_reduce is None:
            return
        spec = WhiteningSpec(ChannelGroups(axis, layer.group_size), layer._solver, layer._shift, all_reduce)
        with on_device_of(x):
            stats, count = statistics_in_order(spec, x, mask)
        if count is None:
            count = x.new_full((), x.numel() // layer.num_features, dtype=moments.count.dtype)
            if all_reduce is not None:
                count = all_reduce(count)
        finite = moments.add(count, *stats)
        if layer.on_nonfinite == "raise" and not finite:
            raise ValueError(
                f"the input of layer {name!r} has NaN or infinity, or values too large for its dtype "
                "(on_nonfinite='raise')"
            )

    return hook


def _averages_of(name: str, layer: IterNorm, moments: StreamingMoments) -> tuple[Tensor, Tensor]:
    """Return the running mean and matrices that a layer has to get, in their own dtypes."""
    current = layer._averages()
    assert current is not None, "only layers with running averages"
    if moments.count == 0:
        return current
    covariance = moments.covariance.to(BACKEND.kernels.accumulation_dtype(current[1].dtype))
    with on_device_of(covariance):
        kernels = BACKEND.kernels_for(covariance)
        whitener: Tensor = whitener_of(kernels, covariance, layer.num_features, layer._solver, layer._shift)
    mean, matrices = moments.mean.to(current[0]), (whitener if layer.track == "whitener" else covariance).to(current[1])
    if not all(torch.isfinite(values).all() for values in (mean, matrices, whitener)):
        raise ValueError(
            f"the averages of layer {name!r} would not be finite in {matrices.dtype}: use a larger dtype, or a larger "
            f"eps, which is {layer.eps}, if its covariance is singular"
        )
    return mean, matrices


def _set_averages(layer: IterNorm, moments: StreamingMoments, mean: Tensor, matrices: Tensor) -> None:
    """Set a layer's running averages and its number of batches, unless it got no samples."""
    current = layer._averages()
    if current is None or moments.count == 0:
        return
    for running, new in zip(current, (mean, matrices), strict=True):
        running.copy_(new)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.copy_(moments.batches)


def _warn_of_batches(moments: dict[str, StreamingMoments]) -> None:
    """Warn of layers that left batches out because they aren't finite, and of layers that got no samples at all."""
    left_out = {name: int(each.left_out) for name, each in moments.items() if each.left_out}
    if left_out:
        listed = ", ".join(
            f"{name!r} ({number} of {number + int(moments[name].batches)})" for name, number in left_out.items()
        )
        warnings.warn(
            f"batches with NaN or infinity, or too large for their dtype, were left out by layers {listed}",
            stacklevel=4,  # the caller of update_stats and of torch.no_grad
        )
    unused = ", ".join(repr(name) for name, each in moments.items() if each.count == 0)
    if unused:
        warnings.warn(f"these layers got no samples, and keep their running averages: {unused}", stacklevel=4)


def _with_progress(loader: Iterable[Any]) -> Iterable[Any]:
    """Return the loader's batches, with a progress bar on the terminal."""
    if find_spec("rich") is None:
        raise ModuleNotFoundError(
            "progress=True needs the package rich: pip install 'polywhiten[cli]', or pass progress=False", name="rich"
        )
    from rich.console import Console
    from rich.progress import track

    quiet = not sys.stderr.isatty()
    return track(loader, "update_stats", console=Console(stderr=True, quiet=quiet), transient=True, disable=quiet)
