"""Checkpoints of other layers, converted for those of this library.

These formats are known. A layer has C channels in groups of d, and its entries in a checkpoint are:

- For the layers of the papers' authors, `weight` and `bias` of shape (1, C), (1, C, 1, 1) or (1, C, 1, 1, 1), and

  - `running_mean` (groups, d, 1) and `running_wm` (groups, d, d),
  - or the entries of each group, the last of which may be smaller: `iterNorm_Groups.0.running_mean` (d, 1) and
    `iterNorm_Groups.0.running_wm` (d, d), or `running_projection` of `DBN_Groups.0` or `DBNSigma_Groups.0`,
  - or `running_mean` (d, 1) and `running_projection` (d, d), which all groups share.

- For batch normalization, `weight`, `bias`, `running_mean` and `running_var`, all of shape (C,).

The authors' matrices multiply a column of channels from the left. They are averages either of whiteners or of
covariances to which eps has been added. Only the names `DBN_Groups` and `DBNSigma_Groups` tell which of the two.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polywhiten.statistics import TRACKED

Entries = Mapping[str, Any]

_EXACT = ("eigh", "minimax")
_METHODS = {"running_wm": "newton", "running_projection": "eigh"}  # by which the authors' layers whiten
_COLLECTIONS = {  # of layers for single groups: the name of their matrix, and what it is an average of
    "iterNorm_Groups": ("running_wm", None),
    "DBN_Groups": ("running_projection", "whitener"),
    "DBNSigma_Groups": ("running_projection", "covariance"),
}
_OF_GROUP = re.compile(rf"({'|'.join(_COLLECTIONS)})\.(\d+)\.(running_\w+)")


class AveragesWanted(NamedTuple):
    """What decides about the running averages of a layer: the arguments of `IterNorm` with these names."""

    num_features: int
    group_size: int
    track: str
    method: str
    eps: float
    relative_eps: bool

    @property
    def sizes(self) -> list[int]:
        """The number of channels of each group."""
        return _sizes(self.num_features, self.group_size)


class GroupAverages(NamedTuple):
    """Running averages of a layer of the authors.

    Attributes
    ----------
    mean : Tensor, shape (C,), or None
    matrices : sequence of Tensor, shapes (d, d)
        One for each group.
    track : str or None
        Of what the matrices are averages, "whitener" or "covariance"; None if the checkpoint doesn't tell.
    method : str
        How the authors' layer computes a whitener, in the terms of `IterNorm`.
    """

    mean: Tensor | None
    matrices: Sequence[Tensor]
    track: str | None
    method: str


def flatten_affine(entries: Entries) -> dict[str, Any]:
    """Return the entries of a layer, with `weight` and `bias` of shape (1, C, 1, 1) and the like as (C,)."""
    flat = dict(entries)
    for name in ("weight", "bias"):
        value = flat.get(name)
        if isinstance(value, Tensor) and value.ndim > 1 and value.numel() == value.shape[1]:
            flat[name] = value.detach().reshape(-1)
    return flat


def convert_averages(entries: Entries, wanted: AveragesWanted) -> dict[str, Any]:
    """Return the entries of a layer, with running averages as `IterNorm` has them.

    Averages in no known format are returned as they are.

    Raises
    ------
    ValueError
        The averages are for other channels or groups than the layer has, or of another matrix.
    """
    if any(f"running_{matrix}" in entries for matrix in TRACKED):
        _check_own(entries, wanted)
        return dict(entries)
    if isinstance(entries.get("running_var"), Tensor):
        mean, matrices = entries.get("running_mean"), _from_variances(entries["running_var"], wanted)
    elif (groups := _read_shared(entries, wanted) or _read_separate(entries)) is not None:
        mean, matrices = groups.mean, _from_groups(groups, wanted)
    else:
        return dict(entries)
    read = {"running_mean", "running_var", *_METHODS}
    others = {name: value for name, value in entries.items() if name not in read and not _OF_GROUP.fullmatch(name)}
    averages = {f"running_{wanted.track}": matrices} | ({} if mean is None else {"running_mean": mean})
    return {"num_batches_tracked": matrices.new_zeros((), dtype=torch.long), **others, **averages}


def _check_own(entries: Entries, wanted: AveragesWanted) -> None:
    """Raise an error if averages in this library's own format are of another matrix or for other groups."""
    track = next(matrix for matrix in TRACKED if f"running_{matrix}" in entries)
    _check_track(track, wanted)
    mean, matrices = entries.get("running_mean"), entries[f"running_{track}"]
    if isinstance(mean, Tensor) and isinstance(matrices, Tensor) and mean.ndim == 1 and matrices.ndim == 3:
        _check_sizes(_sizes(len(mean), matrices.shape[-1]), wanted)


def _from_variances(variances: Tensor, wanted: AveragesWanted) -> Tensor:
    """Return the matrices for batch normalization's variances; checkpoints don't have its eps, so it is the layer's."""
    _check_sizes([1] * variances.numel(), wanted._replace(group_size=1))
    diagonal = variances.detach().double()
    if wanted.track == "whitener":
        diagonal = (diagonal + wanted.eps).rsqrt()
    elif wanted.group_size > 1:
        _take_notice("batch normalization", _EXACT, wanted)
    return _pack([torch.diag(part) for part in diagonal.split(wanted.sizes)]).to(variances.dtype)


def _read_shared(entries: Entries, wanted: AveragesWanted) -> GroupAverages | None:
    """Return averages of which one entry has all groups, (groups, d, d), or one group that stands for all, (d, d)."""
    for name, method in _METHODS.items():
        mean, matrices = entries.get("running_mean"), entries.get(name)
        if not isinstance(matrices, Tensor):
            continue
        shape = tuple(matrices.shape)
        if len(shape) not in (2, 3) or shape[-1] != shape[-2]:
            raise ValueError(f"{name} has shape {shape}: (groups, d, d) or (d, d) is needed")
        mean = mean.detach().reshape(-1) if isinstance(mean, Tensor) else None
        if matrices.ndim == 2:
            groups = max(1, wanted.num_features // shape[-1])
            matrices, mean = matrices.expand(groups, *shape), None if mean is None else mean.repeat(groups)
        return GroupAverages(mean, list(matrices), None, method)
    return None


def _read_separate(entries: Entries) -> GroupAverages | None:
    """Return averages that have entries of their own for each group."""
    matches = [match for name in entries if (match := _OF_GROUP.fullmatch(name))]
    if not matches:
        return None
    collection = matches[0][1]
    name, track = _COLLECTIONS[collection]
    numbers = range(1 + max(int(match[2]) for match in matches if match[1] == collection))
    needed = [f"{collection}.{number}.{kind}" for number in numbers for kind in ("running_mean", name)]
    missing = [entry for entry in needed if not isinstance(entries.get(entry), Tensor)]
    if missing:
        raise ValueError(f"the checkpoint has {matches[0][0]}, but not {', '.join(missing)}")
    means, matrices = ([entries[entry].detach() for entry in needed[start::2]] for start in (0, 1))
    return GroupAverages(torch.cat([mean.reshape(-1) for mean in means]), matrices, track, _METHODS[name])


def _from_groups(groups: GroupAverages, wanted: AveragesWanted) -> Tensor:
    """Return the matrices of an authors' layer, such that an evaluation computes the same as theirs."""
    if groups.track is not None:
        _check_track(groups.track, wanted)
    _check_sizes([len(matrix) for matrix in groups.matrices], wanted)
    methods = _EXACT if groups.method == "eigh" else (groups.method,)
    _take_notice(f"layers with method={groups.method!r}", methods, wanted)
    if wanted.track == "whitener":
        return _pack(groups.matrices)
    matrices = [_without_eps(matrix.detach().double(), wanted) for matrix in groups.matrices]
    return _pack(matrices).to(groups.matrices[0].dtype)


def _without_eps(matrix: Tensor, wanted: AveragesWanted) -> Tensor:
    """Return the covariance to which the layer adds its eps to get this matrix."""
    eps: Any = wanted.eps
    if wanted.relative_eps:  # then it adds eps times the mean variance of what is returned here
        eps = eps / (1 + eps) * matrix.diagonal().mean()
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.sub(matrix, eps * eye)


def _pack(matrices: Sequence[Tensor]) -> Tensor:
    """Return the matrices of all groups as one new tensor; the identity fills what a smaller last one lacks."""
    first = matrices[0]
    packed = torch.eye(len(first), dtype=first.dtype, device=first.device).repeat(len(matrices), 1, 1)
    for place, matrix in zip(packed, matrices, strict=True):
        place[: len(matrix), : len(matrix)] = matrix.detach()
    return packed


def _sizes(channels: int, group_size: int) -> list[int]:
    return [min(group_size, channels - start) for start in range(0, channels, group_size)]


def _check_sizes(sizes: Sequence[int], wanted: AveragesWanted) -> None:
    """Raise an error if the groups of a checkpoint have other sizes than those of the layer."""
    channels, size = sum(sizes), sizes[0]
    if list(sizes) != _sizes(channels, size):
        raise ValueError(f"the checkpoint has groups of {list(sizes)} channels: only the last may be smaller")
    if channels != wanted.num_features:
        raise ValueError(
            f"the checkpoint is for {channels} channels, and the layer has num_features={wanted.num_features}"
        )
    if list(sizes) != wanted.sizes:
        raise ValueError(
            f"the checkpoint has groups of {size} channels, and the layer has group_size={wanted.group_size}: "
            f"create the layer with group_size={size}"
        )


def _check_track(track: str, wanted: AveragesWanted) -> None:
    """Raise an error if the averages of a checkpoint are of another matrix than those of the layer."""
    if track != wanted.track:
        raise ValueError(
            f"the checkpoint has averages of the {track}, and the layer has track={wanted.track!r}: "
            f"create the layer with track={track!r}"
        )


def _take_notice(origin: str, methods: Sequence[str], wanted: AveragesWanted) -> None:
    """Warn if the layer's method isn't one that whitens as the origin of the checkpoint does."""
    if wanted.method in methods:
        return
    consequence = "outputs in evaluation change" if wanted.track == "covariance" else "training continues differently"
    warnings.warn(  # without the layer's name, so that Python shows it once for a network
        f"the checkpoint is of {origin}, and layers that load it have method={wanted.method!r}: {consequence}; "
        f"method={methods[0]!r} is the same",
        stacklevel=2,
    )
