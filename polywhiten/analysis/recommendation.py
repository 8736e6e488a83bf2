"""Which group size, or how many groups, an input's shape allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from polywhiten.blocks import divisors
from polywhiten.checks import check_choice, check_integer, check_positive
from polywhiten.feasibility import constraint_number, largest_group_size, max_num_groups

SINGLE = {"group_size": "batch", "num_groups": "layer"}  # what 1 makes of whitening
WHITENING = ("batch_whitening", "group_whitening")

GROUP_SIZE = 64  # the paper's
NUM_GROUPS = 32  # the layers' default
# Samples for each of the channels that are whitened together. Channels that are white in truth have, in 8 times as many
# samples, a covariance of condition number 4.4 by chance, ((1 + 8^(-1/2)) / (1 - 8^(-1/2)))^2; in twice as many, 34.
SAMPLES_A_CHANNEL = 8


@dataclass(frozen=True)
class Recommendation:
    """A value for a layer's argument.

    Attributes
    ----------
    argument : str
        "group_size" of `IterNorm` or "num_groups" of `GroupWhitening` ("groups" in Keras).
    value : int
        What is recommended.
    bound : int
        The largest feasible value, whether or not the layer takes it.
    share : float
        Equations that the value demands, over the outputs that there are.
    reason : str
        Which limit decided, in words.
    """

    argument: str
    value: int
    bound: int
    share: float
    reason: str

    def __str__(self) -> str:
        return f"{self.argument}={self.value}: {self.reason}"


def recommend(shape: Sequence[int], kind: str = "batch_whitening", *, axis: int = 1) -> Recommendation:
    """Group size for batch whitening, or number of groups for group whitening, of inputs of a shape.

    Of the divisors of the channels, the largest that

    - for "batch_whitening" (`IterNorm`) is no more than the paper's 64 and than an eighth of the samples, batch size
      times positions, so that the covariance is no mere noise. Where the channels have no such divisor of half that
      size or more, the largest power of two is recommended, and the last group is smaller.
    - for "group_whitening" is no more than 32, as the cost grows with the groups, and demands equations for no more
      than half of a sample's values, channels times positions.

    The eighth and the half are rules of thumb, this library's own; both stay well within the bounds of `is_feasible`,
    which say what is too much, and not what is good.

    Parameters
    ----------
    shape : sequence of int
        Of a layer's input in training, batch size included.
    kind : {"batch_whitening", "group_whitening"}
        What to recommend a value for.
    axis : int
        The channel axis.

    Returns
    -------
    Recommendation

    Raises
    ------
    TypeError, ValueError
        An argument doesn't fit, or the shape leaves a single sample a channel, or value a sample.

    References
    ----------
    Huang et al., Iterative Normalization, CVPR 2019, arXiv:1904.03441; Group Whitening, CVPR 2021, arXiv:2009.13333.

    Examples
    --------
    >>> from polywhiten.analysis import recommend
    >>> print(recommend((32, 256, 14, 14)))
    group_size=64: the paper's size. Up to 256 would be feasible; the equations take 0.5% of the outputs.
    >>> recommend((32, 256)).value, recommend((32, 256), "group_whitening").value
    (4, 8)
    """
    check_choice("kind", kind, WHITENING)
    sizes = tuple(check_positive(f"shape[{i}]", size) for i, size in enumerate(shape))
    axis, rank = check_integer("axis", axis), len(sizes)
    if axis not in range(-rank, rank) or axis % rank == 0:
        raise ValueError(f"axis={axis} holds no channels in shape={sizes}: axis 0 counts the samples")
    channels = sizes[axis]
    if kind == "batch_whitening":
        return _group_size(channels, math.prod(sizes) // channels, sizes)
    return _num_groups(channels, math.prod(sizes) // sizes[0], sizes)


def _group_size(channels: int, samples: int, shape: tuple[int, ...]) -> Recommendation:
    if samples < 2:
        raise ValueError(
            f"shape={shape} gives 1 sample a channel, which has no covariance: use a larger batch, or group whitening"
        )
    enough, given = samples // SAMPLES_A_CHANNEL, f"{samples} samples, batch size times positions"
    limit, why = min(
        (channels, "all channels"),
        (GROUP_SIZE, "the paper's size"),
        (enough, f"an eighth of the {given}") if enough else (1, f"as there are no more than {given}"),
        key=lambda pair: pair[0],
    )
    value = _largest_divisor(channels, limit)
    if 2 * value < limit:
        value = 1 << (limit.bit_length() - 1)
    share = constraint_number("batch_whitening", channels, samples, group_size=value) / (channels * samples)
    return _recommendation("group_size", value, channels, limit, why, min(largest_group_size(samples), channels), share)


def _num_groups(channels: int, values: int, shape: tuple[int, ...]) -> Recommendation:
    if values < 2:
        raise ValueError(f"shape={shape} gives 1 value a sample, which has no variance: more channels are needed")
    half = values // 2
    room = max_num_groups("group_whitening", half) if half > 1 else 0
    given = f"{values} values, channels times positions"
    limit, why = min(
        (channels, "all channels"),
        (NUM_GROUPS, "the layer's default, as the cost grows with it"),
        (room, f"for no more equations than half of a sample's {given}")
        if room
        else (1, f"as a sample has but {given}"),
        key=lambda pair: pair[0],
    )
    value = _largest_divisor(channels, limit)
    share = constraint_number("group_whitening", values, num_groups=value) / values
    bound = min(max_num_groups("group_whitening", values), channels)
    return _recommendation("num_groups", value, channels, limit, why, bound, share)


def _largest_divisor(channels: int, limit: int) -> int:
    return max(divisor for divisor in divisors(channels) if divisor <= limit)


def _recommendation(
    argument: str, value: int, channels: int, limit: int, why: str, bound: int, share: float
) -> Recommendation:
    if channels % value:
        found = f"the largest power of two up to {limit}, {why}; the last group is smaller"
    elif value < limit:
        found = f"the largest divisor of {channels} channels up to {limit}, {why}"
    else:
        found = why
    if value == 1:
        found = f"{found}; this is {SINGLE[argument]} normalization"
    reason = f"{found}. Up to {bound} would be feasible; the equations take {share:.1%} of the outputs."
    return Recommendation(argument, value, bound, share, reason)
