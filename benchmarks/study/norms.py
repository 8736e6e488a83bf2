"""The normalizations that the study compares, as columns of a CSV file and as PyTorch layers."""

from dataclasses import dataclass

from torch import nn

from polywhiten.torch import GroupWhitening, IterNorm, convert

BATCH_NORMS = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}  # by the input's dimensions


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A normalization; None stands for settings that it doesn't have."""

    norm: str  # bn, dbn, iternorm, gn or gw
    group_size: int | None = None  # of dbn and iternorm; 0 means all channels together
    iterations: int | None = None  # of iternorm and gw
    num_groups: int | None = None  # of gn and gw

    @property
    def label(self) -> str:
        """The name in tables and figures."""
        group = "full" if self.group_size == 0 else f"{self.group_size}"
        return {
            "bn": "BN",
            "dbn": f"DBN {group}",
            "iternorm": f"IterNorm {group}, T={self.iterations}",
            "gn": f"GN g={self.num_groups}",
            "gw": f"GW g={self.num_groups}",
        }[self.norm]


def bn() -> Norm:
    return Norm(norm="bn")


def dbn(group_size: int = 16) -> Norm:
    return Norm(norm="dbn", group_size=group_size)


def iter_norm(group_size: int = 64, iterations: int = 5) -> Norm:
    return Norm(norm="iternorm", group_size=group_size, iterations=iterations)


def gn(num_groups: int) -> Norm:
    return Norm(norm="gn", num_groups=num_groups)


def gw(num_groups: int, iterations: int = 5) -> Norm:
    return Norm(norm="gw", num_groups=num_groups, iterations=iterations)


def layer(norm: Norm, channels: int, dimensions: int) -> nn.Module:
    """Return the layer for inputs (N, channels, ...) with this number of dimensions."""
    if norm.norm == "bn":
        return BATCH_NORMS[dimensions](channels)
    if norm.norm == "gn":
        return nn.GroupNorm(norm.num_groups, channels)
    if norm.norm == "gw":
        return GroupWhitening(norm.num_groups, channels, iterations=norm.iterations)
    size = norm.group_size or channels
    if norm.norm == "iternorm":
        return IterNorm(channels, group_size=size, iterations=norm.iterations)
    # Exact whiteners vary so much from batch to batch that their average doesn't whiten.
    return IterNorm(channels, group_size=size, method="eigh", track="covariance")


def converted(network: nn.Module, norm: Norm, where: str) -> nn.Module:
    """Return a network with batch normalization, whose layers at the papers' places `where` are replaced."""
    if norm.norm == "gw":
        return convert(network, "group_whitening", where=where, num_groups=norm.num_groups, iterations=norm.iterations)
    if norm.norm == "iternorm":
        return convert(network, "iter_norm", where=where, group_size=norm.group_size, iterations=norm.iterations)
    if norm.norm == "bn":
        return network
    raise ValueError(f"residual networks are compared with BN, IterNorm and GW, not {norm.label}")
