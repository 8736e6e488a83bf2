"""What is measured: shapes, layouts, groups, and the arrays of each."""

from dataclasses import dataclass
from math import prod

import numpy as np
from gpu_floors import norm_layers
from textbook import Blocks

Shape = tuple[int, ...]

ITER_NORM, GROUP_WHITEN = "iter_norm", "group_whiten"
LAYOUTS = ("NCHW", "NHWC")
NO_POSITIONS = "NC"  # the layout of two dimensions
BATCH, T, EPS = 32, 5, 1e-5
GROUP_SIZE, NUM_GROUPS = 64, (16, 32, 64)
WIDE, WIDE_GROUP_SIZE = (32, 256, 14, 14), 256
SHAPES: dict[str, list[Shape]] = {
    "resnet50": [(BATCH, channels, size, size) for channels, size in norm_layers()],
    "others": [(64, 64, 32, 32), WIDE],
    "mlp": [(256, 512), (4096, 1024)],
    "tiny": [(4, 128, 6, 6), (32, 64)],  # tries the scripts
}
MEMORY_SHAPES = [(32, 64, 56, 56), (32, 256, 14, 14), *SHAPES["tiny"]]  # memory is measured slowly


@dataclass(frozen=True)
class Arrays:
    """The input, its gradient's, and the parameters; in the problem's layout."""

    x: np.ndarray
    dy: np.ndarray
    weight: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class Problem:
    """One layer on one shape; the shape is always (N, C, ...)."""

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
        """Of the channels in the arrays."""
        return len(self.shape) - 1 if self.layout == "NHWC" else 1

    @property
    def array_shape(self) -> Shape:
        """Of the arrays, in the layout."""
        return (self.shape[0], *self.shape[2:], self.channels) if self.layout == "NHWC" else self.shape

    @property
    def is_picture(self) -> bool:
        return len(self.shape) == 4

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.what == GROUP_WHITEN, self.group, self.axis)

    def draw(self) -> Arrays:
        """Random, with correlated channels, as layers have them."""
        random = np.random.default_rng(0)
        x, dy = (random.standard_normal(self.shape, dtype=np.float32) for _ in range(2))
        x = x + 0.5 * np.roll(x, 1, axis=1)
        if self.layout == "NHWC":
            x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy))
        weight = random.uniform(0.5, 1.5, self.channels).astype(np.float32)
        return Arrays(x, dy, weight, random.standard_normal(self.channels, dtype=np.float32))


def problems(sets: list[str], layouts: list[str]) -> list[Problem]:
    """IterNorm and group whitening on every shape of the sets; numbers of groups that can't be are left out."""
    found = []
    for name in sets:
        for shape in SHAPES[name]:
            size = WIDE_GROUP_SIZE if (name, shape) == ("others", WIDE) else GROUP_SIZE
            groups = [(ITER_NORM, size)]
            if size == GROUP_SIZE:  # the wide group is IterNorm's; the shape's group whitening is in another set
                groups += [(GROUP_WHITEN, g) for g in NUM_GROUPS if is_feasible(shape, g)]
            for layout in layouts if len(shape) == 4 else [NO_POSITIONS]:
                found += [Problem(what, group, shape, layout) for what, group in groups]
    return found


def is_feasible(shape: Shape, num_groups: int) -> bool:
    """Whether the groups are equal, and have more than one value a sample."""
    _, channels, *positions = shape
    return channels % num_groups == 0 and channels // num_groups * prod(positions) > 1
