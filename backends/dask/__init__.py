"""Dask: the functions of `polywhiten` on lazy arrays, and whitening of files on a cluster's workers."""

import polywhiten
from polywhiten import *  # noqa: F403
from polywhiten.dask.backend import BACKEND
from polywhiten.dask.cluster import ClusterError, connected
from polywhiten.dask.files import fit_files, transform_files

__all__ = ["BACKEND", "ClusterError", "connected", "fit_files", "transform_files"]
__all__ += polywhiten.__all__
