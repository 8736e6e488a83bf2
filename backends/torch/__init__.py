"""PyTorch: layers, what whole networks need, and the functions of `polywhiten` as differentiable operations."""

import polywhiten
from polywhiten import *  # noqa: F403
from polywhiten.torch.backend import BACKEND
from polywhiten.torch.linear_export import UnitLength, linear
from polywhiten.torch.modules import GroupWhitening, IterNorm
from polywhiten.torch.networks.convert import convert
from polywhiten.torch.networks.convert_sync import convert_sync
from polywhiten.torch.networks.fold import fold
from polywhiten.torch.networks.freeze_stats import freeze_stats
from polywhiten.torch.networks.update_stats import update_stats
from polywhiten.torch.processes import all_reduce
from polywhiten.torch.tracking import track

__all__ = ["BACKEND", "GroupWhitening", "IterNorm", "UnitLength", "all_reduce", "convert", "convert_sync", "fold"]
__all__ += ["freeze_stats", "linear", "track", "update_stats"]
__all__ += polywhiten.__all__
