"""The former place of `polywhiten.analysis`'s functions about feasibility, with their former names."""

import warnings

from polywhiten.feasibility import InfeasibleWarning, constraint_number, largest_group_size
from polywhiten.feasibility import is_feasible as feasible
from polywhiten.feasibility import max_num_groups as most_groups
from polywhiten.feasibility import min_batch_size as least_batch_size

__all__ = [
    "InfeasibleWarning",
    "constraint_number",
    "feasible",
    "largest_group_size",
    "least_batch_size",
    "most_groups",
]

warnings.warn(f"{__name__} is deprecated: use polywhiten.analysis", DeprecationWarning, stacklevel=2)
