"""How many kernels a layer launches on a GPU: the switch between two structures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from polywhiten import checks

VARIABLE = "POLYWHITEN_GPU_LAUNCHES"
SEPARATE = "separate"  # one kernel per step of the algorithm
JOINED = "joined"  # the last program to finish a step goes on with the next one, which saves launches
CHOICES = (SEPARATE, JOINED)
DEFAULT = SEPARATE  # the one that has run on a GPU

_preferred: str | None = None


def gpu_launches() -> str:
    """Return the structure in use, "separate" or "joined"; raise ValueError if the environment asks for another."""
    return _preferred or _wanted()


@cache  # reading the environment takes a tenth of a small layer's time
def _wanted() -> str:
    return checks.check_choice(VARIABLE, os.environ.get(VARIABLE, DEFAULT), CHOICES)


@contextmanager
def use_gpu_launches(structure: str) -> Iterator[None]:
    """Use this structure inside the `with` statement, in all threads, whatever the environment asks for."""
    global _preferred
    before, _preferred = _preferred, checks.check_choice("structure", structure, CHOICES)
    try:
        yield
    finally:
        _preferred = before
