"""The claims of the two papers' abstracts, and what the study measured about each of them."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import fmean
from typing import Any

from polywhiten.analysis import max_num_groups
from study import conditioning, groups, resnet, training
from study.disturbance import DATA_LABELS, Disturbance, positions_of
from study.findings import (
    ERRORS,
    HELD,
    NOT_HELD,
    PART,
    UNCLEAR,
    Finding,
    accuracy,
    compared,
    lower,
    runs,
    times,
    train_accuracy,
    train_loss,
)
from study.fitting import Fit, scaled_lr
from study.norms import Norm, bn, dbn, gn, gw, iter_norm
from study.steps import Steps

FLAT_POINTS = 2.0  # an accuracy that varies by less over the batch sizes doesn't depend on them
SMALL_BATCHES = "BN's accuracy degenerates with small batches"
GW_OVER_GN, GW_FASTER, GW_OVER_BN = "GW improves over GN", "GW trains faster than GN", "GW improves over BN"
EFFICIENT = "IterNorm takes less time than DBN"


def of_disturbance(rows: list[Disturbance], size: str) -> Iterator[Finding]:
    """Yield findings on how disturbance depends on batch size, group size, T and the kind of normalization."""
    for data, name in DATA_LABELS.items():
        mine = [row for row in rows if row.data == data]
        grouped = [row for row in mine if row.network is not None or row.group_size]
        for whitening, label in (("iternorm", "IterNorm"), ("dbn", "DBN")):
            found = [row for row in grouped if row.norm == whitening and row.iterations in (None, 5)]
            enough = [row for row in found if vectors_of(row) >= 2 * group_of(row)]
            yield from ordered(f"{label}'s disturbance grows with group size", name, enough, group_of, 1)
            yield from ordered(f"{label}'s disturbance falls with batch size", name, enough, batch_of, -1)
        whole = [row for row in mine if row.norm == "iternorm" and row.group_size == 0]
        yield from ordered("IterNorm's disturbance grows with T", name, whole, iterations_of, 1)
        yield from full_is_worst(name, [row for row in grouped if row.network is None])
    within = [row.value for row in rows if row.norm in ("gn", "gw")]
    if within:
        verdict = HELD if max(within) == 0 else NOT_HELD
        yield Finding("GN and GW have no disturbance", "all data", f"at most {max(within):.2g}", verdict)


def group_of(row: Disturbance) -> int:
    return row.group_size or row.dimension


def vectors_of(row: Disturbance) -> int:
    """Return how many vectors a batch has, one for each position of its images."""
    return row.batch_size * math.prod(positions_of(row.network, row.layer))


def batch_of(row: Disturbance) -> int:
    return row.batch_size


def iterations_of(row: Disturbance) -> int:
    return row.iterations or 0


def ordered(
    claim: str, where: str, rows: list[Disturbance], varied: Callable[[Disturbance], int], sign: int
) -> Iterator[Finding]:
    """Yield a finding on whether the disturbance grows (sign 1) or falls (-1) from each value of a setting to the next.

    All other settings are equal in a comparison. Differences within twice their standard error are unclear.
    """
    right = wrong = unclear = 0
    lines: dict[tuple[Any, ...], list[Disturbance]] = {}
    for row in rows:
        others = {group_of: group_of(row), batch_of: batch_of(row), iterations_of: iterations_of(row)}
        del others[varied]
        lines.setdefault((row.dimension, row.layer, row.seed, *others.values()), []).append(row)
    for line in lines.values():
        for one, other in pairwise(sorted(line, key=varied)):
            step = sign * (other.value - one.value)
            error = ERRORS * math.hypot(one.standard_error, other.standard_error)
            right, wrong, unclear = right + (step > error), wrong + (step < -error), unclear + (abs(step) <= error)
    total = right + wrong + unclear
    if total:
        verdict = HELD if not wrong and right > unclear else NOT_HELD if wrong > right else PART
        yield Finding(claim, where, f"right for {right} of {total} steps, wrong for {wrong}", verdict)


def full_is_worst(where: str, rows: list[Disturbance]) -> Iterator[Finding]:
    """Yield a finding on the batch sizes at which DBN with all features in one group has the largest disturbance."""
    worst = []
    for batch_size in sorted({row.batch_size for row in rows}):
        alike = [row for row in rows if row.batch_size == batch_size]
        top = max(alike, key=lambda row: row.value)
        worst.append((batch_size, top.norm == "dbn" and top.group_size == top.dimension))
    if worst:
        sizes = ", ".join(str(batch_size) for batch_size, full in worst if full) or "none"
        count = sum(full for _, full in worst)
        verdict = HELD if count == len(worst) else NOT_HELD if not count else PART
        measured = f"right at batch sizes {sizes} of {worst[0][0]} to {worst[-1][0]}"
        yield Finding("Full whitening by DBN is disturbed most", where, measured, verdict)


def of_conditioning(rows: list[conditioning.Conditioning], size: str) -> Iterator[Finding]:
    """Yield findings on how much better conditioned whitened networks are, averaged over the steps after the first."""

    def log_condition(name: str) -> Callable[[Any], float]:
        return lambda row: -fmean(math.log(value) for value in getattr(row, name)[1:])

    num_groups = rows[0].width // conditioning.GROUP_WIDTH
    names = {"outputs_partial": "outputs", "inputs_partial": "layer inputs", "gauss_newton_partial": "curvature"}
    for whitening, other in ((iter_norm(0), bn()), (dbn(0), bn()), (gw(num_groups), gn(num_groups))):
        claim = f"Networks with {whitening.label} are better conditioned than with {other.label}"
        for name, what in names.items():
            yield from compared(claim, what, runs(rows, whitening), runs(rows, other), log_condition(name), times)


def of_training(rows: list[Fit], size: str) -> Iterator[Finding]:
    """Yield findings on IterNorm against BN and DBN, on T, and on GW against GN and BN."""
    plan = training.SIZES[size]
    usual = {"batch_size": plan.batch_size, "lr": scaled_lr(plan.batch_size)}
    high = usual | {"lr": scaled_lr(plan.batch_size, training.HIGH_LR)}
    places = {f"batch {m}": {"batch_size": m, "lr": scaled_lr(m)} for m in sorted({plan.batch_size, *plan.batch_sizes})}
    places |= {f"rate x {training.HIGH_LR}": high}
    grouped, (gn_, gw_) = dbn(16), (next((n for n in plan.compared if n.norm == k), None) for k in ("gn", "gw"))
    pairs: list[tuple[str, Norm | None, Norm | None]] = [
        ("IterNorm improves over BN", iter_norm(), bn()),
        ("IterNorm improves over DBN", iter_norm(), grouped),
        (GW_OVER_GN, gw_, gn_),
        (GW_OVER_BN, gw_, bn()),
    ]
    for claim, better, worse in pairs:
        for where, at in places.items() if better and worse else ():
            yield from compared(claim, f"VGG, {where}", runs(rows, better, **at), runs(rows, worse, **at), accuracy)
    faster = [("Whitening trains faster than BN", w, bn(), w.label) for w in (iter_norm(), grouped)]
    faster += [(GW_FASTER, gw_, gn_, "VGG")] if gw_ and gn_ else []
    for claim, better, worse, where in faster:
        mine, others = runs(rows, better, **usual), runs(rows, worse, **usual)
        yield from compared(claim, where, mine, others, lambda run: -train_loss(run), lower)
    mine, others = runs(rows, grouped, **usual), runs(rows, dbn(0), **usual)
    yield from compared("DBN in groups outperforms full whitening", "groups of 16", mine, others, accuracy)
    smallest = min([plan.batch_size, *plan.batch_sizes])
    for norm, claim in ((bn(), SMALL_BATCHES), (grouped, "DBN needs large batches")):
        small, large = (runs(rows, norm, batch_size=m, lr=scaled_lr(m)) for m in (smallest, plan.batch_size))
        if smallest < plan.batch_size:
            yield from compared(claim, f"VGG, {plan.batch_size} against {smallest}", large, small, accuracy)
    yield from of_iterations(rows, usual)
    mine, others = runs(rows, iter_norm(0), **usual), runs(rows, dbn(0), **usual)
    if size == "small":  # the times of larger sizes are in of_steps
        yield from compared(EFFICIENT, "full whitening", mine, others, lambda run: -math.log(run.ms_per_step), times)


def of_iterations(rows: list[Fit], usual: dict[str, Any]) -> Iterator[Finding]:
    """Yield findings on T = 5 against the largest T that was measured."""
    most = max((row.iterations for row in rows if row.norm == "iternorm" and row.group_size == 64), default=5)
    few, many = (runs(rows, iter_norm(iterations=t), **usual) for t in (5, most))
    if most > 5:
        claim = "More of Newton's iterations train faster"
        yield from compared(claim, f"T = {most} against 5", many, few, lambda run: -train_loss(run), lower)
        claim = "Fewer of Newton's iterations generalize better"
        yield from compared(claim, f"T = 5 against {most}", few, many, accuracy)


def of_groups(rows: list[Fit], size: str) -> Iterator[Finding]:
    """Yield findings on GW against GN and BN by batch size, and on GW on both sides of the feasible bound."""
    plan = groups.SIZES[size]
    number, name = plan.num_groups, "perceptron" if plan.fixed["network"] == "mlp" else "VGG"
    smallest, largest = min(plan.batch_sizes), max(plan.batch_sizes)
    usual = groups.BATCH_SIZE
    for batch_size in (smallest, usual, largest):
        where = f"{name}, batch {batch_size}"
        mine, gns, bns = (runs(rows, norm, batch_size=batch_size) for norm in (gw(number), gn(number), bn()))
        yield from compared(GW_OVER_GN, where, mine, gns, accuracy)
        yield from compared(GW_OVER_BN, where, mine, bns, accuracy)
        yield from compared(GW_FASTER, f"{where}, training accuracy", mine, gns, train_accuracy)
    small, large = (runs(rows, bn(), batch_size=m) for m in (smallest, usual))
    yield from compared(SMALL_BATCHES, f"{name}, {usual} against {smallest}", large, small, accuracy)
    for norm in (gn(number), gw(number)):
        by_batch = [runs(rows, norm, batch_size=m).values() for m in plan.batch_sizes]
        means = [fmean(map(accuracy, found)) for found in by_batch if found]
        if len(means) > 1:
            measured = f"{min(means):.1f} to {max(means):.1f} %"
            verdict = HELD if max(means) - min(means) < FLAT_POINTS else NOT_HELD
            yield Finding(
                "GN's and GW's accuracy doesn't depend on the batch size", f"{name}, {norm.label}", measured, verdict
            )
    if plan.groups:
        bound = max_num_groups("group_whitening", rows[0].width)
        inside, outside = max(g for g in plan.groups if g <= bound), max(plan.groups)
        few, many = (runs(rows, gw(g), batch_size=usual) for g in (inside, outside))
        where = f"perceptron, {inside} against {outside} groups, of which {bound} are feasible, training accuracy"
        yield from compared("Too many groups cost capacity", where, few, many, train_accuracy)


def of_resnet(rows: list[Fit], size: str) -> Iterator[Finding]:
    """Yield findings on residual networks with whitening at the papers' places against those with BN alone."""

    def placed(norm: Norm, where: str) -> dict[int, Any]:
        return runs(rows, norm, where=where)

    others, gws = placed(*resnet.BN), placed(*resnet.GW)
    yield from compared("A residual network with GW in its blocks improves over BN's", "", gws, others, accuracy)
    claim = "A residual network with GW in its blocks trains faster than BN's"
    yield from compared(claim, "", gws, others, lambda run: -train_loss(run), lower)
    for norm, where in (resnet.ITER_NORM_FIRST, resnet.ITER_NORM):
        claim = "A residual network with IterNorm improves over BN's"
        names = {"first": "the first norm", "all": "all norms"}
        yield from compared(claim, names[where], placed(norm, where), others, accuracy)


def of_steps(rows: list[Steps], size: str) -> Iterator[Finding]:
    """Yield findings on the time of a step; seeds don't matter, so the quartiles decide."""
    for one in (row for row in rows if row.norm == "iternorm" and row.iterations == 5):
        for other in (r for r in rows if r.norm == "dbn" and r.group_size == one.group_size):
            if (one.network, one.batch_size) == (other.network, other.batch_size):
                factor = other.median_ms / one.median_ms
                error = (one.iqr_ms + other.iqr_ms) / one.median_ms
                verdict = HELD if factor > 1 + error else NOT_HELD if factor < 1 - error else UNCLEAR
                where = f"groups of {one.group_size or 'all'}, batch {one.batch_size}"
                yield Finding(EFFICIENT, where, f"DBN's step takes {factor:.2f} times as long", verdict)


FINDINGS: dict[str, Callable[[list[Any], str], Iterator[Finding]]] = {
    "disturbance": of_disturbance,
    "conditioning": of_conditioning,
    "training": of_training,
    "groups": of_groups,
    "resnet": of_resnet,
    "steps": of_steps,
}
