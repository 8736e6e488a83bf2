"""Connect to a cluster of Dask, with errors of one line."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any

TIMEOUT_SECONDS = 10


class ClusterError(RuntimeError):
    """A cluster can't be reached, or can't finish its work. The message is one line that says what would help."""


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Yield a `distributed.Client` of a scheduler, on which Dask computes inside this `with` statement.

    Parameters
    ----------
    address : str
        That of the scheduler, such as "tcp://10.0.0.1:8786".

    Raises
    ------
    ClusterError
        `distributed` isn't installed, no scheduler answers, it has no workers, or it or too many workers end before
        the statement does.
    """
    try:
        from distributed import Client, KilledWorker
        from distributed.comm.addressing import get_address_host_port
        from distributed.comm.core import CommClosedError
    except ModuleNotFoundError as error:
        raise ClusterError('no cluster without distributed: pip install "polywhiten[distributed]"') from error
    try:
        get_address_host_port(address, strict=True)  # Client raises this too, but leaves its event loop broken
        client = Client(address, timeout=TIMEOUT_SECONDS)
    except ValueError as error:
        raise ClusterError(f"{address} isn't the address of a scheduler, such as tcp://10.0.0.1:8786") from error
    except OSError as error:  # TimeoutError too
        raise ClusterError(
            f"no scheduler answers at {address}: start one by `dask scheduler`, and workers by `dask worker ADDRESS`"
        ) from error
    with client:
        if not client.nthreads():
            raise ClusterError(f"the scheduler at {address} has no workers: start them by `dask worker {address}`")
        try:
            yield client
        except KilledWorker as error:
            raise ClusterError(
                f"{error.allowed_failures + 1} workers ended while they computed the same piece: give workers more "
                "memory (--memory-limit of `dask worker`), or fewer threads"
            ) from error
        except (CancelledError, CommClosedError) as error:
            raise ClusterError(f"the scheduler at {address} has ended: start it, and the command, again") from error
