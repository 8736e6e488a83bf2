"""What whitening does to a network: the papers' measures, for arrays of every library.

Arguments that don't fit raise TypeError or ValueError, with a message that says what is accepted.
"""

import warnings
from typing import Any

from polywhiten.analysis.conditioning import (
    condition_number,
    correlation,
    covariance,
    mean_correlation,
    spectrum,
    whitening_error,
)
from polywhiten.analysis.convergence import convergence, required_iterations
from polywhiten.analysis.disturbance import Disturbance, sample_batches, stochastic_normalization_disturbance
from polywhiten.analysis.recommendation import Recommendation, recommend
from polywhiten.feasibility import (
    InfeasibleWarning,
    constraint_number,
    is_feasible,
    largest_group_size,
    max_num_groups,
    min_batch_size,
)

__all__ = [
    "Disturbance",
    "InfeasibleWarning",
    "Recommendation",
    "condition_number",
    "constraint_number",
    "convergence",
    "correlation",
    "covariance",
    "is_feasible",
    "largest_group_size",
    "max_num_groups",
    "mean_correlation",
    "min_batch_size",
    "recommend",
    "required_iterations",
    "sample_batches",
    "spectrum",
    "stochastic_normalization_disturbance",
    "whitening_error",
]

_FORMER_NAMES = {"feasible": "is_feasible", "least_batch_size": "min_batch_size", "most_groups": "max_num_groups"}


def __getattr__(name: str) -> Any:
    """Return a function by its former name, with a warning that says the present one."""
    if name not in _FORMER_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    present = _FORMER_NAMES[name]
    warnings.warn(f"{__name__}.{name} is called {present} now", DeprecationWarning, stacklevel=2)
    return globals()[present]
