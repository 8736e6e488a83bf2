"""The least that ResNet-50's normalization layers take on a GPU; `python benchmarks/gpu_speed.py --floors` prints it.

Forward reads x twice, for the statistics and for the map, and writes y. Backward reads dy and x twice, for their sums
and for the map, and writes dx. That is so for batch and group normalization and for both kinds of whitening, whose five
products (covariance and map forward; K, A' dY and B X backward) need no pass of their own. An array that fits in the
device's cache can be read a second time from there: the floors of bytes then are no strict bound.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

BATCH = 64
GROUP_SIZE, NUM_GROUPS = 64, 32  # of IterNorm and of group whitening: d, the rows of a block
ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Work:
    """Bytes that must move, and floating-point operations of matrix products."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Device:
    """Bytes a second, and floating-point operations a second by kind of product."""

    bandwidth: float
    rates: dict[str, float]

    def seconds(self, work: Work, kind: str) -> float:
        """The larger of the two floors."""
        return max(work.bytes / self.bandwidth, work.flops / self.rates[kind])


# NVIDIA H200 Tensor Core GPU datasheet, the SXM part: memory 4.8 TB/s, FP32 67 TFLOP/s, and with sparsity, which is
# twice as fast as the dense products meant here, TF32 989 and bfloat16 1979 TFLOP/s. 3xTF32, three TF32 products for
# one of nearly float32's accuracy, is a third of TF32.
H200 = Device(4.8e12, {"FMA": 67e12, "3xTF32": 165e12, "TF32": 495e12, "bfloat16": 989e12})
DEVICES = {"NVIDIA H200": H200}  # by the name that CUDA gives

# Kinds of product without loss for a dtype's values, the fastest last.
KINDS = {"float32": ("FMA", "3xTF32"), "bfloat16": ("FMA", "3xTF32", "TF32", "bfloat16")}


def norm_layers() -> Counter[tuple[int, int]]:
    """How many normalization layers ResNet-50 has of every (channels, height), for pictures of 224 x 224."""
    layers = Counter({(64, 112): 1})
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width, size = 64 << stage, 56 >> stage
        before = 2 * size if stage else size  # a stage's first block halves the picture in its second convolution
        layers[width, before] += 1
        layers[width, size] += blocks - 1 + blocks
        layers[4 * width, size] += blocks + 1  # the last convolution of every block, and one shortcut
    return layers


def forward_work(elements: int, dtype: str, d: int) -> Work:
    return Work(3 * elements * ITEMSIZE[dtype], 2 * 2 * d * elements)


def training_work(elements: int, dtype: str, d: int) -> Work:
    """Forward and backward."""
    return Work(8 * elements * ITEMSIZE[dtype], 5 * 2 * d * elements)


def least_seconds(work: Work, dtype: str, device_name: str) -> float | None:
    """With the fastest products that lose nothing; None for a device whose rates aren't known here."""
    device = DEVICES.get(device_name)
    return None if device is None else device.seconds(work, KINDS[dtype][-1])


def table(device: Device) -> Iterator[str]:
    """Lines of a Markdown table: microseconds of forward and backward."""
    kinds = KINDS["bfloat16"]
    header = ["C x H x W", "layers", "dtype", "MB moved", "GFLOP of products", "memory", *kinds]
    yield _line(header)
    yield _line(["---"] * len(header))
    for dtype in ITEMSIZE:
        total = [0.0] * (len(header) - 3)
        for (channels, size), count in norm_layers().items():
            work = training_work(BATCH * channels * size**2, dtype, GROUP_SIZE)
            times = [work.bytes / device.bandwidth, *(work.flops / device.rates[kind] for kind in KINDS[dtype])]
            numbers = [work.bytes / 1e6, work.flops / 1e9, *(1e6 * time for time in times)]
            total = [sum(pair) for pair in zip(total, [count * number for number in numbers], strict=False)]
            yield _line([f"{channels} x {size} x {size}", str(count), dtype, *_cells(numbers, len(header) - 3)])
        yield _line(["all layers", str(norm_layers().total()), dtype, *_cells(total, len(header) - 3)])


def _cells(numbers: list[float], width: int) -> list[str]:
    return [f"{number:.0f}" if number >= 100 else f"{number:.1f}" for number in numbers] + [""] * (width - len(numbers))


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
