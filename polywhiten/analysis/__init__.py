"""What whitening does to a network: the papers' measures, over the array API."""

from polywhiten.analysis.conditioning import (
    condition_number,
    correlation,
    covariance,
    mean_correlation,
    spectrum,
    whitening_error,
)
from polywhiten.analysis.constraints import (
    constraint_number,
    feasible,
    largest_group_size,
    least_batch_size,
    most_groups,
)
from polywhiten.analysis.disturbance import Disturbance, sample_batches, stochastic_normalization_disturbance

__all__ = [
    "Disturbance",
    "condition_number",
    "constraint_number",
    "correlation",
    "covariance",
    "feasible",
    "largest_group_size",
    "least_batch_size",
    "mean_correlation",
    "most_groups",
    "sample_batches",
    "spectrum",
    "stochastic_normalization_disturbance",
    "whitening_error",
]
