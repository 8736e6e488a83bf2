"""Running averages of a layer."""

import numpy as np

from polywhiten.cpu.arguments import UpdateAveragesArgs, unpack
from polywhiten.cpu.device.device_function import device_function
from polywhiten.cpu.device.pointers import cast, get, put


def update_averages(packed, workspace, part, num_parts):
    """Update a layer's running averages with the statistics of a batch, and count the batch.

    Nothing changes if a statistic that is checked is not finite, or an average would no longer be finite. There is one
    part.
    """
    args = unpack(UpdateAveragesArgs, packed, workspace)
    if not _are_finite(args.checked.values, args.checked.size):
        return
    count = get(args.num_batches, 0)
    factor = 1.0 / (count + 1) if args.momentum < 0.0 else args.momentum
    if _stays_finite(args.mean, factor) and _stays_finite(args.matrices, factor):
        _update(args.mean, factor)
        _update(args.matrices, factor)
        put(args.num_batches, 0, count + 1)


@device_function
def _are_finite(values, size):
    others = 0
    for i in range(size):
        if not abs(get(values, i)) < cast(values, np.inf):
            others += 1
    return others == 0


@device_function
def _stays_finite(average, factor):
    new, old = cast(average.running, factor), cast(average.running, 1.0 - factor)
    others = 0
    for i in range(average.size):
        value = _between(get(average.running, i), get(average.batch, i), factor, new, old)
        if not abs(value) < cast(average.running, np.inf):
            others += 1
    return others == 0


@device_function
def _update(average, factor):
    new, old = cast(average.running, factor), cast(average.running, 1.0 - factor)
    for i in range(average.size):
        put(average.running, i, _between(get(average.running, i), get(average.batch, i), factor, new, old))


@device_function
def _between(running, batch, factor, new, old):
    """Return the weighted mean, computed from the nearer value so that a factor of 1 gives the batch's exactly."""
    return running + new * (batch - running) if factor < 0.5 else batch - old * (batch - running)
