"""Compares runs, and says whether a claim holds for them."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from study.fitting import Fit
from study.norms import Norm

HELD, PART, NOT_HELD, UNCLEAR, ONE_SEED = "held", "held in part", "not held", "unclear", "one seed"
ERRORS = 2  # a mean difference decides if it is more than this many standard errors away from 0
CHANCE = 0.1  # the accuracy that counts for a run that diverged
POINTS = "{:+.1f} ± {:.1f} points".format


@dataclass(frozen=True)
class Finding:
    """A measurement for a claim, where it was made, and what it says about the claim."""

    claim: str
    where: str  # batch size, norm or data
    measured: str
    verdict: str


def accuracy(run: Fit) -> float:
    """Return the test accuracy after the last epoch, in points."""
    return 100 * (CHANCE if run.diverged else run.test_accuracies[-1])


def train_accuracy(run: Fit) -> float:
    """Return the training accuracy in the last epoch, in points."""
    return 100 * (CHANCE if run.diverged else run.train_accuracies[-1])


def train_loss(run: Fit) -> float:
    """Return the training loss in the last epoch, or the loss of guessing if the run diverged."""
    return -math.log(CHANCE) if run.diverged else run.train_losses[-1]


def lower(mean: float, error: float) -> str:
    return f"loss {'lower' if mean >= 0 else 'higher'} by {abs(mean):.3f} ± {error:.3f}"


def times(mean: float, error: float) -> str:
    """Describe a difference of two logarithms as a factor, with the range of one standard error."""
    return f"{math.exp(mean):.3g} times ({math.exp(mean - error):.3g} to {math.exp(mean + error):.3g})"


def runs(rows: Sequence[Any], norm: Norm, **settings: Any) -> dict[int, Any]:
    """Return the rows of a norm with these settings, by seed."""
    wanted = {name: getattr(norm, name) for name in Norm.__dataclass_fields__} | settings
    return {row.seed: row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())}


def compared(
    claim: str,
    where: str,
    better: dict[int, Any],
    worse: dict[int, Any],
    value: Callable[[Any], float],
    text: Callable[[float, float], str] = POINTS,
) -> Iterator[Finding]:
    """Yield a finding on whether `better` has larger values than `worse`: their mean difference, its error, a verdict.

    The difference is taken seed by seed, because runs of one seed have the same initial weights and the same batches.
    One seed has no error and gives no verdict. Nothing is yielded if no seed is in both.
    """
    differences = [value(better[seed]) - value(worse[seed]) for seed in better.keys() & worse.keys()]
    if not differences:
        return
    if not all(map(math.isfinite, differences)):
        yield Finding(claim, where, "infinite condition numbers", UNCLEAR)
        return
    mean = float(np.mean(differences))
    if len(differences) == 1:
        yield Finding(claim, where, text(mean, 0.0).replace(" ± 0.000", "").replace(" ± 0.0", ""), ONE_SEED)
        return
    error = float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    verdict = HELD if mean > ERRORS * error else NOT_HELD if mean < -ERRORS * error else UNCLEAR
    yield Finding(claim, where, text(mean, error), verdict)


def verdict_of(findings: Iterable[Finding]) -> str:
    """Return what several findings say about a claim together. Those of one seed count only if there are no others."""
    found = {finding.verdict for finding in findings}
    decided = found - {ONE_SEED} or found
    if len(decided) == 1:
        return decided.pop()
    if HELD in decided or PART in decided:
        return PART
    return NOT_HELD if NOT_HELD in decided else UNCLEAR
