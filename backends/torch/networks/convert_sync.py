"""Let the layers of a network share statistics between processes."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import nn

from polywhiten import checks
from polywhiten.torch.modules import IterNorm
from polywhiten.torch.processes import WORLD

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def convert_sync(model: nn.Module, process_group: ProcessGroup | str | None = None) -> nn.Module:
    """Let the IterNorm layers of a network share statistics in training, as `SyncBatchNorm.convert_sync_batchnorm`.

    Parameters
    ----------
    model : Module
        The network, which is changed in place.
    process_group : ProcessGroup or "world", optional
        Processes that share a batch. The default is "world", the default group at the time of a call, so
        `init_process_group` may be called later.

    Returns
    -------
    Module
        The model.

    Raises
    ------
    TypeError
        The model isn't a module, or `process_group` isn't a group.
    ValueError
        This process isn't in `process_group`.

    Warns
    -----
    UserWarning
        The model has no IterNorm layer.

    Notes
    -----
    This sets `layer.process_group`; set it to None to undo that. The layers stay the same objects, so optimizers and
    hooks keep working. Batch normalization layers are left as they are, because
    `SyncBatchNorm.convert_sync_batchnorm` converts them, to a layer that trains on GPUs alone. `GroupWhitening` has
    nothing to share, as it whitens within samples.

    Examples
    --------
    >>> from torch import nn
    >>> from polywhiten.torch import IterNorm, convert_sync
    >>> network = convert_sync(nn.Sequential(nn.Conv2d(3, 64, 3), IterNorm(64), nn.ReLU()))
    >>> network[1].process_group
    'world'
    """
    if not isinstance(model, nn.Module):
        raise checks.wrong_type(model, "model", "a torch.nn.Module")
    layers = [module for module in model.modules() if isinstance(module, IterNorm)]
    if not layers:
        warnings.warn(f"{type(model).__name__} has no IterNorm layer, so nothing is shared", stacklevel=2)
    for layer in layers:
        layer.process_group = WORLD if process_group is None else process_group
    return model
