"""A tensor in pieces along its first axis that stay in the cache.

What is computed from a piece, its centred copy say, is read again while it is there. And memory of large tensors goes
back to the system when they are freed: a centred copy of the whole costs more in page faults than in arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

_BYTES = 2**21
PARTS = 8  # of a piece's rows


def pieces(x: Tensor) -> Iterator[slice]:
    """Slices of axis 0, all but the last of the same length: a multiple of PARTS, where it is not less."""
    step = max(1, _BYTES // (math.prod(x.shape[1:]) * x.element_size()))
    step -= step % PARTS if step > PARTS else 0
    for start in range(0, len(x), step):
        yield slice(start, min(start + step, len(x)))
