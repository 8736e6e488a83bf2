"""Add up what tasks return, so that as little as possible goes over the network, or has to be computed twice."""

from __future__ import annotations

import operator
from collections import defaultdict
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

    Local schedulers add the results in a tree of tasks. On a cluster every worker first adds up what it has computed
    itself, and a tree adds the sums of the workers. Only these go over the network then, and a worker that is lost
    takes nothing with it that depends on another worker's parts.

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
    from distributed import as_completed

    completed = as_completed(client.compute(list(parts)), loop=client.loop)
    try:
        sums = _sums_of_workers(client, completed, report)
        return client.compute(tree(sums)).result()
    except BaseException:
        client.cancel(list(completed.futures))
        raise


def _sums_of_workers(client: Any, completed: Any, report: Callable[[str], None]) -> list[Any]:
    """Return futures of one sum for each worker, of the parts that this worker has computed."""
    waiting: dict[str, list[Any]] = defaultdict(list)

    def add_up(worker: str) -> None:
        # a higher priority than the parts' own frees memory before more is read; any worker may repeat what was lost
        options = {"workers": worker, "allow_other_workers": True, "priority": 1, "pure": False}
        waiting[worker] = [client.submit(_sum, *waiting[worker], **options)]

    for batch in completed.batches():
        places = client.who_has(batch)
        for future in batch:
            if future.status in ("error", "cancelled"):
                future.result()  # raises what the task has raised, or that the scheduler is gone
            if not places[future.key]:  # its worker was lost: it is being computed again
                completed.add(future)
                continue
            worker = places[future.key][0]
            waiting[worker].append(future)
            report(future.key)
            if len(waiting[worker]) == FAN_IN:
                add_up(worker)
    for worker, futures in waiting.items():
        if len(futures) > 1:
            add_up(worker)
    return [future for (future,) in waiting.values()]
