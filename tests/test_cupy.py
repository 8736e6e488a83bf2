"""What only CuPy has: kernels in CUDA. They compile without a device, and run, emulated, on a CPU."""

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
from polywhiten.blocks import ChannelGroups, SampleGroups
from polywhiten.cli.info import probe
from polywhiten.cupy.implementation import CupyImplementation
from polywhiten.cupy.joined import JoinedWhitening
from polywhiten.dispatch import framework_module
from polywhiten.gpu_launches import CHOICES, use_gpu_launches
from polywhiten.kernels import Kernels, Term
from polywhiten.reference import Reference
from polywhiten.solvers import solver_for
from polywhiten.spec import WhiteningSpec

cupy = pytest.importorskip("cupy")

import polywhiten.cupy  # noqa: E402
from polywhiten.cupy import launcher, passes  # noqa: E402
from polywhiten.cupy.kernels import CupyKernels  # noqa: E402
from polywhiten.cupy.variants import SIZES, TYPES  # noqa: E402

HAS_DEVICE = cupy.cuda.is_available()
needs_device = pytest.mark.skipif(not HAS_DEVICE, reason="cupy sees no CUDA device")

ACCUMULATORS = ("float", "double")
PAIRS = ("half, half", "float, half", "float, float", "double, double")  # of dy and x
MAPS = ("half, half, half", "half, half, float", "float, half, half", "float, float, float", "double, double, double")
KERNELS = {
    "moments.cu": {"moments": ("half", *ACCUMULATORS), "finish_moments": ACCUMULATORS},
    "cross_moments.cu": {"cross_moments": PAIRS, "finish_cross_moments": ACCUMULATORS},
    "affine_map.cu": {"affine_map": MAPS},
    "newton.cu": {"newton": ACCUMULATORS, "newton_adjoint": ACCUMULATORS},
    "joined_statistics.cu": {"find_statistics": TYPES.values()},
    "joined_gradient.cu": {"find_gradient": TYPES.values()},
    "joined_maps.cu": {"whiten": TYPES.values(), "pull_back": TYPES.values()},
}
VARIANTS = {
    file: [
        f"{kernel}<{types}, {size}>" for kernel, all_types in kernels.items() for types in all_types for size in SIZES
    ]
    for file, kernels in KERNELS.items()
}


# ---------------------------------------------------------------- compiled, without a device


def most_shared(kernel):
    """Bytes, beside what a launch gives: the host has these bounds, for what can run at a time."""
    name, first_type, *_, size = re.findall(r"\w+", kernel)
    joined = {"find_statistics": passes.STATISTICS_STATIC, "find_gradient": passes.GRADIENT_STATIC}.get(name)
    if joined:
        return joined[int(size)] * 1024 * (2 if first_type == "double" else 1)
    return 4096 if name in ("affine_map", "newton", "newton_adjoint", "whiten", "pull_back") else 48 * 1024


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("file", VARIANTS)
def test_every_variant_compiles_and_keeps_to_its_registers_and_shared_memory(file, arch, record_property):
    from cupy.cuda.compiler import _NVRTCProgram  # the public function asks for a device

    names = VARIANTS[file]
    if file.startswith("joined"):  # they take long; float16 differs from float32 by what it loads
        names = [name for name in names if ("half" in name) == (arch == "sm_80")]
    log = StringIO()
    program = _NVRTCProgram(launcher.source(file), file, name_expressions=names, method="cubin")
    _, mangled = program.compile((*launcher.OPTIONS, f"--gpu-architecture={arch}", "--ptxas-options=-v"), log)
    kernels = {name: kernel for kernel, name in mangled.items()}
    report = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers(?:.*?(\d+) bytes smem)?",
        log.getvalue().replace("\0", ""),
        re.DOTALL,
    )
    assert {kernels[name] for name, *_ in report} == set(names)
    for name, *numbers in report:
        spilled, registers, shared = (int(number or 0) for number in numbers)
        record_property("resources", f"{kernels[name]:<36} {arch} {registers:>3} registers, {shared:>6} bytes shared")
        # what joined kernels know of their launch may wait elsewhere while the sums take all registers
        assert spilled <= (32 if file.startswith("joined") else 0), kernels[name]
        assert shared <= most_shared(kernels[name]), kernels[name]


@pytest.mark.parametrize("file", VARIANTS)
def test_float32_is_not_computed_with_in_float64(file):
    """That is slow on many devices, and rounds otherwise: eps comes as float64, and is converted."""
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
    """CuPy's kernels over arrays of some library."""

    kernels: CupyKernels
    array: Any
    numpy: Any


@cache
def emulated(build):
    xp = GuardedNumPy()
    launch = CpuLauncher(xp, Path(launcher.__file__).parent, VARIANTS, build)
    return Machine(CupyKernels(xp, launch), lambda a: a, lambda a: a)


def larger(machine):
    """The same with as many processors as devices have, if it is emulated."""
    launch = copy(machine.kernels.launch)
    if isinstance(launch, CpuLauncher):
        launch.processors = 100
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
    return Machine(polywhiten.cupy.BACKEND.kernels, cupy.asarray, cupy.asnumpy)


@pytest.fixture(params=CHOICES)
def structure(request):
    with use_gpu_launches(request.param):
        yield request.param


EXACT = Kernels(array_api_compat.numpy)


def forward(kernels, spec, *arrays):
    return (CupyImplementation if isinstance(kernels, CupyKernels) else Reference)(kernels).forward(spec, *arrays)


def backward(kernels, spec, *arrays):
    return (CupyImplementation if isinstance(kernels, CupyKernels) else Reference)(kernels).backward(spec, *arrays)


TOLERANCE = {"float16": 2e-3, "float32": 1e-5, "float64": 1e-12}

# Of (p, q, d, l) arrays: the block axis, the shape for d variables, and the order in which the axes lie in memory.
LAYOUTS = {
    "channels first": (1, lambda d: (5, 2, d, 37), (0, 1, 2, 3)),
    "channels last": (1, lambda d: (600, 2, d, 1), (0, 1, 2, 3)),
    "channels last in memory alone": (1, lambda d: (4, 2, d, 33), (0, 3, 1, 2)),
    "samples, channels first": (0, lambda d: (3, 1, d, 130), (0, 1, 2, 3)),
    "samples, channels last": (0, lambda d: (2, 40, d, 5), (0, 1, 2, 3)),
    "two values a variable": (0, lambda d: (2, 1, d, 2), (2, 0, 3, 1)),
}


def draw(machine, shape, dtype, order=(0, 1, 2, 3), seed=0, mean=3.0):
    """Random numbers, every second one of a larger array of NaN; and the same as float64 of NumPy."""
    rng = np.random.default_rng(seed)
    spread = [shape[i] for i in order]
    values = rng.normal(mean, 1, [*spread[:-1], 2 * spread[-1]]).astype(dtype)
    values[..., 1::2] = np.nan
    back = np.argsort(order)
    return machine.array(values)[..., ::2].transpose(back), np.float64(values[..., ::2].transpose(back))


def check(machine, actual, expected, tolerance):
    actual = machine.numpy(actual)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1, np.max(np.abs(expected))))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("d", [1, 4, 13, 32, 50, 64])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_kernels_are_the_plain_ones(machine, dtype, d, layout):
    block_axis, shape, order = LAYOUTS[layout]
    kernels, newton = machine.kernels, solver_for("newton", 5)
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
    """In half precision the gradient of y arrives in float32 where weights don't fold into the whitener."""
    rng = np.random.default_rng(0)
    given = [a.astype(dtype) for a in (rng.normal(2, 3, shape), rng.uniform(1, 2, 12), rng.normal(size=12))]
    dy = rng.normal(size=shape).astype(dtype)
    plan = WhiteningSpec(blocks, solver_for("newton", 5), 1e-5)
    x, weight, bias = (machine.array(a) for a in given)
    y, stats = forward(machine.kernels, plan, x, weight, bias)
    gradients = backward(machine.kernels, plan, x, weight, bias, stats, machine.array(dy))
    exact = [np.float64(a) for a in given]
    exact_y, exact_stats = forward(EXACT, plan, *exact)
    exact_gradients = backward(EXACT, plan, *exact, exact_stats, np.float64(dy))
    for actual, expected in zip((y, *gradients), (exact_y, *exact_gradients), strict=True):
        assert actual.dtype == dtype
        check(machine, actual, expected, 10 * TOLERANCE[dtype] if dtype != "float16" else 5e-3)


def check_whitening(machine, blocks, shape, dtype, parameter_dtypes, order=None):
    """Forward and backward against the plain kernels in float64."""
    rng = np.random.default_rng(0)
    order = order or tuple(range(len(shape)))
    x, exact_x = draw(machine, shape, dtype, order)
    dy, exact_dy = draw(machine, shape, dtype, order, seed=1, mean=0.5)
    channels = shape[blocks.axis]
    exact = [None if name is None else rng.uniform(1, 2, channels).astype(name) for name in parameter_dtypes]
    # with gaps, as a slice of a larger array has them
    given = [None if each is None else machine.array(np.repeat(each, 2))[::2] for each in exact]
    exact = [None if each is None else np.float64(each) for each in exact]
    plan = WhiteningSpec(blocks, solver_for("newton", 5), 1e-3)
    y, stats = forward(machine.kernels, plan, x, *given)
    gradients = backward(machine.kernels, plan, x, *given, stats, dy)
    exact_y, exact_stats = forward(EXACT, plan, exact_x, *exact)
    exact_gradients = backward(EXACT, plan, exact_x, *exact, exact_stats, exact_dy)
    tolerance = 5e-3 if "float16" in (dtype, *parameter_dtypes) else {"float32": 1e-4, "float64": 1e-11}[dtype]
    for actual, expected in zip((*stats, y, *gradients), (*exact_stats, exact_y, *exact_gradients), strict=True):
        if expected is None:
            assert actual is None
        else:
            check(machine, actual, expected, tolerance)
    assert [None if each is None else each.dtype.name for each in (y, *gradients)] == [dtype, dtype, *parameter_dtypes]


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
def test_many_programs_for_each_block(machine, structure, layout):
    """They are added up as a tree where the launches are joined, and channels are spread over programs."""
    blocks, shape, order = WHITENED[layout]
    check_whitening(larger(machine), blocks, shape, "float64", ("float64", "float64"), order)


@pytest.mark.parametrize("shape", [(16, 2, 8, 40), (640, 2, 8, 1)])
def test_a_mean_far_above_the_spread_costs_float32_no_more_than_its_digits(machine, shape):
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
def test_constant_channels_have_exactly_no_variance_and_finite_roots(machine, dtype):
    x = machine.array(np.full((7, 2, 9, 11), 0.1, dtype))
    mean, cov = machine.kernels.moments(x, 1)
    assert (machine.numpy(mean) == np.asarray(0.1, dtype)).all()
    assert (machine.numpy(cov) == 0).all()
    newton = solver_for("newton", 5)
    w = machine.kernels.inverse_sqrt(newton, cov)
    y = machine.kernels.affine_map([Term(w, x, mean)], None, 1, x.dtype)
    assert (machine.numpy(y) == 0).all()
    assert np.isfinite(machine.numpy(w)).all()
    assert np.isfinite(machine.numpy(machine.kernels.inverse_sqrt_adjoint(newton, cov, cov, 1e-5))).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_spoils_its_own_block_alone(machine, structure, bad):
    values = np.random.default_rng(0).normal(size=(6, 2, 20, 30)).astype("float32")
    values[2, 1, 5, 3] = bad
    plan = WhiteningSpec(ChannelGroups(1, 20), solver_for("newton", 5), 1e-5)
    x = machine.array(values.reshape(6, 40, 30))
    with np.errstate(invalid="ignore"):
        y, stats = forward(machine.kernels, plan, x, None, None)
        dx, _, _ = backward(machine.kernels, plan, x, None, None, stats, y)
    for array in (machine.numpy(y), machine.numpy(dx)):
        assert np.isfinite(array[:, :20]).all()
        assert not np.isfinite(array[:, 20:]).any()


@pytest.mark.parametrize("iterations", [1, 2, 3, 300])
def test_any_number_of_steps(machine, iterations):
    """Also so many that what a tile has beyond the matrix would have overflowed."""
    a = np.random.default_rng(0).normal(size=(3, 5, 20))
    cov, grad = a @ a.swapaxes(1, 2) / 20, a[..., :5]
    solver = solver_for("newton", iterations)
    w = machine.kernels.inverse_sqrt(solver, machine.array(cov))
    check(machine, w, EXACT.inverse_sqrt(solver, cov), 1e-12)
    ds = machine.kernels.inverse_sqrt_adjoint(solver, machine.array(cov), machine.array(grad))
    check(machine, ds, EXACT.inverse_sqrt_adjoint(solver, cov, grad), 1e-10)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_one_nan_leaves_nothing_finite_of_its_matrix(machine, iterations):
    cov = np.tile(np.eye(6), (3, 1, 1))
    cov[1, 4, 4] = np.nan
    solver, kernels = solver_for("newton", iterations), machine.kernels
    cov = machine.array(cov)
    for roots in (kernels.inverse_sqrt(solver, cov, 1e-5), kernels.inverse_sqrt_adjoint(solver, cov, cov, 1e-5)):
        assert np.isfinite(machine.numpy(roots)).all(axis=(1, 2)).tolist() == [True, False, True]
        assert not np.isfinite(machine.numpy(roots)[1]).any()


def no_launch(*arguments):
    raise AssertionError("a case that the kernels are not made for was launched")


@dataclass(frozen=True)
class Refusing:
    """A launcher that nothing may reach."""

    shared_memory: int = CpuLauncher.shared_memory
    processors = 2
    __call__ = staticmethod(no_launch)


PLAIN, TINY = (CupyKernels(array_api_compat.numpy, Refusing(*memory)) for memory in ((), (1024,)))


@pytest.mark.parametrize("shape", [(3, 2, 65, 5), (0, 2, 4, 5), (3, 0, 4, 5), (3, 2, 4, 0)], ids=str)
@pytest.mark.parametrize("block_axis", [0, 1])
def test_more_than_64_variables_and_nothing_have_the_plain_kernels(shape, block_axis):
    x = np.random.default_rng(0).normal(size=shape)
    mean, cov = PLAIN.moments(x, block_axis)
    np.testing.assert_array_equal(cov, EXACT.moments(x, block_axis)[1])
    s, _ = PLAIN.cross_moments(x, x, mean, block_axis)
    np.testing.assert_array_equal(s, EXACT.cross_moments(x, x, mean, block_axis)[0])
    terms = [Term(cov, x, mean)]
    y = PLAIN.affine_map(terms, None, block_axis, x.dtype)
    np.testing.assert_array_equal(y, EXACT.affine_map(terms, None, block_axis, x.dtype))


@pytest.mark.parametrize("method", ["newton", "eigh", "minimax"])
def test_other_solvers_and_small_devices_have_the_plain_kernels(method):
    solver, cov = solver_for(method, None), np.eye(5)[None] + 0.1
    kernels = TINY if method == "newton" else PLAIN
    np.testing.assert_array_equal(kernels.inverse_sqrt(solver, cov), EXACT.inverse_sqrt(solver, cov))
    adjoint = kernels.inverse_sqrt_adjoint(solver, cov, cov)
    np.testing.assert_array_equal(adjoint, EXACT.inverse_sqrt_adjoint(solver, cov, cov))
    terms = [Term(cov, np.ones((2, 1, 5, 3)), cov[0, :1])]
    y = TINY.affine_map(terms, None, 1, np.float64)
    np.testing.assert_array_equal(y, EXACT.affine_map(terms, None, 1, np.float64))


def test_statistics_of_another_precision_have_the_plain_kernels():
    x, matrix, mean = np.ones((3, 1, 2, 4), "float32"), np.eye(2)[None], np.zeros((1, 2))
    y = PLAIN.affine_map([Term(matrix, x, mean)], None, 1, x.dtype)
    np.testing.assert_array_equal(y, x)
    s, _ = PLAIN.cross_moments(x, x, mean, 1)
    np.testing.assert_array_equal(s, [[12, 12]])


# ---------------------------------------------------------------- what a call costs the host


def costs(structure, blocks, shape, with_parameters):
    """Launches, allocations and operations of forward, and of backward."""
    found = []
    counts = Counts()
    x, dy = (counted(np.zeros(shape, "float32"), counts) for _ in range(2))
    given = [counted(np.ones(shape[1], "float32"), counts) if with_parameters else None for _ in range(2)]
    kernels = CupyKernels(CountingNumPy(counts), NoLauncher(counts))
    plan = WhiteningSpec(blocks, solver_for("newton", 5), 1e-5)
    with use_gpu_launches(structure):
        for step in ("forward", "backward"):
            before = counts.allocations, counts.operations.total()
            counts.launches.clear()
            if step == "forward":
                _, stats = forward(kernels, plan, x, *given)
            else:
                backward(kernels, plan, x, *given, stats, dy)
            spent = counts.allocations - before[0], counts.operations.total() - before[1]
            found.append((tuple(counts.launches), *spent))
    return found


SEPARATE_FORWARD = ("moments", "finish_moments", "newton", "affine_map")
SEPARATE_BACKWARD = ("cross_moments", "finish_cross_moments", "newton_adjoint", "affine_map")
JOINED_FORWARD, JOINED_BACKWARD = ("find_statistics", "whiten"), ("find_gradient", "pull_back")
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
    """Joined ones allocate their results (y and three statistics, or the gradients) and memory to work in."""
    assert costs(structure, blocks, (32, 64, 7, 7), with_parameters) == [in_forward, in_backward]


@pytest.mark.parametrize("solver", [solver_for("eigh", None), solver_for("newton", 300)], ids=["eigh", "many steps"])
def test_joined_launches_leave_other_solvers_to_the_separate_kernels(solver):
    x = np.ones((5, 4, 3), "float32")
    with use_gpu_launches("joined"):
        assert JoinedWhitening.of(PLAIN, WhiteningSpec(ChannelGroups(1, 2), solver, 1e-5), x) is None


@pytest.mark.parametrize(
    ("kernels", "shape", "dtype"),
    [
        (PLAIN, (300, 65), "float32"),
        (PLAIN, (0, 4), "float32"),
        (TINY, (9, 4), "float32"),
        (PLAIN, (9, 4), "longdouble"),
    ],
    ids=["65 variables", "nothing", "little shared memory", "another dtype"],
)
def test_joined_launches_leave_other_arrays_to_the_separate_kernels(kernels, shape, dtype):
    plan = WhiteningSpec(ChannelGroups(1, shape[1]), solver_for("newton", 5), 1e-5)
    with use_gpu_launches("joined"):
        assert JoinedWhitening.of(kernels, plan, np.ones(shape, dtype)) is None


def test_joined_launches_leave_statistics_that_are_not_kept_to_the_separate_kernels():
    plan, x = WhiteningSpec(ITER_NORM, solver_for("newton", 5), 1e-5), np.ones((30, 16), "float32")
    mean, matrix = np.zeros((1, 16), "float32"), np.eye(16, dtype="float32")[None]
    with use_gpu_launches("joined"):
        assert JoinedWhitening.of(PLAIN, plan, x, x, mean, matrix, matrix) is not None
        for others in ((mean, matrix, None), (mean, matrix, np.float64(matrix)), (mean, matrix, matrix[:, :, ::-1])):
            assert JoinedWhitening.of(PLAIN, plan, x, x, *others) is None
        assert JoinedWhitening.of(PLAIN, plan, x, np.float64(x), mean, matrix, matrix) is None


# ---------------------------------------------------------------- users and their devices


def test_cupy_arrays_are_served_by_this_backend():
    class Mine(cupy.ndarray):
        pass

    assert framework_module(cupy.ndarray) == framework_module(Mine) == "polywhiten.cupy"


class FakeCuda:
    """As much of CuPy as the launcher calls, with two devices and any number of streams."""

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
    """Counts how often it is given memory, which is a call of the driver, and launched."""

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


def test_every_stream_device_thread_and_graph_has_counters_of_its_own(fake):
    """Else two launches that run at once would count each other's programs."""
    counters = launcher.CudaLauncher().counters
    first = counters(3)
    assert counters(1000) is first
    assert not first.any()
    fake.stream = 8
    other = counters(3)
    fake.device = 1
    on_device_1 = counters(3)
    with ThreadPoolExecutor(1) as pool:
        of_thread = pool.submit(counters, 3).result()
    fake.capturing = True
    of_graphs = [counters(3), counters(3)]
    every = [first, other, on_device_1, of_thread, *of_graphs]
    assert len({id(each) for each in every}) == 6
    fake.capturing, fake.stream, fake.device = False, 7, 0
    assert counters(3) is first
    more = counters(first.size + 1)
    assert more.size > first.size
    assert counters(3) is more


def test_the_default_stream_is_not_asked_whether_it_is_captured(fake):
    """It can't be, and CuPy refuses to ask."""
    fake.stream, fake.capturing = 0, True
    counters = launcher.CudaLauncher().counters
    assert counters(3) is counters(3)


@pytest.mark.skipif(HAS_DEVICE, reason="there is a CUDA device")
def test_without_a_device_info_says_why():
    version, devices, kernels = probe("cupy")
    assert version == cupy.__version__
    assert re.fullmatch(r"none: cudaError\w+|none", devices)
    assert kernels == "CUDA, array API"


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("name", ["iter_norm", "group_whiten"])
def test_nothing_waits_for_the_device(structure, name):
    """A stream that is being captured in a graph refuses whatever would wait; the graph gives the same again."""
    x = cupy.asarray(np.random.default_rng(0).normal(size=(32, 64, 14, 14)).astype("float32"))
    function = getattr(pw, f"{name}_vjp")
    with cupy.cuda.Stream(non_blocking=True) as stream:
        for _ in range(2):  # kernels are compiled, and memory is taken from the pool
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
def test_calls_on_several_streams_at_once_give_what_each_gives_alone(structure):
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
def test_pytorch_lends_a_tensor_and_gets_the_result_without_copies():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    x = torch.randn(8, 6, 5, 4, device="cuda")
    lent = cupy.from_dlpack(x)
    assert lent.data.ptr == x.data_ptr()
    y = polywhiten.cupy.iter_norm(lent, group_size=3)
    back = torch.from_dlpack(y)
    assert back.data_ptr() == y.data.ptr
    torch.testing.assert_close(back.cpu(), pw.iter_norm(x.cpu(), group_size=3), atol=1e-4, rtol=0)
