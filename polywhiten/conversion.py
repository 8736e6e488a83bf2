"""What converting a network means in every framework: which layers, with how many groups, and what is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from polywhiten.blocks import divisors
from polywhiten.feasibility import largest_group_size, max_num_groups

Where = Callable[[str, Any], bool] | str | Sequence[str] | None
"""Which layers to convert: a predicate on name and layer, a placement, patterns of names, or None for all."""


class Change(NamedTuple):
    """What became of one layer of a network.

    Attributes
    ----------
    name : str
        Name of the layer in the network.
    before, after : str
        The layer, and what replaced it; `after` is "" if the layer was left as it is.
    note : str
        What there is to know about it, or why the layer was left; often "".
    """

    name: str
    before: str
    after: str
    note: str = ""


class Report(tuple[Change, ...]):
    """What became of the layers of a network, one `Change` each, in the network's order. `str` makes it a table."""

    __slots__ = ()

    @property
    def replaced(self) -> tuple[Change, ...]:
        """The changes of layers that were replaced."""
        return tuple(change for change in self if change.after)

    @property
    def left(self) -> tuple[Change, ...]:
        """The changes of layers that were left as they are."""
        return tuple(change for change in self if not change.after)

    def __str__(self) -> str:
        return "\n".join(_table(["layer", "before", "after", "note"], [(*c[:2], c[2] or "(left)", c[3]) for c in self]))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table, with columns as wide as their longest entry."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, ["-" * width for width in widths], *rows):
        yield "  ".join(entry.ljust(width) for entry, width in zip(row, widths, strict=True)).rstrip()


def select(where: Where, layers: Mapping[str, Any], placements: Mapping[str, Callable[[], Sequence[str]]]) -> list[str]:
    """Return the names of the layers that `where` chooses, in the order of `layers`.

    Parameters
    ----------
    where : callable, str, sequence of str, or None
        None chooses all. A callable gets the name and the layer, and returns whether to choose it. A string is the name
        of a placement, or a pattern in which `*` stands for any characters and `?` for one. Of several patterns, a name
        has to match one.
    layers : mapping
        All layers that could be chosen, by their names.
    placements : mapping
        Functions that return the names that a placement chooses.

    Raises
    ------
    ValueError
        A pattern matches no layer.
    TypeError
        `where` is something else.
    """
    if where is None:
        return [*layers]
    if callable(where) and not isinstance(where, type):
        return [name for name, layer in layers.items() if where(name, layer)]
    if isinstance(where, str) and where in placements:
        return [*placements[where]()]
    patterns = [where] if isinstance(where, str) else where
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            f"where={where!r} is neither None, a pattern of names or a list of patterns, one of the placements "
            f"{', '.join(map(repr, placements))}, nor a function of a layer's name and the layer"
        )
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(
                f"where={pattern!r} matches none of the network's {len(layers)} normalization layers"
                + (f", which are {', '.join(layers)}" if layers else "")
                + f", and is none of the placements {', '.join(placements)}"
            )
    return [name for name in layers if any(fnmatchcase(name, pattern) for pattern in patterns)]


def feasible_group_size(group_size: int, samples: int | None) -> int:
    """Return the largest feasible number of channels to whiten together, up to `group_size`.

    Parameters
    ----------
    group_size : int
    samples : int or None
        Batch size times positions of the layer's input; None where it isn't known, which limits nothing.
    """
    if samples is None:
        return group_size
    return min(group_size, largest_group_size(samples)) if samples > 1 else 1


def feasible_num_groups(kind: str, num_groups: int, channels: int, values: int | None) -> int:
    """Return the feasible number of groups that is nearest to `num_groups`; of two, the smaller one.

    Parameters
    ----------
    kind : {"group_norm", "group_whitening"}
    num_groups, channels : int
        The number of groups has to divide the channels.
    values : int or None
        Channels times positions of the layer's input; None where it isn't known, which limits nothing.
    """
    limit = channels if values is None else max(1, max_num_groups(kind, values) if values > 1 else 1)
    return min((g for g in divisors(channels) if g <= limit), key=lambda g: (abs(g - num_groups), g))
