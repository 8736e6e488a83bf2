"""Add up what tasks return, in a tree of tasks."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any

from dask.base import compute, get_scheduler
from dask.callbacks import Callback
from dask.delayed import Delayed, delayed

FAN_IN = 8  # how many results one task adds

Report = Callable[[int], None]


def total(parts: Sequence[Delayed], report: Report | None = None) -> Any:
    """Compute the parts on Dask's current scheduler and return their sum.

    The results are added in a tree of tasks. On a cluster, the scheduler runs an addition where most of its summands
    are, and computes again what is lost with a worker.

    Parameters
    ----------
    parts : sequence of Delayed
        At least one. Their results have an associative and commutative `+`.
    report : callable, optional
        Called once with the index of every part, when it has been computed.
    """
    indices = {part.key: index for index, part in enumerate(parts)}
    client = current_client()
    if client is not None:
        return _total_on_cluster(client, parts, lambda key: None if report is None else report(indices[key]))

    def posttask(key: str, *_: object) -> None:
        if report is not None and key in indices:
            report(indices[key])

    with Callback(posttask=posttask):
        return compute(tree(parts))[0]


def tree(parts: Iterable[Any]) -> Any:
    """Return the lazy sum of Delayed objects, or of futures, of which each task adds at most `FAN_IN`."""
    level, add = list(parts), delayed(_sum, pure=False)
    while len(level) > 1:
        level = [add(*level[i : i + FAN_IN]) for i in range(0, len(level), FAN_IN)]
    return level[0]


def current_client() -> Any:
    """Return the `distributed.Client` that Dask computes with, or None if it computes in this process."""
    return getattr(get_scheduler(), "__self__", None)


def _sum(*parts: Any) -> Any:
    return reduce(operator.add, parts)


def _total_on_cluster(client: Any, parts: Sequence[Delayed], report: Callable[[str], None]) -> Any:
    def completed(future: Any) -> None:
        if future.status == "finished":
            report(future.key)

    # The parts and their sum are one graph: parts of an earlier graph may be lost before their sum is known. While this
    # function holds their futures, workers keep them, so that a sum that is lost needs no part of another worker again.
    result, *futures = client.compute([tree(parts), *parts])
    for future in futures:
        future.add_done_callback(completed)
    return result.result()
