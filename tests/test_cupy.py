"""CuPy's CUDA kernels. They compile without a device, and run on a CPU by emulation."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import array_api_compat.numpy
import numpy as np
import pytest
from cuda_on_cpu import COMPILER, CpuLauncher, GuardedNumPy
from cuda_on_cpu.counting import CountingNumPy, Counts, NoLauncher, counted

import polywhiten as pw
from polywhiten.backend import Backend
from polywhiten.blocks import ChannelGroups, SampleGroups
from polywhiten.cli.info import probe
from polywhiten.dispatch import framework_module
from polywhiten.gpu_launches import CHOICES, use_gpu_launches
from polywhiten.kernels import Kernels, Term
from polywhiten.solvers import solver_for
from polywhiten.spec import WhiteningSpec

cupy = pytest.importorskip("cupy")

import polywhiten.cupy  # noqa: E402
from polywhiten.cupy import launcher, passes  # noqa: E402
from polywhiten.cupy.implementation import JoinedImplementation, SeparateImplementation  # noqa: E402
from polywhiten.cupy.kernels import CupyKernels  # noqa: E402
from polywhiten.cupy.variants import SIZES, TYPES  # noqa: E402

HAS_DEVICE = cupy.cuda.is_available()
needs_device = pytest.mark.skipif(not HAS_DEVICE, reason="cupy sees no CUDA device")

ACCUMULATORS = ("float", "double")
PAIRS = ("half, half", "float, half", "float, float", "double, double")  # of dy and x
MAPS = ("half, half, half", "half, half, float", "float, half, half", "float, float, float", "double, double, double")
KERNELS = {
    "moments.cu": {"partial_moments": ("half", *ACCUMULATORS), "combine_moments": ACCUMULATORS},
    "cross_moments.cu": {"partial_cross_moments": PAIRS, "combine_cross_moments": ACCUMULATORS},
    "affine_map.cu": {"affine_map": MAPS},
    "newton.cu": {"newton": ACCUMULATORS, "newton_adjoint": ACCUMULATORS},
    "joined_statistics.cu": {"joined_statistics": TYPES.values()},
    "joined_gradient.cu": {"joined_gradient": TYPES.values()},
    "joined_maps.cu": {"whiten": TYPES.values(), "input_gradient": TYPES.values()},
}
VARIANTS = {
    file: [
        f"{kernel}<{types}, {size}>" for kernel, all_types in kernels.items() for types in all_types for size in SIZES
    ]
    for file, kernels in KERNELS.items()
}


# ---------------------------------------------------------------- compiled, without a device


def static_bound(kernel):
    """Return the most bytes of static shared memory that the host expects of a kernel."""
    name, first_type, *_, size = re.findall(r"\w+", kernel)
    joined = {"joined_statistics": passes.STATISTICS_STATIC, "joined_gradient": passes.GRADIENT_STATIC}.get(name)
    if joined:
        return joined[8 if first_type == "double" else 4][int(size)] * 1024
    return 4096 if name in ("affine_map", "newton", "newton_adjoint", "whiten", "input_gradient") else 48 * 1024


def spill_bound(file, kernel, arch):
    """Return how many bytes a kernel may spill: what joined kernels know of their launch while sums need all registers.

    On tensor cores, the sums of products of 64 variables take 80 or 128 of 255 registers.
    """
    if not file.startswith("joined"):
        return 0
    if arch == "sm_75" or "double" in kernel or kernel.endswith(" 4>"):
        return 32
    return 600 if kernel.startswith("joined") and kernel.endswith("64>") else 100


def compiled_variants(file, arch):
    """Return those to compile for an architecture, which takes long: 7.5 has no tensor cores for float32."""
    if arch == "sm_75":
        return [name for name in VARIANTS[file] if name.endswith("<float, 64>")]
    if file.startswith("joined"):
        return [name for name in VARIANTS[file] if ("half" in name) == (arch == "sm_80")]
    return VARIANTS[file]


@pytest.mark.parametrize(
    ("file", "arch"),
    [(file, arch) for file in VARIANTS for arch in ("sm_75", "sm_80", "sm_90") if arch != "sm_75" or "joined" in file],
)
def test_every_variant_compiles_and_keeps_to_its_registers_and_shared_memory(file, arch, record_property):
    from cupy.cuda.compiler import _NVRTCProgram  # the public function asks for a device

    names = compiled_variants(file, arch)
    log = StringIO()
    program = _NVRTCProgram(launcher.source(file), file, name_expressions=names, method="cubin")
    _, mangled = program.compile((*launcher.OPTIONS, f"--gpu-architecture={arch}", "--ptxas-options=-v"), log)
    kernels = {name: kernel for kernel, name in mangled.items()}
    report = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
        log.getvalue().replace("\0", ""),
        re.DOTALL,
    )
    assert {kernels[name] for name, *_ in report} == set(names)
    for name, *numbers in report:
        spilled, registers, shared = (int(number or 0) for number in numbers)
        record_property("resources", f"{kernels[name]:<36} {arch} {registers:>3} registers, {shared:>6} bytes shared")
        assert spilled <= spill_bound(file, kernels[name], arch), kernels[name]
        assert shared <= static_bound(kernels[name]), kernels[name]


@pytest.mark.parametrize("file", VARIANTS)
def test_float32_is_not_computed_with_in_float64(file):
    """Float64 is slow on many devices, and rounds differently. Only eps is float64, and is converted."""
    from cupy.cuda.compiler import _NVRTCProgram

    names = [name for name in VARIANTS[file] if "double" not in name and name.endswith("16>")]
    program = _NVRTCProgram(launcher.source(file), file, name_expressions=names, method="ptx")
    ptx, _ = program.compile((*launcher.OPTIONS, "--gpu-architecture=compute_80"))
    assert set(re.findall(r"[\w.]+\.f64", ptx.decode() if isinstance(ptx, bytes) else ptx)) <= {
        "ld.param.f64",
        "cvt.rn.f32.f64",
    }


# ---------------------------------------------------------------- run, emulated or on a device


@dataclass
class Machine:
    """CuPy's kernels over the arrays of a library, and conversions from and to NumPy."""

    kernels: CupyKernels
    array: Any
    numpy: Any

    @property
    def backend(self):
        return backend_with(self.kernels)


def backend_with(kernels):
    """Return CuPy's backend with these kernels."""
    return Backend(Kernels(kernels.xp), JoinedImplementation(kernels), SeparateImplementation(kernels))


@cache
def emulated(build):
    xp = GuardedNumPy()
    launch = CpuLauncher(xp, Path(launcher.__file__).parent, VARIANTS, build)
    return Machine(CupyKernels(xp, launch), lambda a: a, lambda a: a)


def larger(machine):
    """Return the same with as many multiprocessors as devices have, if it is emulated."""
    launch = copy(machine.kernels.launch)
    if isinstance(launch, CpuLauncher):
        launch.multiprocessors = 100
    return replace(machine, kernels=CupyKernels(machine.kernels.xp, launch))


@pytest.fixture(
    params=[
        pytest.param("emulated", marks=pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")),
        pytest.param("device", marks=[pytest.mark.gpu, needs_device]),
    ]
)
def machine(request, tmp_path_factory):
    if request.param == "emulated":
        folder = tmp_path_factory.getbasetemp()
        return emulated(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)
    return Machine(polywhiten.cupy.BACKEND.implementations[0].kernels, cupy.asarray, cupy.asnumpy)


@pytest.fixture(params=CHOICES)
def structure(request):
    with use_gpu_launches(request.param):
        yield request.param


NEWTON = solver_for("newton", 5)
EXACT = Kernels(array_api_compat.numpy)
EXACT_BACKEND = Backend(EXACT)
TOLERANCE = {"float16": 2e-3, "float32": 1e-5, "float64": 1e-12}

# The block axis of (p, q, d, l) arrays, their shape for d variables, and the order of their axes in memory.
LAYOUTS = {
    "channels first": (1, lambda d: (5, 2, d, 37), (0, 1, 2, 3)),
    "channels last": (1, lambda d: (600, 2, d, 1), (0, 1, 2, 3)),
    "channels last in memory alone": (1, lambda d: (4, 2, d, 33), (0, 3, 1, 2)),
    "samples, channels first": (0, lambda d: (3, 1, d, 130), (0, 1, 2, 3)),
    "samples, channels last": (0, lambda d: (2, 40, d, 5), (0, 1, 2, 3)),
    "two values a variable": (0, lambda d: (2, 1, d, 2), (2, 0, 3, 1)),
}


def draw(machine, shape, dtype, order=(0, 1, 2, 3), seed=0, mean=3.0, step=2):
    """Return random values and NumPy's float64 of them: every `step`-th element of an array whose others are NaN."""
    rng = np.random.default_rng(seed)
    spread = [shape[i] for i in order]
    values = np.full([*spread[:-1], step * spread[-1]], np.nan, dtype)
    values[..., ::step] = rng.normal(mean, 1, spread)
    back = np.argsort(order)
    return machine.array(values)[..., ::step].transpose(back), np.float64(values[..., ::step].transpose(back))


def check(machine, actual, expected, tolerance):
    actual = machine.numpy(actual)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1, np.max(np.abs(expected))))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("d", [1, 4, 13, 32, 50, 64])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_kernels_agree_with_the_plain_ones(machine, dtype, d, layout):
    block_axis, shape, order = LAYOUTS[layout]
    kernels, newton = machine.kernels, NEWTON
    tolerance = TOLERANCE["float64" if dtype == "float64" else "float32"]
    x, exact_x = draw(machine, shape(d), dtype, order)
    dy, exact_dy = draw(machine, shape(d), dtype, order, seed=1, mean=0.5)
    mean, cov = kernels.moments(x, block_axis)
    exact_mean, exact_cov = EXACT.moments(exact_x, block_axis)
    s, k = kernels.cross_moments(dy, x, mean, block_axis)
    exact_s, exact_k = EXACT.cross_moments(exact_dy, exact_x, exact_mean, block_axis)
    w = kernels.inverse_sqrt(newton, cov, 1e-3)
    exact_w = EXACT.inverse_sqrt(newton, exact_cov, 1e-3)
    ds = kernels.inverse_sqrt_adjoint(newton, cov, k, 1e-3)
    exact_ds = EXACT.inverse_sqrt_adjoint(newton, exact_cov, exact_k, 1e-3)
    for actual, expected in ((mean, exact_mean), (cov, exact_cov), (s, exact_s), (k, exact_k), (w, exact_w)):
        check(machine, actual, expected, tolerance)
    check(machine, ds, exact_ds, 10 * tolerance)
    assert (machine.numpy(cov) == machine.numpy(cov).swapaxes(1, 2)).all()

    terms = [Term(w.swapaxes(1, 2), x, mean), Term(ds, dy, s)]
    exact_terms = [Term(exact_w.swapaxes(1, 2), exact_x, exact_mean), Term(exact_ds, exact_dy, exact_s)]
    for count, bias, exact_bias in ((1, None, None), (1, mean, exact_mean), (2, s, exact_s)):
        y = kernels.affine_map(terms[:count], bias, block_axis, x.dtype)
        expected = EXACT.affine_map(exact_terms[:count], exact_bias, block_axis, np.float64)
        assert y.dtype == dtype
        check(machine, y, expected, max(TOLERANCE[dtype], 10 * tolerance))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    ("blocks", "shape"),
    [
        (ChannelGroups(1, 6), (9, 12, 5, 7)),
        (ChannelGroups(2, 6), (9, 35, 12)),
        (SampleGroups(1, 6), (3, 12, 5, 7)),
        (SampleGroups(3, 6), (3, 5, 7, 12)),
    ],
    ids=["iter_norm", "iter_norm, channels last", "group_whiten", "group_whiten, channels last"],
)
def test_whitening_and_its_gradient_over_these_kernels(machine, structure, blocks, shape, dtype):
    """In half precision the gradient of y is float32 if weights don't fold into the whitener."""
    rng = np.random.default_rng(0)
    inputs = [a.astype(dtype) for a in (rng.normal(2, 3, shape), rng.uniform(1, 2, 12), rng.normal(size=12))]
    dy = rng.normal(size=shape).astype(dtype)
    spec = WhiteningSpec(blocks, NEWTON, 1e-5)
    x, weight, bias = (machine.array(a) for a in inputs)
    y, stats = machine.backend.forward(spec, x, weight, bias)
    gradients = machine.backend.backward(spec, x, weight, bias, stats, machine.array(dy))
    exact = [np.float64(a) for a in inputs]
    exact_y, exact_stats = EXACT_BACKEND.forward(spec, *exact)
    exact_gradients = EXACT_BACKEND.backward(spec, *exact, exact_stats, np.float64(dy))
    for actual, expected in zip((y, *gradients), (exact_y, *exact_gradients), strict=True):
        assert actual.dtype == dtype
        check(machine, actual, expected, 10 * TOLERANCE[dtype] if dtype != "float16" else 5e-3)


def both_passes(backend, spec, x, weight, bias, dy):
    """Return mean, covariance and whitener, y, and the gradients of x, weight and bias."""
    y, stats = backend.forward(spec, x, weight, bias)
    return (*stats, y, *backend.backward(spec, x, weight, bias, stats, dy))


def check_whitening(machine, blocks, shape, dtype, parameter_dtypes, order=None, dy_order=None, step=2, solver=NEWTON):
    """Compare forward and backward with the plain kernels in float64."""
    rng = np.random.default_rng(0)
    order = order or tuple(range(len(shape)))
    x, exact_x = draw(machine, shape, dtype, order, step=step)
    dy, exact_dy = draw(machine, shape, dtype, dy_order or order, seed=1, mean=0.5, step=step)
    channels = shape[blocks.axis]
    exact = [None if name is None else rng.uniform(1, 2, channels).astype(name) for name in parameter_dtypes]
    # not contiguous, as slices of larger arrays aren't
    parameters = [None if values is None else machine.array(np.repeat(values, 2))[::2] for values in exact]
    exact = [None if values is None else np.float64(values) for values in exact]
    spec = WhiteningSpec(blocks, solver, 1e-3)
    results = both_passes(machine.backend, spec, x, *parameters, dy)
    exact_results = both_passes(EXACT_BACKEND, spec, exact_x, *exact, exact_dy)
    tolerance = 5e-3 if "float16" in (dtype, *parameter_dtypes) else {"float32": 1e-4, "float64": 1e-11}[dtype]
    for actual, expected in zip(results, exact_results, strict=True):
        if expected is None:
            assert actual is None
        else:
            check(machine, actual, expected, tolerance)
    assert [None if values is None else values.dtype.name for values in results[3:]] == [
        dtype,
        dtype,
        *parameter_dtypes,
    ]


@pytest.mark.parametrize(
    "parameter_dtypes",
    [(None, None), ("float32", None), (None, "float16"), ("float16", "float32"), ("float64", "float64")],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_weight_and_bias_of_any_dtype_or_none(machine, structure, dtype, parameter_dtypes):
    for blocks in (ChannelGroups(1, 5), SampleGroups(1, 5)):
        check_whitening(machine, blocks, (3, 10, 4, 9), dtype, parameter_dtypes)


WHITENED = {
    "iter_norm": (ChannelGroups(1, 10), (70, 20, 300), None),
    "iter_norm, rows": (ChannelGroups(1, 10), (9000, 10), None),
    "iter_norm, channels last in memory alone": (ChannelGroups(1, 40), (40, 40, 4, 40), (0, 2, 3, 1)),
    "group_whiten": (SampleGroups(1, 20), (2, 60, 70, 51), None),
    "group_whiten, channels last": (SampleGroups(3, 5), (2, 70, 51, 20), None),
    "group_whiten, channels last in memory alone": (SampleGroups(1, 5), (3, 20, 9, 11), (0, 2, 3, 1)),
    "group_whiten, rows": (SampleGroups(1, 4), (40, 72), None),
}


@pytest.mark.parametrize("layout", WHITENED)
def test_many_parts_of_each_block(machine, structure, layout):
    """Joined launches combine them by a tree, and give them different channels."""
    blocks, shape, order = WHITENED[layout]
    check_whitening(larger(machine), blocks, shape, "float64", ("float64", "float64"), order)


FIRST, LAST = (0, 1, 2, 3), (0, 2, 3, 1)
# The order of the axes of x and dy in memory, and their step.
TENSORS = {
    "channels first": (FIRST, FIRST, 1),
    "channels first, strided": (FIRST, FIRST, 2),
    "channels last": (LAST, LAST, 1),
    "channels last, strided": (LAST, LAST, 2),
    "channels first and last": (FIRST, LAST, 1),
}


@pytest.mark.parametrize("layout", TENSORS)
@pytest.mark.parametrize("kind", [ChannelGroups, SampleGroups])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_tensor_cores_load_and_store_arrays_of_any_strides(machine, dtype, kind, layout):
    """Four numbers at a time where these are adjacent and aligned, else each alone; and more than a warp has at once.

    Images of 5 x 5 are not aligned, and 48 or 20 variables are fewer than a variant has.
    """
    order, dy_order, step = TENSORS[layout]
    two_steps = solver_for("newton", 2)  # the iteration knows nothing of strides, and takes the emulator long
    with use_gpu_launches("joined"):
        for d, sides in ((16, (8, 12)), (20, (5, 5)), (32, (12, 12)), (48, (8, 8)), (64, (16, 20))):
            channels = d if kind is SampleGroups and d == 64 else 2 * d
            shape = (2, channels, *sides)
            check_whitening(machine, kind(1, d), shape, dtype, ("float32", dtype), order, dy_order, step, two_steps)


@pytest.mark.parametrize("begin", [0, 1], ids=["aligned", "not aligned"])
@pytest.mark.parametrize(
    ("blocks", "shape"),
    [(SampleGroups(3, 8), (3, 5, 5, 64)), (SampleGroups(1, 8), (3, 32, 2, 10)), (SampleGroups(1, 8), (3, 24, 3, 5))],
    ids=["adjacent channels", "one channel", "any channels"],
)
def test_four_adjacent_samples_have_the_weights_and_biases_of_their_channels(machine, blocks, shape, begin):
    """A variable of group whitening has several channels. Tensor cores' maps look four samples up at a time."""
    rng = np.random.default_rng(0)
    (x, exact_x), (dy, exact_dy) = (draw(machine, shape, "float32", range(len(shape)), seed, step=1) for seed in (0, 1))
    exact = [rng.uniform(1, 2, begin + shape[blocks.axis]).astype("float32") for _ in range(2)]
    weight, bias = (machine.array(values)[begin:] for values in exact)
    exact_weight, exact_bias = (np.float64(values[begin:]) for values in exact)
    spec = WhiteningSpec(blocks, NEWTON, 1e-3)
    with use_gpu_launches("joined"):
        *_, y, dx, _, _ = both_passes(machine.backend, spec, x, weight, bias, dy)
    *_, exact_y, exact_dx, _, _ = both_passes(EXACT_BACKEND, spec, exact_x, exact_weight, exact_bias, exact_dy)
    check(machine, y, exact_y, 1e-5)
    check(machine, dx, exact_dx, 1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_large_mean_leaves_tensor_cores_the_digits_of_the_variance(machine, dtype):
    """Squares of x would lose them all: the mean is 100 standard deviations in float16, and 10,000 in float32."""
    mean = 100 if dtype == "float16" else 10_000
    x, exact = draw(machine, (40, 32, 6, 6), dtype, mean=mean, step=1)
    spec = WhiteningSpec(ChannelGroups(1, 32), NEWTON, 1e-3)
    with use_gpu_launches("joined"):
        _, stats = machine.backend.forward(spec, x, None, None)
    _, exact_stats = EXACT_BACKEND.forward(spec, exact, None, None)
    check(machine, stats.covariance, exact_stats.covariance, 3e-4)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_variance_of_many_samples_is_not_biased(machine, dtype):
    """Tensor cores cut off the digits that don't fit, and many samples would make variances too small."""
    x, exact = draw(machine, (32768, 16), dtype, (0, 1), mean=0.37, step=1)
    with use_gpu_launches("joined"):
        _, stats = machine.backend.forward(WhiteningSpec(ChannelGroups(1, 16), NEWTON, 1e-3), x, None, None)
    variances = np.diagonal(machine.numpy(stats.covariance)[0])
    errors = variances / exact.var(axis=0) - 1
    assert abs(errors.mean()) < (1e-4 if dtype == "float16" else 1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
@pytest.mark.parametrize("d", [33, 64])
def test_tensor_cores_iterate_in_the_precision_of_float32(machine, d, steps):
    """Most variables have little variance. On a large device, a thread block of its own computes the iterates."""
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(size=(400, d)).astype("float32") for _ in range(2))
    x *= np.geomspace(1, 1e-2, d, dtype="float32")
    spec = WhiteningSpec(ChannelGroups(1, d), solver_for("newton", steps), 1e-5)
    _, exact_stats = EXACT_BACKEND.forward(spec, np.float64(x), None, None)
    exact_dx, *_ = EXACT_BACKEND.backward(spec, np.float64(x), None, None, exact_stats, np.float64(dy))
    for each in (machine, larger(machine)):
        with use_gpu_launches("joined"):
            _, stats = each.backend.forward(spec, each.array(x), None, None)
            dx, *_ = each.backend.backward(spec, each.array(x), None, None, stats, each.array(dy))
        check(each, stats.whitener, exact_stats.whitener, 1e-5)
        check(each, dx, exact_dx, 1e-5)


@pytest.mark.parametrize(("steps", "limit"), [(1, 1.5e-6), (12, 3e-4)])
def test_tensor_cores_whiten_data_of_few_dimensions_in_the_precision_of_float32(machine, steps, limit):
    """Many steps multiply rounding errors where the data have no variance: y must not contain them."""
    rng = np.random.default_rng(steps)
    few = rng.normal(size=(8, 64)) * np.geomspace(1, 1e-3, 8)[:, None]
    x = (rng.normal(size=(600, 8)) @ few).astype("float32")
    dy = rng.normal(size=x.shape).astype("float32")
    spec = WhiteningSpec(ChannelGroups(1, 64), solver_for("newton", steps), 1e-10)
    *_, exact_y, exact_dx, _, _ = both_passes(EXACT_BACKEND, spec, np.float64(x), None, None, np.float64(dy))
    with use_gpu_launches("joined"):
        *_, y, dx, _, _ = both_passes(machine.backend, spec, machine.array(x), None, None, machine.array(dy))
    check(machine, y, exact_y, limit)
    check(machine, dx, exact_dx, limit)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_reach_the_gradients(machine, dtype, value):
    """Training in half precision looks for them. In y they concern the group whose statistics they enter."""
    x, dy = (np.random.default_rng(seed).normal(size=(40, 32)).astype(dtype) for seed in (0, 1))
    dy[3, 20] = value
    weight = np.ones(32, dtype)
    spec = WhiteningSpec(ChannelGroups(1, 16), NEWTON, 1e-3)
    with use_gpu_launches("joined"):
        x, dy, weight = (machine.array(a) for a in (x, dy, weight))
        _, stats = machine.backend.forward(spec, x, weight, weight)
        gradients = machine.backend.backward(spec, x, weight, weight, stats, dy)
    dx, dweight, dbias = (np.isfinite(machine.numpy(a)) for a in gradients)
    assert not dx[:, 16:].any()
    assert dx[:, :16].all()
    assert not dweight[20]
    assert not dbias[20]


class NotingLauncher:
    """Launches kernels by another launcher, and notes their names."""

    def __init__(self, launch):
        self.launch, self.noted = launch, set()

    def __getattr__(self, name):
        return getattr(self.launch, name)

    def __call__(self, file, name, *arguments):
        self.noted.add(name.partition("<")[0])
        self.launch(file, name, *arguments)


@pytest.mark.sanitized
def test_every_kernel_runs_in_both_memory_orders(machine):
    """compute-sanitizer, which is slow, is given this test alone. So it has to launch every kernel.

    Variants for 16 to 64 variables use tensor cores in joined launches.
    """
    launch = NotingLauncher(machine.kernels.launch)
    noting = replace(machine, kernels=CupyKernels(machine.kernels.xp, launch))
    for structure in CHOICES:
        with use_gpu_launches(structure):
            for blocks in (ChannelGroups(1, 5), SampleGroups(1, 5)):
                for order in (None, (0, 2, 3, 1)):
                    check_whitening(noting, blocks, (3, 10, 4, 9), "float32", ("float32", "float32"), order)
    with use_gpu_launches("joined"):
        for d, dtype in ((64, "float32"), (64, "float16"), (32, "float32")):
            for order in (FIRST, LAST):
                check_whitening(noting, ChannelGroups(1, d), (3, d, 8, 12), dtype, (dtype, dtype), order, step=1)
    assert launch.noted == {kernel for kernels in KERNELS.values() for kernel in kernels}


@pytest.mark.parametrize("shape", [(16, 2, 8, 40), (640, 2, 8, 1)])
def test_a_mean_far_above_the_standard_deviation_costs_no_accuracy_in_float32(machine, shape):
    x, exact = draw(machine, shape, "float32", mean=1e3)
    mean, cov = machine.kernels.moments(x, 1)
    exact_mean, exact_cov = EXACT.moments(exact, 1)
    np.testing.assert_allclose(machine.numpy(mean), exact_mean, rtol=2e-7)
    check(machine, cov, exact_cov, 1e-5)
    eye = machine.array(np.tile(np.eye(8, dtype="float32"), (2, 1, 1)))
    y = machine.kernels.affine_map([Term(eye, x, machine.array(np.float32(exact_mean)))], None, 1, x.dtype)
    np.testing.assert_allclose(machine.numpy(y).mean(axis=(0, 3)), 0, atol=1e-4)  # 1e3 in float32 is rounded by 3e-5
    assert np.abs(machine.numpy(y)).max() < 10


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_constant_channels_have_zero_variance_and_a_whitener_of_zero(machine, dtype):
    x = machine.array(np.full((7, 2, 9, 11), 0.1, dtype))
    mean, cov = machine.kernels.moments(x, 1)
    assert (machine.numpy(mean) == np.asarray(0.1, dtype)).all()
    assert (machine.numpy(cov) == 0).all()
    assert (machine.numpy(machine.kernels.inverse_sqrt(NEWTON, cov)) == 0).all()
    eye = machine.array(np.tile(np.eye(9, dtype=cov.dtype), (2, 1, 1)))
    assert (machine.numpy(machine.kernels.inverse_sqrt_adjoint(NEWTON, cov, eye)) == 0).all()


@pytest.mark.parametrize("d", [8, 64])
def test_constant_channels_without_eps_give_nothing_but_zeros(machine, structure, d):
    x, dy = machine.array(np.full((4, d, 12), 7, "float32")), draw(machine, (4, d, 12), "float32", (0, 1, 2))[0]
    spec = WhiteningSpec(ChannelGroups(1, d), NEWTON, 0.0)
    _, cov, whitener, y, dx, _, _ = both_passes(machine.backend, spec, x, None, None, dy)
    for array in (cov, whitener, y, dx):
        assert (machine.numpy(array) == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_affects_only_its_block(machine, structure, bad):
    values = np.random.default_rng(0).normal(size=(6, 2, 20, 30)).astype("float32")
    values[2, 1, 5, 3] = bad
    spec = WhiteningSpec(ChannelGroups(1, 20), NEWTON, 1e-5)
    x = machine.array(values.reshape(6, 40, 30))
    with np.errstate(invalid="ignore"):
        y, stats = machine.backend.forward(spec, x, None, None)
        dx, _, _ = machine.backend.backward(spec, x, None, None, stats, y)
    for array in (machine.numpy(y), machine.numpy(dx)):
        assert np.isfinite(array[:, :20]).all()
        assert not np.isfinite(array[:, 20:]).any()


@pytest.mark.parametrize("iterations", [1, 2, 3, 300])
def test_any_number_of_steps(machine, iterations):
    """With 300 steps elements of a tile past the matrix would overflow if they weren't 0."""
    a = np.random.default_rng(0).normal(size=(3, 5, 20))
    cov, grad = a @ a.swapaxes(1, 2) / 20, a[..., :5]
    solver = solver_for("newton", iterations)
    w = machine.kernels.inverse_sqrt(solver, machine.array(cov))
    check(machine, w, EXACT.inverse_sqrt(solver, cov), 1e-12)
    ds = machine.kernels.inverse_sqrt_adjoint(solver, machine.array(cov), machine.array(grad))
    check(machine, ds, EXACT.inverse_sqrt_adjoint(solver, cov, grad), 1e-10)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_one_nan_makes_every_element_of_its_matrix_not_finite(machine, iterations):
    cov = np.tile(np.eye(6), (3, 1, 1))
    cov[1, 4, 4] = np.nan
    solver, kernels = solver_for("newton", iterations), machine.kernels
    cov = machine.array(cov)
    for roots in (kernels.inverse_sqrt(solver, cov, 1e-5), kernels.inverse_sqrt_adjoint(solver, cov, cov, 1e-5)):
        assert np.isfinite(machine.numpy(roots)).all(axis=(1, 2)).tolist() == [True, False, True]
        assert not np.isfinite(machine.numpy(roots)[1]).any()


def no_launch(*arguments):
    raise AssertionError("a kernel was launched for a case without a variant")


@dataclass(frozen=True)
class Refusing:
    """A launcher that must not be called."""

    max_shared_memory: int = CpuLauncher.max_shared_memory
    multiprocessors = 2
    __call__ = staticmethod(no_launch)


REFUSING, TINY = (CupyKernels(array_api_compat.numpy, Refusing(*memory)) for memory in ((), (1024,)))


@pytest.mark.parametrize(
    ("blocks", "shape"),
    [
        (ChannelGroups(1, 65), (300, 65)),
        (SampleGroups(1, 65), (2, 65, 300)),
        *((ChannelGroups(1, 4), shape) for shape in ((0, 8, 5), (3, 0, 5), (3, 8, 0))),
        *((SampleGroups(1, 4), shape) for shape in ((0, 8, 5), (3, 0, 5), (3, 8, 0))),
    ],
    ids=str,
)
def test_more_than_64_variables_and_empty_arrays_have_the_plain_kernels(blocks, shape):
    spec, x = WhiteningSpec(blocks, NEWTON, 1e-5), np.random.default_rng(0).normal(size=shape)
    backend = backend_with(REFUSING)
    with np.errstate(invalid="ignore"):
        y, stats = backend.forward(spec, x, None, None)
        exact_y, exact_stats = EXACT_BACKEND.forward(spec, x, None, None)
        gradients = backend.backward(spec, x, None, None, stats, x)
        exact_gradients = EXACT_BACKEND.backward(spec, x, None, None, exact_stats, x)
    for actual, expected in zip((y, *stats, gradients[0]), (exact_y, *exact_stats, exact_gradients[0]), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("shape", [(9, 65), (0, 4)], ids=str)
def test_frozen_statistics_of_unsupported_arrays_have_the_plain_kernels(shape):
    x, mean, whitener = np.ones(shape), np.zeros(shape[1]), np.eye(shape[1])[None]
    y = backend_with(REFUSING).apply_frozen(1, x, mean, whitener, None, None)
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("shape", [(37, 11, 5), (9, 5, 11)], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_frozen_statistics(machine, dtype, shape):
    """The last group may be smaller than the others, and statistics may have another dtype than x."""
    rng = np.random.default_rng(0)
    axis = shape.index(11)
    x, weight = rng.normal(size=shape).astype(dtype), rng.normal(size=11).astype(dtype)
    mean, whitener = rng.normal(size=11), rng.normal(size=(2, 6, 6))
    y = machine.backend.apply_frozen(axis, *map(machine.array, (x, mean, whitener, weight, weight)))
    arrays = (np.float64(a) for a in (x, mean, whitener, weight, weight))
    assert y.dtype == dtype
    check(machine, y, EXACT_BACKEND.apply_frozen(axis, *arrays), TOLERANCE[dtype])


@pytest.mark.parametrize("method", ["newton", "eigh", "minimax"])
def test_other_solvers_and_small_devices_have_the_plain_kernels(method):
    solver, cov = solver_for(method, None), np.eye(5)[None] + 0.1
    kernels = TINY if method == "newton" else REFUSING
    np.testing.assert_array_equal(kernels.inverse_sqrt(solver, cov), EXACT.inverse_sqrt(solver, cov))
    adjoint = kernels.inverse_sqrt_adjoint(solver, cov, cov)
    np.testing.assert_array_equal(adjoint, EXACT.inverse_sqrt_adjoint(solver, cov, cov))
    terms = [Term(cov, np.ones((2, 1, 5, 3)), cov[0, :1])]
    y = TINY.affine_map(terms, None, 1, np.float64)
    np.testing.assert_array_equal(y, EXACT.affine_map(terms, None, 1, np.float64))


def test_statistics_that_all_reduce_returns_in_another_dtype_are_converted(machine):
    rng = np.random.default_rng(0)
    x, dy, weight = (rng.normal(size=shape).astype("float32") for shape in ((40, 12), (40, 12), (12,)))

    def all_reduce(array):
        return 2 * array.astype("float64")  # of two workers with the same samples

    spec = WhiteningSpec(ChannelGroups(1, 6), NEWTON, 1e-5, all_reduce)
    arrays = [machine.array(a) for a in (x, weight, weight)]
    y, stats = machine.backend.forward(spec, *arrays)
    gradients = machine.backend.backward(spec, *arrays, stats, machine.array(dy))
    exact = [np.float64(a) for a in (x, weight, weight)]
    exact_y, exact_stats = EXACT_BACKEND.forward(spec, *exact)
    exact_gradients = EXACT_BACKEND.backward(spec, *exact, exact_stats, np.float64(dy))
    for actual, expected in zip((y, *gradients), (exact_y, *exact_gradients), strict=True):
        assert actual.dtype == "float32"
        check(machine, actual, expected, 1e-5)


# ---------------------------------------------------------------- what a call costs the host


def costs(structure, blocks, shape, with_parameters):
    """Return the launches, allocations and operations of forward, and those of backward."""
    found = []
    counts = Counts()
    x, dy = (counted(np.zeros(shape, "float32"), counts) for _ in range(2))
    parameters = [counted(np.ones(shape[1], "float32"), counts) if with_parameters else None for _ in range(2)]
    backend = backend_with(CupyKernels(CountingNumPy(counts), NoLauncher(counts)))
    spec = WhiteningSpec(blocks, NEWTON, 1e-5)
    with use_gpu_launches(structure):
        for step in ("forward", "backward"):
            before = counts.allocations, counts.operations.total()
            counts.launches.clear()
            if step == "forward":
                _, stats = backend.forward(spec, x, *parameters)
            else:
                backend.backward(spec, x, *parameters, stats, dy)
            spent = counts.allocations - before[0], counts.operations.total() - before[1]
            found.append((tuple(counts.launches), *spent))
    return found


SEPARATE_FORWARD = ("partial_moments", "combine_moments", "newton", "affine_map")
SEPARATE_BACKWARD = ("partial_cross_moments", "combine_cross_moments", "newton_adjoint", "affine_map")
JOINED_FORWARD, JOINED_BACKWARD = ("joined_statistics", "whiten"), ("joined_gradient", "input_gradient")
ITER_NORM, GROUP_WHITENING = ChannelGroups(1, 16), SampleGroups(1, 16)


@pytest.mark.parametrize(
    ("structure", "blocks", "with_parameters", "in_forward", "in_backward"),
    [
        ("separate", ITER_NORM, False, (SEPARATE_FORWARD, 7, 0), (SEPARATE_BACKWARD, 6, 3)),
        ("separate", ITER_NORM, True, (SEPARATE_FORWARD, 7, 1), (SEPARATE_BACKWARD, 6, 7)),
        ("separate", GROUP_WHITENING, False, (SEPARATE_FORWARD, 7, 0), (SEPARATE_BACKWARD, 6, 3)),
        ("separate", GROUP_WHITENING, True, (SEPARATE_FORWARD, 7, 2), (("affine_map", *SEPARATE_BACKWARD), 7, 7)),
        ("joined", ITER_NORM, False, (JOINED_FORWARD, 5, 0), (JOINED_BACKWARD, 2, 0)),
        ("joined", ITER_NORM, True, (JOINED_FORWARD, 5, 0), (JOINED_BACKWARD, 4, 0)),
        ("joined", GROUP_WHITENING, False, (JOINED_FORWARD, 5, 0), (JOINED_BACKWARD, 2, 0)),
        ("joined", GROUP_WHITENING, True, (JOINED_FORWARD, 5, 0), (JOINED_BACKWARD, 4, 0)),
    ],
)
def test_the_number_of_launches_allocations_and_operations(structure, blocks, with_parameters, in_forward, in_backward):
    """Joined launches allocate their results (y and three statistics, or the gradients) and a workspace."""
    assert costs(structure, blocks, (32, 64, 7, 7), with_parameters) == [in_forward, in_backward]


JOINED = JoinedImplementation(REFUSING)


@pytest.mark.parametrize("solver", [solver_for("eigh", None), solver_for("newton", 300)], ids=["eigh", "many steps"])
def test_joined_launches_leave_other_solvers_to_the_separate_kernels(solver):
    x = np.ones((5, 4, 3), "float32")
    with use_gpu_launches("joined"):
        assert not JOINED.supports(WhiteningSpec(ChannelGroups(1, 2), solver, 1e-5), x, None, None)


@pytest.mark.parametrize(
    ("kernels", "shape", "dtype"),
    [
        (REFUSING, (300, 65), "float32"),
        (REFUSING, (0, 4), "float32"),
        (TINY, (9, 4), "float32"),
        (REFUSING, (9, 4), "longdouble"),
    ],
    ids=["65 variables", "nothing", "little shared memory", "another dtype"],
)
def test_joined_launches_leave_other_arrays_to_the_separate_kernels(kernels, shape, dtype):
    spec = WhiteningSpec(ChannelGroups(1, shape[1]), NEWTON, 1e-5)
    with use_gpu_launches("joined"):
        assert not JoinedImplementation(kernels).supports(spec, np.ones(shape, dtype), None, None)


def test_joined_launches_leave_statistics_that_are_not_saved_to_the_separate_kernels():
    spec, x = WhiteningSpec(ITER_NORM, NEWTON, 1e-5), np.ones((30, 16), "float32")
    mean, matrix = np.zeros((1, 16), "float32"), np.eye(16, dtype="float32")[None]
    none = [None] * 3
    with use_gpu_launches("joined"):
        assert JOINED.supports(spec, x, None, None, x, mean, matrix, matrix, *none)
        for stats in ((mean, matrix, None), (mean, matrix, np.float64(matrix)), (mean, matrix, matrix[:, :, ::-1])):
            assert not JOINED.supports(spec, x, None, None, x, *stats, *none)
        assert not JOINED.supports(spec, x, None, None, np.float64(x), mean, matrix, matrix, *none)
        assert not JOINED.supports(spec, x, None, None, x, mean, matrix, matrix, None, None, matrix)
        assert not JOINED.supports(replace(spec, all_reduce=np.copy), x, None, None)
    assert not JOINED.supports(spec, x, None, None)


@pytest.mark.parametrize(("name", "dtype"), [("Strides", passes.PASS_ARGS["x"]), ("Pass", passes.PASS_ARGS)])
def test_structures_of_arguments_have_the_fields_that_the_sources_declare(name, dtype):
    text = re.sub("//.*", "", launcher.source("pass.cuh"))
    body = re.search(rf"struct {name} {{(.*?)(}}|__device__)", text, re.DOTALL)[1]
    declared = [
        field for fields in re.findall(r"(?:long long|Strides) ([\w, ]+);", body) for field in fields.split(", ")
    ]
    assert tuple(declared) == dtype.names
    assert dtype.itemsize == sum(dtype[field].itemsize for field in dtype.names)  # no padding


# ---------------------------------------------------------------- arrays, devices and streams


def test_cupy_arrays_are_served_by_this_backend():
    class Mine(cupy.ndarray):
        pass

    assert framework_module(cupy.ndarray) == framework_module(Mine) == "polywhiten.cupy"


class FakeCuda:
    """The part of CuPy that the launcher calls, with two devices and any number of streams."""

    uint32 = np.uint32
    zeros = staticmethod(np.zeros)

    class ndarray:  # noqa: N801
        def __init__(self, device):
            self.data = SimpleNamespace(device_id=device)

    def __init__(self):
        self.device, self.stream, self.capturing, self.kernels = 0, 7, False, []
        self.cuda = SimpleNamespace(
            runtime=SimpleNamespace(getDevice=lambda: self.device),
            get_current_stream=lambda: SimpleNamespace(ptr=self.stream, is_capturing=lambda: self.capturing),
        )

    def RawModule(self, **options):  # noqa: N802
        self.kernels.append(FakeKernel())
        return SimpleNamespace(get_function=lambda name: self.kernels[-1])


class FakeKernel:
    """Counts the launches, and records requests for shared memory, each of which is a call of the driver."""

    def __init__(self):
        self.launches, self.settings, self._shared = 0, [], 48 * 1024

    @property
    def max_dynamic_shared_size_bytes(self):
        return self._shared

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size):
        self._shared = size
        self.settings.append(size)

    def __call__(self, grid, block, arguments, shared_mem):
        assert shared_mem <= self._shared
        self.launches += 1


@pytest.fixture
def fake(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(launcher, "cupy", fake)
    launcher._compiled.cache_clear(), launcher._compiled_for_any_memory.cache_clear()
    yield fake
    launcher._compiled.cache_clear(), launcher._compiled_for_any_memory.cache_clear()


def test_a_kernel_asks_for_shared_memory_once(fake):
    launch = launcher.CudaLauncher()
    for shared in (100_000, 100_000, 50_000, 100_000, 0):
        launch("newton.cu", "newton<float, 64>", 1, 256, (fake.ndarray(0), 1), shared)
    (kernel,) = fake.kernels
    assert kernel.launches == 5
    assert kernel.settings == [100_000]


def test_an_array_on_another_device_is_an_error_that_says_so(fake):
    launch = launcher.CudaLauncher()
    launch("newton.cu", "newton<float, 64>", 1, 256, (fake.ndarray(0), 5, fake.ndarray(0)))
    with pytest.raises(ValueError, match="an array is on device 1, but device 0 is the current one"):
        launch("newton.cu", "newton<float, 64>", 1, 256, (fake.ndarray(0), 5, fake.ndarray(1)))


def test_every_stream_device_thread_and_graph_has_separate_counters(fake):
    """Otherwise two launches that run at once would count each other's thread blocks."""
    counters = launcher.CudaLauncher().counters
    first = counters(3)
    assert counters(1000) is first
    assert not first.any()
    fake.stream = 8
    other = counters(3)
    fake.device = 1
    on_device_1 = counters(3)
    with ThreadPoolExecutor(1) as pool:
        in_thread = pool.submit(counters, 3).result()
    fake.capturing = True
    in_graphs = [counters(3), counters(3)]
    all_counters = [first, other, on_device_1, in_thread, *in_graphs]
    assert len({id(array) for array in all_counters}) == 6
    fake.capturing, fake.stream, fake.device = False, 7, 0
    assert counters(3) is first
    more = counters(first.size + 1)
    assert more.size > first.size
    assert counters(3) is more


def test_the_default_stream_is_not_asked_whether_it_is_captured(fake):
    """It can't be captured, and CuPy raises an error for the question."""
    fake.stream, fake.capturing = 0, True
    counters = launcher.CudaLauncher().counters
    assert counters(3) is counters(3)


@pytest.mark.skipif(HAS_DEVICE, reason="there is a CUDA device")
def test_without_a_device_info_says_why():
    version, devices, kernels = probe("cupy")
    assert version == cupy.__version__
    assert re.fullmatch(r"none: cudaError\w+|none", devices)
    assert kernels == "joined CUDA, CUDA, array API"


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("name", ["iter_norm", "group_whiten"])
def test_nothing_waits_for_the_device(structure, name):
    """A stream refuses to wait while a graph captures it. Launching the graph gives the same results again."""
    x = cupy.asarray(np.random.default_rng(0).normal(size=(32, 64, 14, 14)).astype("float32"))
    function = getattr(pw, f"{name}_vjp")
    with cupy.cuda.Stream(non_blocking=True) as stream:
        for _ in range(2):  # this compiles the kernels, and fills the memory pool
            y, pullback = function(x)
            expected = [a.copy() for a in (y, pullback(y)[0])]
        stream.synchronize()
        stream.begin_capture()
        y, pullback = function(x)
        dx = pullback(y)[0]
        graph = stream.end_capture()
        y.fill(0), dx.fill(0)
        graph.launch(stream)
        stream.synchronize()
        for actual, wanted in zip((y, dx), expected, strict=True):
            np.testing.assert_array_equal(actual.get(), wanted.get())


@pytest.mark.gpu
@needs_device
def test_calls_on_several_streams_at_once_give_the_same_results_as_one(structure):
    x = cupy.asarray(np.random.default_rng(0).normal(size=(64, 64, 28, 28)).astype("float32"))
    expected = pw.iter_norm(x).get()
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(4)]
    cupy.cuda.Device().synchronize()
    results = []
    for _ in range(5):
        for stream in streams:
            with stream:
                results.append(pw.iter_norm(x))
    cupy.cuda.Device().synchronize()
    for result in results:
        np.testing.assert_array_equal(result.get(), expected)


@pytest.mark.gpu
@needs_device
def test_tensors_of_pytorch_are_exchanged_without_copies():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    x = torch.randn(8, 6, 5, 4, device="cuda")
    shared = cupy.from_dlpack(x)
    assert shared.data.ptr == x.data_ptr()
    y = polywhiten.cupy.iter_norm(shared, group_size=3)
    back = torch.from_dlpack(y)
    assert back.data_ptr() == y.data.ptr
    torch.testing.assert_close(back.cpu(), pw.iter_norm(x.cpu(), group_size=3), atol=1e-4, rtol=0)
