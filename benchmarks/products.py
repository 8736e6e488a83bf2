"""Measures the products of the CPU's compiled kernels, in the shapes they have there: `python benchmarks/products.py`.

It prints the GFLOP/s of one core beside those of PyTorch's product of 2048 x 2048 matrices, as a Markdown table. All
that a product reads is in the caches, as in the kernels.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import click
import machine
import numpy as np
import torch
from instruction_sets import INSTRUCTION_SETS, run_again_restricted
from numba import njit, types
from numba.extending import intrinsic

from polywhiten.cpu.device.gemm import Sizes, multiply_add_listed
from polywhiten.cpu.device.gemm_microkernel import Matrix, StridedMatrix
from polywhiten.cpu.device.pointers import as_int64
from polywhiten.cpu.device.prefetch import PrefetchList
from polywhiten.cpu.tuning import LD_PADDING, PANEL_WIDTH, TILE

LARGE = 2048
SECONDS, ROUNDS = 1e-3, 9  # of a measurement, and how many there are of each product


class Product(NamedTuple):
    """A product of (m, k) and (k, n) elements, of which the result's tiles below the diagonal may be left out."""

    name: str
    m: int
    n: int
    k: int
    a_strides: tuple[int, int]
    ldb: int
    ldc: int
    upper: bool = False

    @property
    def flops(self) -> int:
        tiles = self.m // TILE
        part = (tiles + 1) / (2 * tiles) if self.upper else 1.0
        return int(2 * self.m * self.n * self.k * part)


def products(d: int) -> list[Product]:
    """Return the products of kernels for blocks of d variables."""
    rows, columns, panel = d + LD_PADDING, PANEL_WIDTH + LD_PADDING, PANEL_WIDTH
    return [
        Product("moments", d, d, panel, (1, rows), rows, d, upper=True),
        Product("cross moments", d, d, panel, (columns, 1), rows, d),
        Product("map of columns", d, panel, d, (d, 1), columns, columns),
        Product("gradient's map of columns", d, panel, 2 * d, (2 * d, 1), columns, columns),
        Product("map of rows", TILE, d, d, (d + LD_PADDING, 1), d, d),
        Product("gradient's map of rows", TILE, d, 2 * d, (2 * d + LD_PADDING, 1), d, d),
        Product("Newton, symmetric", d, d, d, (rows, 1), rows, rows, upper=True),
        Product("Newton's derivative", d, d, d, (rows, 1), rows, rows),
    ]


@intrinsic
def _pointer(typingctx: Any, address: Any, like: Any) -> Any:
    """Return the address as a pointer to elements of an array's dtype."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), generate


@njit
def _multiply(like, a, b, c, zeros, product, times):
    m, n, k, row_stride, column_stride, ldb, ldc, upper = product
    target, nothing = Matrix(_pointer(c, like), ldc), _pointer(zeros, like)
    left = StridedMatrix(_pointer(a, like), row_stride, column_stride)
    right, prefetch_list = Matrix(_pointer(b, like), ldb), PrefetchList(as_int64(nothing), 0, 0, 0)
    for _ in range(times):
        multiply_add_listed(target, Matrix(nothing, 0), left, right, Sizes(m, n, k), upper, False, prefetch_list)


def rate(call: Callable[[int], object], flops: int) -> float:
    """Return the GFLOP/s of a call that is given how often to do its work: the fastest of several measurements."""
    call(1)  # compiles
    times = 1
    while seconds(call, times) < SECONDS:
        times *= 2
    return times * flops / min(seconds(call, times) for _ in range(ROUNDS)) / 1e9


def seconds(call: Callable[[int], object], times: int) -> float:
    start = time.perf_counter()
    call(times)
    return time.perf_counter() - start


def rates(product: Product, dtype: str) -> float:
    """Return the GFLOP/s of a product."""
    random = np.random.default_rng(0)
    arrays = [aligned(random.standard_normal(1 << 19).astype(dtype)) for _ in range(2)]
    arrays += [aligned(np.zeros(1 << 19, dtype)) for _ in range(2)]
    like, addresses = np.zeros(1, dtype), [array.ctypes.data for array in arrays]
    sizes = (*product[1:4], *product.a_strides, product.ldb, product.ldc, product.upper)
    return rate(lambda times: _multiply(like, *addresses, sizes, times), product.flops)


def aligned(values: np.ndarray) -> np.ndarray:
    """Return a copy that begins at a cache line, as the memory of kernels does."""
    memory = np.empty(values.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + values.nbytes].view(values.dtype)
    copy[...] = values
    return copy


@click.command()
@click.option("--isa", type=click.Choice(INSTRUCTION_SETS), help="Restrict both to an older instruction set.")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True)
def main(isa: str | None, dtype: str) -> None:
    """Print the rates of the kernels' products on one core."""
    if isa:
        run_again_restricted()
    torch.set_num_threads(1)
    a, result = torch.randn(LARGE, LARGE, dtype=getattr(torch, dtype)), torch.empty(0, dtype=getattr(torch, dtype))
    large = rate(lambda times: [torch.mm(a, a, out=result) for _ in range(times)], 2 * LARGE**3)
    sizes = (16, 32, 64, 256)
    print(f"{machine.description()}{f', restricted to {isa.upper()}' if isa else ''}; one core, {dtype}.")
    print(f"PyTorch's product of {LARGE} x {LARGE}: {large:.0f} GFLOP/s.\n")
    print(f"| product | {' | '.join(f'd = {d}' for d in sizes)} |")
    print(f"| --- | {' | '.join('---' for _ in sizes)} |")
    for same in zip(*map(products, sizes), strict=True):
        found = [rates(product, dtype) for product in same]
        print(f"| {same[0].name} | {' | '.join(f'{value:.0f} ({value / large:.2f})' for value in found)} |")


if __name__ == "__main__":
    main()
