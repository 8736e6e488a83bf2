"""Dask: the functions of `polywhiten` on lazy arrays; nothing is computed before Dask is asked to."""

import polywhiten
from polywhiten import *  # noqa: F403
from polywhiten.dask.backend import BACKEND

__all__ = ["BACKEND"]
__all__ += polywhiten.__all__
