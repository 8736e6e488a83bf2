"""The problems that are measured: shapes, layouts and groups, with the arrays for each."""

from dataclasses import dataclass
from math import prod

import numpy as np
from gpu_floors import norm_layers
from textbook import Blocks

Shape = tuple[int, ...]

ITER_NORM, GROUP_WHITEN = "iter_norm", "group_whiten"
LAYOUTS = ("NCHW", "NHWC")
NO_POSITIONS = "NC"  # the layout of arrays with two dimensions
BATCH, T, EPS = 32, 5, 1e-5
GROUP_SIZE, NUM_GROUPS = 64, (16, 32, 64)
WIDE, WIDE_GROUP_SIZE = (32, 256, 14, 14), 256
SHAPES: dict[str, list[Shape]] = {
    "resnet50": [(BATCH, channels, size, size) for channels, size in norm_layers()],
    "others": [(64, 64, 32, 32), WIDE],
    "mlp": [(256, 512), (4096, 1024)],
    "tiny": [(4, 128, 6, 6), (32, 64)],  # for a quick trial of the scripts
}
MEMORY_SHAPES = [(32, 64, 56, 56), (32, 256, 14, 14), *SHAPES["tiny"]]  # only two, because measuring memory is slow


@dataclass(frozen=True)
class Arrays:
    """The input, the output's gradient and the parameters, in the problem's layout."""

    x: np.ndarray
    dy: np.ndarray
    weight: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class Problem:
    """One layer on one shape. The shape is (N, C, ...) in every layout."""

    what: str
    group: int  # group size of IterNorm, number of groups of group whitening
    shape: Shape
    layout: str
    iterations: int = T

    def __str__(self) -> str:
        return f"{self.what} {self.group}, {'x'.join(map(str, self.shape))} {self.layout}"

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def axis(self) -> int:
        """The axis of the channels in the arrays."""
        return len(self.shape) - 1 if self.layout == "NHWC" else 1

    @property
    def array_shape(self) -> Shape:
        """The shape of the arrays in their layout."""
        return (self.shape[0], *self.shape[2:], self.channels) if self.layout == "NHWC" else self.shape

    @property
    def is_picture(self) -> bool:
        return len(self.shape) == 4

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.what == GROUP_WHITEN, self.group, self.axis)

    def draw(self) -> Arrays:
        """Draw random arrays with correlated channels, as the inputs of layers have them."""
        random = np.random.default_rng(0)
        x, dy = (random.standard_normal(self.shape, dtype=np.float32) for _ in range(2))
        x = x + 0.5 * np.roll(x, 1, axis=1)
        if self.layout == "NHWC":
            x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy))
        weight = random.uniform(0.5, 1.5, self.channels).astype(np.float32)
        return Arrays(x, dy, weight, random.standard_normal(self.channels, dtype=np.float32))


def problems(sets: list[str], layouts: list[str]) -> list[Problem]:
    """Return IterNorm and group whitening on every shape of the sets, without numbers of groups that don't fit."""
    found = []
    for name in sets:
        for shape in SHAPES[name]:
            size = WIDE_GROUP_SIZE if (name, shape) == ("others", WIDE) else GROUP_SIZE
            groups = [(ITER_NORM, size)]
            if size == GROUP_SIZE:  # the wide shape is here only for IterNorm; its group whitening is in "resnet50"
                groups += [(GROUP_WHITEN, g) for g in NUM_GROUPS if is_feasible(shape, g)]
            for layout in layouts if len(shape) == 4 else [NO_POSITIONS]:
                found += [Problem(what, group, shape, layout) for what, group in groups]
    return found


def is_feasible(shape: Shape, num_groups: int) -> bool:
    """Return whether the groups have equal sizes, and more than one value per sample."""
    _, channels, *positions = shape
    return channels % num_groups == 0 and channels // num_groups * prod(positions) > 1
