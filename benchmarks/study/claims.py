"""The claims of the two papers' abstracts, and what the study measured about each of them."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np

from polywhiten.analysis import max_num_groups
from study import conditioning, groups, training
from study.disturbance import DATA_LABELS, Disturbance
from study.fitting import Fit, scaled_lr
from study.norms import Norm, bn, dbn, gn, gw, iter_norm

HELD, NOT_HELD, UNCLEAR = "held", "not held", "unclear"
ERRORS = 2  # a mean difference decides if it is more than this many standard errors away from 0
CHANCE = 0.1  # the accuracy that counts for a run that diverged
POINTS = "{:+.1f} ± {:.1f} points".format


@dataclass(frozen=True)
class Finding:
    """A claim with its measurement and its verdict."""

    claim: str
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
    return f"training loss lower by {mean:.3f} ± {error:.3f}"


def times(mean: float, error: float) -> str:
    """Describe a difference of two logarithms as a factor, with the range of one standard error."""
    return f"{math.exp(mean):.3g} times, from {math.exp(mean - error):.3g} to {math.exp(mean + error):.3g}"


def runs(rows: Sequence[Any], norm: Norm, **settings: Any) -> dict[int, Any]:
    """Return the rows of a norm with these settings, by seed."""
    wanted = vars(norm) | settings
    return {row.seed: row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())}


def compared(
    claim: str,
    better: dict[int, Any],
    worse: dict[int, Any],
    value: Callable[[Any], float],
    text: Callable[[float, float], str] = POINTS,
) -> Iterator[Finding]:
    """Yield a finding on whether `better` has larger values than `worse`: their mean difference, its error, a verdict.

    The difference is taken seed by seed, because runs of one seed have the same initial weights and the same batches.
    Nothing is yielded if fewer than two seeds are in both.
    """
    differences = [value(better[seed]) - value(worse[seed]) for seed in better.keys() & worse.keys()]
    if len(differences) < 2:
        return
    if not all(map(math.isfinite, differences)):
        yield Finding(claim, "infinite condition numbers", UNCLEAR)
        return
    mean, error = float(np.mean(differences)), float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    verdict = HELD if mean > ERRORS * error else NOT_HELD if mean < -ERRORS * error else UNCLEAR
    yield Finding(claim, text(mean, error), verdict)


def of_disturbance(rows: list[Disturbance]) -> Iterator[Finding]:
    """Yield findings on how disturbance depends on batch size, group size and the kind of normalization."""
    for data, name in DATA_LABELS.items():
        for whitening, label in (("iternorm", "IterNorm"), ("dbn", "DBN")):
            found = [row for row in rows if row.data == data and row.norm == whitening]
            enough = [row for row in found if row.batch_size >= 2 * row.group_size]
            fewer = [row for row in found if row.batch_size <= 2 * row.group_size]
            for part, where in ((enough, "batches of at least twice the group size"), (fewer, "smaller batches")):
                claim = f"{label}'s disturbance grows with group size: {where}, {name}"
                yield from ordered(claim, part, "group_size", 1)
                claim = f"{label}'s disturbance falls with batch size: {where}, {name}"
                yield from ordered(claim, part, "batch_size", -1)
        everything = [row for row in rows if row.data == data]
        yield from full_is_worst(f"Full whitening by DBN is disturbed most: {name}", everything)
    within = [row.value for row in rows if row.norm in ("gn", "gw")]
    if within:
        verdict = HELD if max(within) == 0 else NOT_HELD
        claim = "GN and GW avoid batch statistics, so they have no disturbance"
        yield Finding(claim, f"at most {max(within):.2g}", verdict)


def ordered(claim: str, rows: list[Disturbance], varied: str, sign: int) -> Iterator[Finding]:
    """Yield a finding on whether the disturbance grows (sign 1) or falls (-1) each time that one setting doubles.

    All other settings are equal in a comparison. Steps within twice their standard error are unclear.
    """
    right = wrong = unclear = 0
    fixed = "batch_size" if varied == "group_size" else "group_size"
    lines: dict[tuple[int, int], list[Disturbance]] = {}
    for row in rows:
        lines.setdefault((getattr(row, fixed), row.seed), []).append(row)
    for line in lines.values():
        line.sort(key=lambda row: getattr(row, varied))
        for one, other in pairwise(line):
            step = sign * (other.value - one.value)
            error = ERRORS * math.hypot(one.standard_error, other.standard_error)
            right, wrong, unclear = right + (step > error), wrong + (step < -error), unclear + (abs(step) <= error)
    total = right + wrong + unclear
    if total:
        verdict = HELD if not wrong and right > unclear else NOT_HELD if wrong > right else "held in part"
        measured = f"right for {right} of {total} doublings, wrong for {wrong}, unclear for {unclear}"
        yield Finding(claim, measured, verdict)


def full_is_worst(claim: str, rows: list[Disturbance]) -> Iterator[Finding]:
    """Yield a finding on the batch sizes at which DBN with all features in one group has the largest disturbance."""
    worst = []
    for batch_size in sorted({row.batch_size for row in rows}):
        alike = [row for row in rows if row.batch_size == batch_size]
        top = max(alike, key=lambda row: row.value)
        worst.append((batch_size, top.norm == "dbn" and top.group_size == top.dimension))
    if worst:
        sizes = ", ".join(str(batch_size) for batch_size, full in worst if full) or "none"
        count = sum(full for _, full in worst)
        verdict = HELD if count == len(worst) else NOT_HELD if not count else "held in part"
        yield Finding(claim, f"right at batch sizes {sizes} of {worst[0][0]} to {worst[-1][0]}", verdict)


def of_conditioning(rows: list[conditioning.Conditioning]) -> Iterator[Finding]:
    """Yield findings on how much better conditioned whitened networks are, averaged over the steps after the first."""

    def log_condition(name: str) -> Callable[[Any], float]:
        return lambda row: -fmean(math.log(value) for value in getattr(row, name)[1:])

    num_groups = rows[0].width // conditioning.GROUP_WIDTH
    pairs = [(iter_norm(0), bn()), (dbn(0), bn()), (gw(num_groups), gn(num_groups))]
    names = {
        "outputs_partial": "normalized outputs",
        "inputs_partial": "layer inputs",
        "gauss_newton_partial": "curvature",
    }
    for whitening, other in pairs:
        for name, what in names.items():
            claim = f"{whitening.label} conditions {what} better than {other.label}"
            yield from compared(claim, runs(rows, whitening), runs(rows, other), log_condition(name), times)


def of_training(rows: list[Fit]) -> Iterator[Finding]:
    """Yield findings on IterNorm against BN and DBN."""
    batch_size, lr = training.BATCH_SIZE, scaled_lr(training.BATCH_SIZE)
    usual = {"batch_size": batch_size, "lr": lr}
    for other in (bn(), dbn(16)):
        claim = f"IterNorm improves over {other.label}"
        for size in training.BATCH_SIZES:
            at = {"batch_size": size, "lr": scaled_lr(size)}
            yield from compared(
                f"{claim}, batch size {size}", runs(rows, iter_norm(), **at), runs(rows, other, **at), accuracy
            )
        high = usual | {"lr": scaled_lr(batch_size, training.HIGH_LR)}
        mine, others = runs(rows, iter_norm(), **high), runs(rows, other, **high)
        yield from compared(f"{claim}, learning rate x {training.HIGH_LR}", mine, others, accuracy)
    for whitening in (iter_norm(), dbn(16)):
        mine, others = runs(rows, whitening, **usual), runs(rows, bn(), **usual)
        yield from compared(
            f"{whitening.label} trains faster than BN", mine, others, lambda run: -train_loss(run), lower
        )
    grouped, full = runs(rows, dbn(16), **usual), runs(rows, dbn(0), **usual)
    yield from compared("Group-wise whitening of DBN outperforms full whitening", grouped, full, accuracy)
    for norm, claim in ((bn(), "BN's accuracy degenerates with small batches"), (dbn(16), "DBN needs large batches")):
        small, large = (runs(rows, norm, batch_size=m, lr=scaled_lr(m)) for m in (training.BATCH_SIZES[0], batch_size))
        yield from compared(f"{claim}: {batch_size} against {training.BATCH_SIZES[0]}", large, small, accuracy)
    few, most = (runs(rows, iter_norm(iterations=t), **usual) for t in (5, training.ITERATIONS[-1]))
    claim = "IterNorm trades optimization for generalization: T = 5 against 9"
    yield from compared(f"{claim}, 9 has the lower training loss", most, few, lambda run: -train_loss(run), lower)
    yield from compared(f"{claim}, 5 has the higher accuracy", few, most, accuracy)
    mine, others = runs(rows, iter_norm(0), **usual), full

    def speed(mean: float, error: float) -> str:
        return f"{times(mean, error)}, as many steps per second"

    claim = "IterNorm is more efficient than DBN, full whitening"
    yield from compared(claim, mine, others, lambda run: -math.log(run.ms_per_step), speed)


def of_groups(rows: list[Fit]) -> Iterator[Finding]:
    """Yield findings on GW against GN and BN by batch size, and on GW on both sides of the feasible bound."""
    number = groups.NUM_GROUPS
    for size in (groups.BATCH_SIZES[0], groups.BATCH_SIZE, groups.BATCH_SIZES[-1]):
        mine = runs(rows, gw(number), batch_size=size)
        for other in (gn(number), bn()):
            others = runs(rows, other, batch_size=size)
            yield from compared(f"GW improves over {other.label}, batch size {size}", mine, others, accuracy)
        others = runs(rows, gn(number), batch_size=size)
        claim = f"Whitening trains faster than GN, batch size {size}: training accuracy"
        yield from compared(claim, mine, others, train_accuracy)
    small, usual = (runs(rows, bn(), batch_size=size) for size in (groups.BATCH_SIZES[0], groups.BATCH_SIZE))
    claim = f"BN's accuracy degenerates with small batches: {groups.BATCH_SIZE} against {groups.BATCH_SIZES[0]}"
    yield from compared(claim, usual, small, accuracy)
    bound = max_num_groups("group_whitening", rows[0].width)
    inside, outside = max(g for g in groups.GROUPS if g <= bound), groups.GROUPS[-1]
    few, many = (runs(rows, gw(g), batch_size=groups.BATCH_SIZE) for g in (inside, outside))
    claim = f"Too many groups (feasible: {bound}) cost capacity, GW with {inside} against {outside}: training accuracy"
    yield from compared(claim, few, many, train_accuracy)


def of_resnet(rows: list[Fit]) -> Iterator[Finding]:
    """Yield findings on residual networks with GW in every block against those with BN alone."""
    mine, others = ({row.seed: row for row in rows if row.norm == norm} for norm in ("gw", "bn"))
    yield from compared("A residual network with GW in its blocks improves over BN's", mine, others, accuracy)
    claim = "A residual network with GW in its blocks trains faster than BN's"
    yield from compared(claim, mine, others, lambda run: -train_loss(run), lower)


FINDINGS: dict[str, Callable[[list[Any]], Iterator[Finding]]] = {
    "disturbance": of_disturbance,
    "conditioning": of_conditioning,
    "training": of_training,
    "groups": of_groups,
    "resnet": of_resnet,
}
