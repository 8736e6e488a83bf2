"""How many equations a normalization demands of its outputs, and when these are more than the outputs.

Group whitening's paper (Huang et al., CVPR 2021, arXiv:2009.13333, section 4) reads a normalization as a system of
equations that its outputs solve. A block of d variables and m samples has d equations for means of 0, d more for
variances of 1, or d (d + 1) / 2 for a white covariance. If there are more equations than outputs, they can't all hold,
and the network loses what it could represent.
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
    """Issued once per network if layers demand more equations than they have outputs.

    `warnings.filterwarnings("ignore", category=InfeasibleWarning)` turns it off, and "error" turns it into an error.

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
    """Count the independent equations that a normalization of a data set demands.

    With d features, N samples in batches of m, and g groups, there are d N outputs, and the number of equations is

    ===================  ====================
    batch_norm           2 d N / m
    batch_whitening      d (d + 3) / 2 N / m
    group_norm           2 g N
    group_whitening      g (g + 3) / 2 N
    ===================  ====================

    Batch whitening in groups is counted group by group, with a last group that may be smaller.

    Parameters
    ----------
    kind : {"batch_norm", "batch_whitening", "group_norm", "group_whitening"}
        "batch_whitening" is IterNorm and decorrelated batch normalization.
    num_features : int
        d. For feature maps it is the number of channels for "batch_norm" and "batch_whitening", and the channels times
        the positions for the other two.
    batch_size : int, optional
        m, needed for "batch_norm" and "batch_whitening" alone. For feature maps it is the batch size times the
        positions.
    num_groups : int, optional
        g, needed for "group_norm" and "group_whitening" alone.
    group_size : int, optional
        Number of features that "batch_whitening" whitens together, all by default; not for other kinds.
    num_samples : int, optional
        N, counted as `batch_size` is, or else the number of samples. By default one batch, or one sample.

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
    d, size = _check_arguments(kind, num_features, batch_size, num_groups, group_size)
    n = (batch_size or 1) if num_samples is None else check_positive("num_samples", num_samples)
    if num_groups is not None:
        return float(_equations(kind, num_groups) * n)
    full_groups, rest = divmod(d, size)
    assert batch_size is not None  # as checked
    return (full_groups * _equations(kind, size) + _equations(kind, rest)) * n / batch_size


def is_feasible(
    kind: str,
    num_features: int,
    batch_size: int | None = None,
    num_groups: int | None = None,
    group_size: int | None = None,
) -> bool:
    """Return whether a normalization demands no more equations than it has outputs.

    That is so if

    ===================  ============================
    batch_norm           m >= 2
    batch_whitening      m >= (d + 3) / 2
    group_norm           g <= d / 2
    group_whitening      g <= (sqrt(8 d + 9) - 3) / 2
    ===================  ============================

    where d is the group size for batch whitening in groups.

    Parameters
    ----------
    kind, num_features, batch_size, num_groups, group_size
        As for `constraint_number`.

    See Also
    --------
    min_batch_size, largest_group_size, max_num_groups : The values at the bounds.

    Notes
    -----
    For whitening the bounds are necessary, but not sufficient: the covariance of m samples has rank m - 1 at most, so
    exact whitening of d features needs m > d as well. `recommend` stays well away from both.

    Examples
    --------
    >>> from polywhiten.analysis import is_feasible
    >>> is_feasible("batch_whitening", 256, batch_size=64)
    False
    >>> is_feasible("batch_whitening", 256, batch_size=64, group_size=32)
    True
    """
    d, size = _check_arguments(kind, num_features, batch_size, num_groups, group_size)
    if num_groups is not None:
        return _equations(kind, num_groups) <= d
    assert batch_size is not None  # as checked
    return _equations(kind, size) <= size * batch_size


def min_batch_size(kind: str, num_features: int) -> int:
    """Return the smallest batch size for which a normalization over batches is feasible.

    Parameters
    ----------
    kind : {"batch_norm", "batch_whitening"}
    num_features : int
        d, the number of features that are whitened together.

    Returns
    -------
    int
        2, or (d + 3) / 2 rounded up. For feature maps it is the batch size times the positions.

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
    """Return the largest number of features that batch whitening can feasibly whiten together.

    Parameters
    ----------
    batch_size : int
        m, 2 or more. For feature maps it is the batch size times the positions.

    Returns
    -------
    int
        2 m - 3.

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
    """Return the largest number of groups for which a normalization within samples is feasible.

    Parameters
    ----------
    kind : {"group_norm", "group_whitening"}
    num_features : int
        d, 2 or more. For feature maps it is the channels times the positions.

    Returns
    -------
    int
        d / 2 or (sqrt(8 d + 9) - 3) / 2, rounded down. The layers need a divisor of the channels.

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
    """Return what is infeasible in whitening groups of channels over so many samples and positions, or None."""
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
    """Return what is infeasible in whitening groups of channels within samples of so many values, or None."""
    largest = max_num_groups("group_whitening", values)
    if num_groups <= largest:
        return None
    return (
        f"{name}={num_groups} is infeasible: samples of d = {values} values, channels times positions, have room for "
        f"g <= (sqrt(8 d + 9) - 3) / 2 = {(math.sqrt(8 * values + 9) - 3) / 2:.1f} groups; "
        f"use {name}={max(g for g in divisors(channels) if g <= largest)}"
    )


def _equations(kind: str, variables: int) -> int:
    """Count the equations of a sample or batch with so many groups or features."""
    return 2 * variables if kind in ("batch_norm", "group_norm") else variables * (variables + 3) // 2


def _check_arguments(
    kind: str, num_features: int, batch_size: int | None, num_groups: int | None, group_size: int | None
) -> tuple[int, int]:
    """Return d and the number of features that are whitened together."""
    check_choice("kind", kind, KINDS)
    d = check_positive("num_features", num_features)
    needed = "batch_size" if kind in OVER_BATCHES else "num_groups"
    for name, value in (("batch_size", batch_size), ("num_groups", num_groups), ("group_size", group_size)):
        if value is None:
            if name == needed:
                raise ValueError(f"{name}=None: kind={kind!r} needs it")
        elif name == needed or (name == "group_size" and kind == "batch_whitening"):
            check_positive(name, value)
        else:
            raise ValueError(f"{name}={value!r} has no meaning for kind={kind!r}: leave it out")
    if num_groups is not None and num_groups > d:
        raise ValueError(f"num_groups={num_groups} is more than num_features={d}: use fewer groups")
    return d, min(group_size or d, d)
