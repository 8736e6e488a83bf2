"""Which group size, or how many groups, an input's shape allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from polywhiten.blocks import divisors
from polywhiten.checks import check_choice, check_integer, check_positive
from polywhiten.feasibility import constraint_number, largest_group_size, max_num_groups

_WHITENING = ("batch_whitening", "group_whitening")
_SINGLE = {"group_size": "batch", "num_groups": "layer"}  # the normalization that a value of 1 amounts to

_GROUP_SIZE = 64  # the paper's
_NUM_GROUPS = 32  # the layers' default
# Samples per channel that is whitened. With 8, channels that are truly white have by chance a covariance of condition
# number 4.4, ((1 + 8^(-1/2)) / (1 - 8^(-1/2)))^2; with 2 it is 34.
_SAMPLES_PER_CHANNEL = 8


@dataclass(frozen=True)
class Recommendation:
    """A value for a layer's argument.

    Attributes
    ----------
    argument : str
        "group_size" of `IterNorm`, or "num_groups" of `GroupWhitening`, which some frameworks call "groups".
    value : int
        The recommended value.
    bound : int
        The largest feasible value, whether or not the layer accepts it.
    share : float
        Number of equations that the value demands, divided by the number of outputs.
    reason : str
        Which limit was decisive, in words.
    """

    argument: str
    value: int
    bound: int
    share: float
    reason: str

    def __str__(self) -> str:
        return f"{self.argument}={self.value}: {self.reason}"


def recommend(shape: Sequence[int], kind: str = "batch_whitening", *, axis: int = 1) -> Recommendation:
    """Recommend a group size for batch whitening, or a number of groups for group whitening.

    It is the largest divisor of the number of channels that

    - for "batch_whitening" (`IterNorm`) exceeds neither the paper's 64 nor an eighth of the samples, batch size times
      positions: the covariance of fewer samples is mostly noise. If the largest such divisor is less than half of the
      limit, the largest power of two is recommended instead, and the last group is smaller.
    - for "group_whitening" is at most 32, as the cost grows with the groups, and demands no more equations than half
      of a sample's values, channels times positions.

    The eighth and the half are this library's rules of thumb. Both stay well within the bounds of `is_feasible`, which
    say what is too much, but not what is good.

    Parameters
    ----------
    shape : sequence of int
        Shape of a layer's input in training, with the batch size.
    kind : {"batch_whitening", "group_whitening"}
        The layer to recommend a value for.
    axis : int
        The channel axis.

    Raises
    ------
    ValueError
        The shape leaves a single sample per channel or a single value per sample, or an argument doesn't fit.

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
    check_choice("kind", kind, _WHITENING)
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
    described, enough = f"{samples} samples, batch size times positions", samples // _SAMPLES_PER_CHANNEL
    by_samples = (enough, f"an eighth of the {described}") if enough else (1, f"as there are only {described}")
    limit, why = _smallest((channels, "all channels"), (_GROUP_SIZE, "the paper's size"), by_samples)
    value = _largest_divisor(channels, limit)
    if 2 * value < limit:
        value = 1 << (limit.bit_length() - 1)
    share = constraint_number("batch_whitening", channels, samples, group_size=value) / (channels * samples)
    bound = min(largest_group_size(samples), channels)
    return _recommendation("group_size", value, channels, limit, why, bound, share)


def _num_groups(channels: int, values: int, shape: tuple[int, ...]) -> Recommendation:
    if values < 2:
        raise ValueError(f"shape={shape} gives 1 value a sample, which has no variance: more channels are needed")
    described, half = f"{values} values, channels times positions", values // 2
    by_values = (1, f"as a sample has only {described}")
    if half > 1:
        room = max_num_groups("group_whitening", half)
        by_values = (room, f"for no more equations than half of a sample's {described}")
    default = _NUM_GROUPS, "the layer's default, as the cost grows with it"
    limit, why = _smallest((channels, "all channels"), default, by_values)
    value = _largest_divisor(channels, limit)
    share = constraint_number("group_whitening", values, num_groups=value) / values
    bound = min(max_num_groups("group_whitening", values), channels)
    return _recommendation("num_groups", value, channels, limit, why, bound, share)


def _smallest(*limits: tuple[int, str]) -> tuple[int, str]:
    return min(limits, key=lambda limit: limit[0])


def _largest_divisor(channels: int, limit: int) -> int:
    return max(divisor for divisor in divisors(channels) if divisor <= limit)


def _recommendation(
    argument: str, value: int, channels: int, limit: int, why: str, bound: int, share: float
) -> Recommendation:
    if channels % value:
        why = f"the largest power of two up to {limit}, {why}; the last group is smaller"
    elif value < limit:
        why = f"the largest divisor of {channels} channels up to {limit}, {why}"
    if value == 1:
        why = f"{why}; this is {_SINGLE[argument]} normalization"
    reason = f"{why}. Up to {bound} would be feasible; the equations take {share:.1%} of the outputs."
    return Recommendation(argument, value, bound, share, reason)
