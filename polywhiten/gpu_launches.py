"""How many kernels a layer launches on a GPU: the switch between the two structures that they can have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from polywhiten import checks

VARIABLE = "POLYWHITEN_GPU_LAUNCHES"
SEPARATE = "separate"  # one kernel for each step of the algorithm
JOINED = "joined"  # the program that is the last to finish one step goes on with the next, so there are fewer launches
CHOICES = (SEPARATE, JOINED)
DEFAULT = SEPARATE  # the one that has run on a device

_preferred: str | None = None


def gpu_launches() -> str:
    """Return the structure in use, "separate" or "joined"; raise ValueError if the environment asks for another."""
    return _preferred or _wanted()


@cache  # a look into the environment takes as long as a tenth of a small layer
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
