"""The former place of `polywhiten.feasibility`, with the functions' former names."""

import warnings

from polywhiten.feasibility import *  # noqa: F403
from polywhiten.feasibility import is_feasible as feasible  # noqa: F401
from polywhiten.feasibility import max_num_groups as most_groups  # noqa: F401
from polywhiten.feasibility import min_batch_size as least_batch_size  # noqa: F401

warnings.warn(f"{__name__} is deprecated: use polywhiten.analysis", DeprecationWarning, stacklevel=2)
