"""Lower bounds on the time of ResNet-50's normalization layers on a GPU: `python benchmarks/gpu_speed.py --floors`.

Forward reads x twice, for the statistics and for the map, and writes y. Backward reads dy and x twice, for their sums
and for the map, and writes dx. This holds for batch and group normalization and for both kinds of whitening, because
the five products of whitening (covariance and map forward; K, A' dY and B X backward) need no further pass. An array
that fits in the device's cache can be read from there the second time, so for such arrays the bound isn't strict.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

BATCH = 64
GROUP_SIZE, NUM_GROUPS = 64, 32  # of IterNorm and of group whitening; each is the number of rows d of a block
ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Work:
    """The bytes that must be moved, and the floating-point operations of the matrix products."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Device:
    """A device's bytes per second, and its floating-point operations per second by kind of product."""

    bandwidth: float
    rates: dict[str, float]

    def seconds(self, work: Work, kind: str) -> float:
        """Return the time of the bytes or of the products, whichever is longer."""
        return max(work.bytes / self.bandwidth, work.flops / self.rates[kind])


# From the NVIDIA H200 Tensor Core GPU datasheet, for the SXM version: memory 4.8 TB/s, FP32 67 TFLOP/s, TF32 989 and
# bfloat16 1979 TFLOP/s. The last two are with sparsity, which doubles the rate of the dense products used here. 3xTF32
# makes one product of nearly float32's accuracy from three TF32 products, so its rate is a third of TF32's.
H200 = Device(4.8e12, {"FMA": 67e12, "3xTF32": 165e12, "TF32": 495e12, "bfloat16": 989e12})
DEVICES = {"NVIDIA H200": H200}  # by the name that CUDA reports

# The kinds of product that lose no accuracy for a dtype's values, the fastest last.
KINDS = {"float32": ("FMA", "3xTF32"), "bfloat16": ("FMA", "3xTF32", "TF32", "bfloat16")}


def norm_layers() -> Counter[tuple[int, int]]:
    """Count ResNet-50's normalization layers by (channels, height), for images of 224 x 224."""
    layers = Counter({(64, 112): 1})
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width, size = 64 << stage, 56 >> stage
        size_before = 2 * size if stage else size  # the first block of a stage halves it in its second convolution
        layers[width, size_before] += 1
        layers[width, size] += blocks - 1 + blocks
        layers[4 * width, size] += blocks + 1  # the last convolution of every block, and one shortcut
    return layers


def forward_work(elements: int, dtype: str, d: int) -> Work:
    return Work(3 * elements * ITEMSIZE[dtype], 2 * 2 * d * elements)


def training_work(elements: int, dtype: str, d: int) -> Work:
    """Return the work of forward and backward."""
    return Work(8 * elements * ITEMSIZE[dtype], 5 * 2 * d * elements)


def least_seconds(work: Work, dtype: str, device_name: str) -> float | None:
    """Return the time of the work with the fastest products that lose no accuracy, or None for an unknown device."""
    device = DEVICES.get(device_name)
    return None if device is None else device.seconds(work, KINDS[dtype][-1])


def table(device: Device) -> Iterator[str]:
    """Yield the lines of a Markdown table with the microseconds of forward and backward."""
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
