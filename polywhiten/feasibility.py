"""What a normalization demands of its outputs, counted in equations, and when these are more than the outputs.

Group whitening's paper (Huang et al., CVPR 2021, arXiv:2009.13333, section 4) reads a normalization as a system of
equations that its outputs solve. A block of d variables and m samples has d equations for means of 0 and, for
variances of 1, d more; whitening has d (d + 1) / 2 for the covariance. Where there are more equations than outputs,
they can't all hold, and what the network can represent is lost first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

from polywhiten.blocks import divisors
from polywhiten.checks import check_choice, check_positive

OVER_BATCHES = ("batch_norm", "batch_whitening")
WITHIN_SAMPLES = ("group_norm", "group_whitening")
KINDS = (*OVER_BATCHES, *WITHIN_SAMPLES)


class InfeasibleWarning(UserWarning):
    """Layers' configurations demand more equations than they have outputs; a network says so once.

    To turn it off, or into an error: `warnings.filterwarnings("ignore", category=InfeasibleWarning)`, or "error".

    Parameters
    ----------
    message : str
        With the first of the layers, and their number.
    layers : mapping, optional
        As the attribute.

    Attributes
    ----------
    layers : dict of str to str
        What is infeasible, by the layers' names.
    """

    def __init__(self, message: str, layers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.layers = dict(layers or {})


def constraint_number(
    kind: str,
    num_features: int,
    batch_size: int | None = None,
    num_groups: int | None = None,
    group_size: int | None = None,
    num_samples: int | None = None,
) -> float:
    """Independent equations that a normalization of a whole data set demands.

    With d features, N samples in batches of m, and g groups, they are, out of d N outputs,

    ===================  ====================
    batch_norm           2 d N / m
    batch_whitening      d (d + 3) / 2 N / m
    group_norm           2 g N
    group_whitening      g (g + 3) / 2 N
    ===================  ====================

    Batch whitening of groups of features is counted group by group, the smaller last one as it is.

    Parameters
    ----------
    kind : {"batch_norm", "batch_whitening", "group_norm", "group_whitening"}
        "batch_whitening" is IterNorm and decorrelated batch normalization.
    num_features : int
        d. For feature maps, the channels where statistics are taken over the batch; where they are taken within a
        sample, the channels times the positions.
    batch_size : int, optional
        m, needed over batches. Every position of a feature map is a sample: the batch size times the positions.
    num_groups : int, optional
        g, needed within samples; without a meaning over batches.
    group_size : int, optional
        Features whitened together by "batch_whitening", all by default; without a meaning elsewhere.
    num_samples : int, optional
        N; for feature maps over batches, times the positions as the batch size is. By default one batch, or where
        statistics are taken within a sample, one sample.

    Returns
    -------
    float

    Raises
    ------
    TypeError, ValueError
        An argument doesn't fit, is missing, or has no meaning for the kind.

    References
    ----------
    Huang et al., Group Whitening, CVPR 2021, arXiv:2009.13333, section 4.

    Examples
    --------
    >>> from polywhiten.analysis import constraint_number
    >>> constraint_number("batch_whitening", 64, batch_size=256, num_samples=50_000)  # of 3.2 million outputs
    418750.0
    >>> constraint_number("group_whitening", 64 * 14 * 14, num_groups=32)  # of one sample's 12544 outputs
    560.0
    """
    d, m, g, size = _checked(kind, num_features, batch_size, num_groups, group_size)
    n = (m or 1) if num_samples is None else check_positive("num_samples", num_samples)
    if g is not None:
        return float(_equations(kind, g) * n)
    whole, rest = divmod(d, size)
    assert m is not None  # as checked
    return (whole * _equations(kind, size) + _equations(kind, rest)) * n / m


def is_feasible(
    kind: str,
    num_features: int,
    batch_size: int | None = None,
    num_groups: int | None = None,
    group_size: int | None = None,
) -> bool:
    """Whether a normalization demands no more equations than it has outputs.

    ===================  ============================
    batch_norm           m >= 2
    batch_whitening      m >= (d + 3) / 2
    group_norm           g <= d / 2
    group_whitening      g <= (sqrt(8 d + 9) - 3) / 2
    ===================  ============================

    where d is the group size for batch whitening of groups of features.

    Parameters
    ----------
    kind, num_features, batch_size, num_groups, group_size
        As for `constraint_number`.

    Returns
    -------
    bool

    Raises
    ------
    TypeError, ValueError
        As by `constraint_number`.

    See Also
    --------
    min_batch_size, largest_group_size, max_num_groups : The values at the bounds.

    Notes
    -----
    The bounds are necessary, and for whitening not sufficient: the covariance of m samples has rank m - 1 at most, so
    that exact whitening of d features needs m > d as well. `recommend` keeps well away from both.

    Examples
    --------
    >>> from polywhiten.analysis import is_feasible
    >>> is_feasible("batch_whitening", 256, batch_size=64)
    False
    >>> is_feasible("batch_whitening", 256, batch_size=64, group_size=32)
    True
    """
    d, m, g, size = _checked(kind, num_features, batch_size, num_groups, group_size)
    if g is not None:
        return _equations(kind, g) <= d
    assert m is not None  # as checked
    return _equations(kind, size) <= size * m


def min_batch_size(kind: str, num_features: int) -> int:
    """The smallest batch, positions of feature maps counted, that a normalization over batches is feasible for.

    Parameters
    ----------
    kind : {"batch_norm", "batch_whitening"}
    num_features : int
        Features that are whitened together.

    Returns
    -------
    int
        2, or (d + 3) / 2 rounded up.

    Raises
    ------
    TypeError, ValueError
        An argument doesn't fit.

    Examples
    --------
    >>> from polywhiten.analysis import min_batch_size
    >>> min_batch_size("batch_whitening", 64)
    34
    """
    check_choice("kind", kind, OVER_BATCHES)
    d = check_positive("num_features", num_features)
    return -(-_equations(kind, d) // d)


def largest_group_size(batch_size: int) -> int:
    """The most features that batch whitening can feasibly whiten together, 2 m - 3.

    Parameters
    ----------
    batch_size : int
        m, 2 or more; positions of feature maps counted.

    Returns
    -------
    int

    Raises
    ------
    TypeError, ValueError
        The batch size is no integer of 2 or more.

    Examples
    --------
    >>> from polywhiten.analysis import largest_group_size
    >>> largest_group_size(32)
    61
    """
    m = check_positive("batch_size", batch_size)
    if m < 2:
        raise ValueError("batch_size=1 has no covariance: at least 2 samples are needed")
    return 2 * m - 3


def max_num_groups(kind: str, num_features: int) -> int:
    """The largest number of groups that a normalization within a sample is feasible for.

    Parameters
    ----------
    kind : {"group_norm", "group_whitening"}
    num_features : int
        d, 2 or more: of feature maps, the channels times the positions.

    Returns
    -------
    int
        d / 2 or (sqrt(8 d + 9) - 3) / 2, rounded down. The layers need a divisor of the channels.

    Raises
    ------
    TypeError, ValueError
        An argument doesn't fit.

    Examples
    --------
    >>> from polywhiten.analysis import max_num_groups
    >>> max_num_groups("group_norm", 256), max_num_groups("group_whitening", 256)
    (128, 21)
    """
    check_choice("kind", kind, WITHIN_SAMPLES)
    d = check_positive("num_features", num_features)
    if d < 2:
        raise ValueError("num_features=1 has no variance within a sample: at least 2 are needed")
    return d // 2 if kind == "group_norm" else (math.isqrt(8 * d + 9) - 3) // 2


@lru_cache  # layers ask in every step
def batch_objection(group_size: int, channels: int, samples: int) -> str | None:
    """What is infeasible in whitening groups of channels over so many samples and positions; None where nothing is."""
    d = min(group_size, channels)
    if samples == 0 or is_feasible("batch_whitening", d, samples):
        return None
    fewer = f"group_size={largest_group_size(samples)} or less, or " if samples > 1 else ""
    return (
        f"group_size={group_size} is infeasible: whitening {d} channels together takes m >= (d + 3) / 2 = "
        f"{(d + 3) / 2:g} samples, batch size times positions, and there are {samples}; use {fewer}a larger batch"
    )


@lru_cache
def sample_objection(num_groups: int, channels: int, values: int, name: str = "num_groups") -> str | None:
    """What is infeasible in whitening groups of so many values a sample; None where nothing is."""
    most = max_num_groups("group_whitening", values)
    if num_groups <= most:
        return None
    return (
        f"{name}={num_groups} is infeasible: samples of d = {values} values, channels times positions, have room for "
        f"g <= (sqrt(8 d + 9) - 3) / 2 = {(math.sqrt(8 * values + 9) - 3) / 2:.1f} groups; "
        f"use {name}={max(g for g in divisors(channels) if g <= most)}"
    )


def _equations(kind: str, variables: int) -> int:
    """Of one block: a batch, or one group of features in it; or a sample."""
    if kind in ("batch_norm", "group_norm"):
        return 2 * variables
    return variables * (variables + 3) // 2


def _checked(
    kind: str, num_features: int, batch_size: int | None, num_groups: int | None, group_size: int | None
) -> tuple[int, int | None, int | None, int]:
    """D, m, g, and the number of features that are whitened together."""
    check_choice("kind", kind, KINDS)
    d = check_positive("num_features", num_features)
    given = {"batch_size": batch_size, "num_groups": num_groups, "group_size": group_size}
    needed = "batch_size" if kind in OVER_BATCHES else "num_groups"
    for name, value in given.items():
        if value is None:
            if name == needed:
                raise ValueError(f"{name}=None: kind={kind!r} needs it")
        elif name == needed or (name == "group_size" and kind == "batch_whitening"):
            check_positive(name, value)
        else:
            raise ValueError(f"{name}={value!r} has no meaning for kind={kind!r}: leave it out")
    if num_groups is not None and num_groups > d:
        raise ValueError(f"num_groups={num_groups} is more than num_features={d}: use fewer groups")
    return d, batch_size, num_groups, min(group_size or d, d)
