"""The products of compiled kernels for processors with shorter vectors, and fewer registers, than this one has.

All of `test_cpu.py` runs for such a processor if NUMBA_CPU_FEATURES is set for it, as `restricted` does here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

from llvmlite import binding

# features beyond the instruction set, as the names of LLVM begin
BEYOND = {
    "AVX2": ("avx512", "avx10", "amx"),
    "SSE": ("avx", "amx", "fma", "f16c", "vaes", "vpclmul", "xop", "sha512", "sm"),
}
BYTES = {"AVX2": 32, "SSE": 16}
SCRIPT = """
import sys
import numpy as np

sys.path.append(sys.argv[2])  # the folder of these tests
from array_pointers import pointer
from numba import njit
from polywhiten.cpu.device import simd
from polywhiten.cpu.device.gemm import Sizes, multiply_add_listed
from polywhiten.cpu.device.gemm_microkernel import Matrix, StridedMatrix
from polywhiten.cpu.device.pointers import as_int64
from polywhiten.cpu.device.prefetch import PrefetchList

assert simd.VECTOR_BYTES == int(sys.argv[1])


@njit
def multiply(c, a, b, strides, upper):
    target, lines = Matrix(pointer(c.ctypes.data, c), c.shape[1]), as_int64(pointer(c.ctypes.data, c))
    left = StridedMatrix(pointer(a.ctypes.data, a), strides[0], strides[1])
    right, sizes = Matrix(pointer(b.ctypes.data, b), b.shape[1]), Sizes(c.shape[0], c.shape[1], b.shape[0])
    multiply_add_listed(target, target, left, right, sizes, upper, False, PrefetchList(lines, 0, 0, 0))


random = np.random.default_rng(0)
for dtype, tolerance in (("float32", 1e-4), ("float64", 1e-12)):
    for m, n, k, upper in ((16, 16, 1, False), (16, 32, 7, False), (32, 48, 16, False), (48, 48, 33, True)):
        a, b, c = (random.normal(size=shape).astype(dtype) for shape in ((m, k), (k, n), (m, n)))
        wanted, tiles = c + a.astype("float64") @ b, np.arange(max(m, n)) // 16
        wanted = np.where(tiles[:m, None] > tiles[:n], c, wanted) if upper else wanted
        for given, strides in ((a, (k, 1)), (np.ascontiguousarray(a.T), (1, m))):
            found = c.copy()
            multiply(found, given, b, strides, upper)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)
"""


@pytest.mark.parametrize("name", BEYOND)
def test_products_are_right_with_shorter_vectors(name):
    features = binding.get_host_cpu_features()
    if not features.get("avx2"):
        pytest.skip("this is not an x86 processor with AVX2")
    for feature in features:
        features[feature] &= not feature.startswith(BEYOND[name])
    restricted = os.environ | {"NUMBA_CPU_FEATURES": features.flatten(), "NUMBA_CPU_NAME": "x86-64"}
    command = [sys.executable, "-P", "-c", SCRIPT, str(BYTES[name]), str(Path(__file__).parent)]
    result = subprocess.run(command, env=restricted, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
