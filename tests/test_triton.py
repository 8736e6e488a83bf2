"""Triton's kernels: compiled without a device, run on a device, or run on the CPU with TRITON_INTERPRET=1."""

import os
import re
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import array_api_compat.torch as xp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

import polywhiten as pw  # noqa: E402
from polywhiten import analysis  # noqa: E402
from polywhiten.blocks import ChannelGroups, SampleGroups  # noqa: E402
from polywhiten.gpu_launches import CHOICES, use_gpu_launches  # noqa: E402
from polywhiten.kernels import Kernels, Term  # noqa: E402
from polywhiten.reference import Reference  # noqa: E402
from polywhiten.solvers import solver_for  # noqa: E402
from polywhiten.spec import WhiteningSpec  # noqa: E402
from polywhiten.statistics import NO_STATISTICS  # noqa: E402
from polywhiten.torch import GroupWhitening, IterNorm  # noqa: E402
from polywhiten.torch.triton import plan_cache, sample_parts, tiles  # noqa: E402
from polywhiten.torch.triton.joined import JoinedKernels  # noqa: E402
from polywhiten.torch.triton.kernels import TritonKernels  # noqa: E402
from polywhiten.torch.triton.separate import SeparateImplementation  # noqa: E402

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"
compiled = pytest.mark.skipif(IS_INTERPRETED, reason="TRITON_INTERPRET is 1: nothing is compiled")


class AnywhereSeparate(SeparateImplementation):
    """Accept tensors on the CPU too."""

    def is_on_device(self, x):
        return True


class AnywhereJoined(JoinedKernels):
    """Accept tensors on the CPU too."""

    def is_on_device(self, x):
        return True


def needs_device(test):
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE == "cpu", reason="PyTorch sees no CUDA device")(test))


def runs(test):
    """Run a test in Triton's interpreter, or else on a device."""
    return test if IS_INTERPRETED else needs_device(test)


KERNELS, EXACT_KERNELS = TritonKernels(xp), Kernels(xp)
SEPARATE, EXACT = AnywhereSeparate(), Reference(EXACT_KERNELS)
HALF = (torch.float16, torch.bfloat16)


def in_float32(operand):
    """Return an operand of Triton's interpreter, which keeps the bits of bfloat16 as integers."""
    values = np.ascontiguousarray(operand.data)
    if operand.dtype.scalar.is_bf16():
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def cut_off(values):
    """Return the values without the binary digits that TF32 has no room for."""
    return (values.view(np.int32) & -8192).view(np.float32).astype(np.float64)


@pytest.fixture(autouse=IS_INTERPRETED)
def products_of_bfloat16(monkeypatch):
    """Let Triton's interpreter multiply numbers in bfloat16, not their bits."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(self, a, b, total, input_precision, max_num_imprecise_acc):
        return TensorHandle(in_float32(a) @ in_float32(b) + total.data, total.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@pytest.fixture
def tensor_cores(monkeypatch):
    """Let Triton's interpreter multiply as tensor cores do: in TF32 or 16 bits, and cut off the last digits of sums."""
    if not IS_INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(self, a, b, total, input_precision, max_num_imprecise_acc):
        left, right = cut_off(in_float32(a)), cut_off(in_float32(b))  # which has room for numbers of 16 bits
        result = total.data.astype(np.float32)
        at_once = 256 // a.dtype.primitive_bitwidth
        for k in range(0, left.shape[-1], at_once):
            exact = result + left[:, k : k + at_once] @ right[k : k + at_once]
            result = exact.astype(np.float32)
            result = np.where(np.abs(result) > np.abs(exact), np.nextafter(result, np.float32(0)), result)
        return TensorHandle(result, total.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@pytest.fixture
def triton_backend(monkeypatch):
    """Let the public functions and layers use Triton's kernels for tensors on the CPU."""
    backend = pw.torch.BACKEND
    # the plain implementation is the next one, as on a device
    monkeypatch.setattr(backend, "implementations", (SEPARATE, backend.implementations[-1]))
    monkeypatch.setattr(backend, "joined", AnywhereJoined())


def error(actual, exact):
    """Return the largest difference relative to the largest value."""
    return ((actual.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)).item()


def in_float64(*tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


def normal(*shape, dtype=torch.float32, seed=0, mean=3.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean).to(DEVICE, dtype)


# (p, q, d, l) and the block axis: d in each class of sizes, samples that fill no tile or several, and every layout
SHAPES = [
    pytest.param((3, 2, 5, 49), 1, id="d=5 channels first"),
    pytest.param((150, 2, 16, 1), 1, id="d=16 channels last"),
    pytest.param((2, 1, 20, 300), 0, id="d=20 samples, channels first"),
    pytest.param((2, 30, 32, 6), 0, id="d=32 samples, channels last"),
    pytest.param((140, 1, 50, 1), 1, id="d=50 channels last"),
    pytest.param((2, 1, 64, 70), 1, id="d=64 channels first"),
    pytest.param((2, 1, 70, 40), 1, id="d=70 channels first"),
    pytest.param((5, 1, 1, 7), 1, id="d=1"),
]
# Every shape and dtype compiles its own kernels, which takes most of the time on a device. So half precision is tried
# once for every class of sizes; its two dtypes differ only in what is loaded and stored.
HALF_OF = {
    "d=5 channels first": torch.bfloat16,
    "d=16 channels last": torch.float16,
    "d=32 samples, channels last": torch.bfloat16,
    "d=64 channels first": torch.bfloat16,
    "d=70 channels first": torch.bfloat16,
}
SHAPES_AND_DTYPES = [
    pytest.param(*shape.values, dtype, id=f"{shape.id}, {dtype}")
    for shape in SHAPES
    for dtype in (torch.float32, HALF_OF.get(shape.id))
    if dtype is not None
]


@runs
@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize(("shape", "block_axis", "dtype"), SHAPES_AND_DTYPES)
def test_moments_and_maps_are_those_of_float64(shape, block_axis, dtype):
    x, dy = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1, mean=0)
    limit = 1e-5 if dtype == torch.float32 else 1e-3  # half precision is multiplied in TF32
    mean, cov = KERNELS.moments(x, block_axis)
    exact_mean, exact_cov = EXACT_KERNELS.moments(x.double(), block_axis)
    assert error(mean, exact_mean) < 1e-6
    assert error(cov, exact_cov) < limit
    for actual, exact in zip(
        KERNELS.cross_moments(dy, x, mean, block_axis),
        EXACT_KERNELS.cross_moments(*in_float64(dy, x, mean), block_axis),
        strict=True,
    ):
        assert error(actual, exact) < limit
    blocks, d = mean.shape
    a, b, bias = normal(blocks, d, d, seed=2), normal(blocks, d, d, seed=3).mT, normal(blocks, d, seed=4)
    one, two = [Term(a, x, mean)], [Term(b, dy, bias), Term(a, x, mean)]
    for terms, shift, result in ((one, bias, torch.float32), (two, None, dtype)):
        exact = EXACT_KERNELS.affine_map(
            [Term(*in_float64(*term)) for term in terms], *in_float64(shift), block_axis, xp.float64
        )
        actual = KERNELS.affine_map(terms, shift, block_axis, result)
        assert actual.dtype == result
        assert error(actual, exact) < max(limit, torch.finfo(result).eps)


@runs
@pytest.mark.usefixtures("tensor_cores")
def test_sums_over_many_samples_are_as_exact():
    x = normal(40_000, 1, 2, 1, mean=0)
    assert error(KERNELS.moments(x, 1)[1], EXACT_KERNELS.moments(x.double(), 1)[1]) < 2e-5


@runs
@pytest.mark.parametrize(("d", "iterations"), [(1, 2), (9, 1), (9, 2), (9, 5), (16, 5), (20, 3), (60, 3), (80, 2)])
def test_newton_and_its_gradient_are_those_of_float64(d, iterations):
    factor, grad = normal(2, d, 2 * d, mean=0), normal(2, d, d, seed=1, mean=0)
    cov, solver = factor @ factor.mT / d, solver_for("newton", iterations)
    for kernel, given in (("inverse_sqrt", (cov,)), ("inverse_sqrt_adjoint", (cov, grad))):
        exact = getattr(EXACT_KERNELS, kernel)(solver, *in_float64(*given), 1e-2)
        assert error(getattr(KERNELS, kernel)(solver, *given, 1e-2), exact) < 1e-5


CHANNELS_FIRST, CHANNELS_LAST = ((2, 12, 5, 7), SampleGroups(1, 4)), ((2, 5, 7, 60), SampleGroups(3, 20))
BOTH = (True, True)  # weight and bias


@runs
@pytest.mark.parametrize("max_elements", [2**16, 1], ids=["in one launch", "in several"])
@pytest.mark.parametrize(
    ("shape", "blocks", "parameters", "dtype"),
    [
        # Not every combination: each compiles its own kernels, and these know nothing of a layout but its strides.
        *((*CHANNELS_FIRST, there, torch.float32) for there in (BOTH, (True, False), (False, True), (False, False))),
        (*CHANNELS_FIRST, BOTH, torch.bfloat16),
        *((*CHANNELS_LAST, BOTH, dtype) for dtype in (torch.float32, torch.bfloat16)),
        ((3, 24), SampleGroups(1, 4), BOTH, torch.float32),
        ((2, 3, 12, 5), SampleGroups(2, 4), BOTH, torch.float32),
    ],
    ids=str,
)
def test_group_whitening_is_that_of_float64(monkeypatch, shape, blocks, parameters, dtype, max_elements):
    monkeypatch.setattr(sample_parts, "MAX_SAMPLE_ELEMENTS", max_elements)
    channels = shape[blocks.axis]
    x, dy = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1)
    weight, bias = (
        normal(channels, seed=seed) if there else None for there, seed in zip(parameters, (2, 3), strict=True)
    )
    spec = WhiteningSpec(blocks, solver_for("newton", 3), 1e-3)
    y, stats = SEPARATE.forward(spec, x, weight, bias)
    gradients = SEPARATE.backward(spec, x, weight, bias, stats, dy, NO_STATISTICS)
    given = in_float64(x, weight, bias)
    exact, exact_stats = EXACT.forward(spec, *given)
    exact_gradients = EXACT.backward(spec, *given, exact_stats, dy.double())
    for actual, wanted in zip((y, *stats, *gradients), (exact, *exact_stats, *exact_gradients), strict=True):
        assert (actual is None) == (wanted is None)
        if actual is not None:
            assert error(actual, wanted) < (1e-4 if dtype == torch.float32 else 2e-2)


@runs
def test_gradients_of_the_statistics_reach_the_input_of_group_whitening():
    x = normal(2, 12, 5, 7)
    spec = WhiteningSpec(SampleGroups(1, 4), solver_for("newton", 3), 1e-3)
    y, stats = SEPARATE.forward(spec, x, None, None)
    dstats = type(stats)(*(normal(*each.shape, seed=4) for each in stats))
    dx, *_ = SEPARATE.backward(spec, x, None, None, stats, y, dstats)
    exact_dstats = type(stats)(*in_float64(*dstats))
    exact, *_ = EXACT.backward(spec, x.double(), None, None, type(stats)(*in_float64(*stats)), y.double(), exact_dstats)
    assert error(dx, exact) < 1e-5


@runs
@pytest.mark.parametrize("blocks", [ChannelGroups(1, 4), SampleGroups(1, 4)], ids=["IterNorm", "group whitening"])
@pytest.mark.parametrize("all_reduce", [None, lambda a: 2 * a], ids=["alone", "two workers with the same samples"])
def test_other_solvers_and_workers_get_results_as_those_of_float64(blocks, all_reduce):
    spec = WhiteningSpec(blocks, solver_for("eigh", None), 1e-2, all_reduce)
    x, dy, weight, bias = normal(40, 12, 3), normal(40, 12, 3, seed=1), normal(12, seed=2), normal(12, seed=3)
    y, stats = SEPARATE.forward(spec, x, weight, bias)
    gradients = SEPARATE.backward(spec, x, weight, bias, stats, dy)
    exact_y, exact_stats = EXACT.forward(spec, *in_float64(x, weight, bias))
    exact_gradients = EXACT.backward(spec, *in_float64(x, weight, bias), exact_stats, dy.double())
    for actual, exact in zip((y, *stats, *gradients), (exact_y, *exact_stats, *exact_gradients), strict=True):
        assert error(actual, exact) < 1e-3


@runs
def test_a_mean_far_above_the_standard_deviation_costs_no_digits():
    x = normal(40, 1, 16, 9, mean=1e3)
    mean, cov = KERNELS.moments(x, 1)
    y = KERNELS.affine_map([Term(torch.eye(16, device=DEVICE)[None], x, mean)], None, 1, torch.float32)
    assert error(cov, EXACT_KERNELS.moments(x.double(), 1)[1]) < 1e-5
    assert error(y, x.double() - x.double().mean((0, 3), keepdim=True)) < 1e-4


@runs
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("channels", [20, 200], ids=["a tile", "more channels than a tile has"])
def test_covariances_of_activations_are_those_of_float64(channels, monkeypatch):
    sizes, moments = [], TritonKernels.moments
    monkeypatch.setattr(
        TritonKernels, "moments", lambda self, x, axis: sizes.append(x.shape[2]) or moments(self, x, axis)
    )
    x = normal(300, channels, 3)
    assert error(analysis.covariance(x), analysis.covariance(x.double())) < 1e-5
    assert sizes == ([channels] if channels <= tiles.MAX_VARIABLES else [])


@runs
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layers_train_as_with_the_default_kernels(memory, monkeypatch):
    """This includes a smaller last group, running averages, and an expanded gradient."""
    x = normal(4, 10, 5, 5).to(memory_format=memory)
    for make in (partial(IterNorm, 10, group_size=4), partial(GroupWhitening, 5, 10)):
        layer, exact = make().to(DEVICE), make(dtype=torch.float64).to(DEVICE)
        results = []
        for each, given in ((layer, x.clone().requires_grad_()), (exact, x.double().requires_grad_())):
            with torch.no_grad():
                each.weight.copy_(normal(10, seed=1)), each.bias.copy_(normal(10, seed=2))
            y = each(given)
            assert y.is_contiguous(memory_format=memory)
            (y * given).sum().backward()
            results.append([y, given.grad, each.weight.grad, each.bias.grad, *each.buffers()])
        for actual, wanted in zip(*results, strict=True):
            assert error(actual, wanted.double()) < 1e-5


def launched_kernels():
    """Return the names of all kernels that the package launches, by its sources."""
    sources = "".join(file.read_text() for file in Path(tiles.__file__).parent.glob("*.py"))
    names = re.findall(r"@triton\.jit.*\ndef (\w+)", sources)
    return {name for name in names if re.search(rf"\b{name}\[\(?|PreparedLaunch\(\s*{name}\b", sources)}


@runs
@pytest.mark.sanitized
@pytest.mark.usefixtures("triton_backend")
def test_every_kernel_runs_in_both_memory_orders(monkeypatch):
    """compute-sanitizer, which is slow, is given this test alone. So it has to launch every kernel."""
    noted, run = set(), triton.runtime.jit.KernelInterface.__getitem__
    monkeypatch.setattr(
        triton.runtime.jit.KernelInterface,
        "__getitem__",
        lambda self, grid: noted.add(self.__name__) or run(self, grid),
    )
    monkeypatch.setattr(plan_cache, "_CACHED", {})  # kernels that were launched before are launched by another way
    factor = normal(2, 20, 40, mean=0)
    for memory in (torch.contiguous_format, torch.channels_last):
        for structure in CHOICES:
            launched = structure, memory
            with use_gpu_launches(structure):
                for layer, size, elements in (  # of large samples, statistics are saved for backward
                    (IterNorm(10, group_size=4, iterations=2), 4, 1),
                    (IterNorm(70, iterations=2), 4, 1),
                    (GroupWhitening(5, 10, iterations=2), 24, 2**16),
                    (GroupWhitening(5, 10, iterations=2), 24, 1),
                ):
                    monkeypatch.setattr(sample_parts, "MAX_SAMPLE_ELEMENTS", elements)
                    plan_cache._CACHED.clear()
                    x = normal(2, layer.bias.numel(), size, size).contiguous(memory_format=memory).requires_grad_()
                    (layer.to(DEVICE)(x) * x).sum().backward()
                    assert x.grad.isfinite().all(), launched
                    with torch.no_grad():
                        assert layer.eval()(x).isfinite().all(), launched
                solver, cov = solver_for("newton", 2), factor @ factor.mT
                KERNELS.inverse_sqrt_adjoint(solver, cov, KERNELS.inverse_sqrt(solver, cov, 1.0), 1.0)
    assert noted == launched_kernels()


@runs
@pytest.mark.usefixtures("triton_backend")
def test_nan_stays_in_its_group_and_constant_channels_are_finite():
    x = normal(6, 8, 3, 3)
    x[:, 5] = 2.0
    x[0, 1, 2, 2] = float("nan")
    y = pw.iter_norm(x, group_size=4)
    assert y[:, :4].isnan().all()
    assert y[:, 4:].isfinite().all()


@runs
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("d", [8, 64])
@pytest.mark.parametrize("structure", ["separate", "joined"])
def test_constant_channels_without_eps_give_nothing_but_zeros(structure, d):
    x = torch.full((4, d, 12), 7.0, requires_grad=True)
    with use_gpu_launches(structure):
        y = pw.iter_norm(x, group_size=d, eps=0.0)
        (dx,) = torch.autograd.grad(y, x, normal(4, d, 12))
        assert (pw.whitening_stats(x.detach(), group_size=d, eps=0.0).whitener == 0).all()
    assert (y == 0).all()
    assert (dx == 0).all()


@runs
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("structure", ["separate", "joined"])
def test_negated_views_are_read_with_their_sign(structure):
    """PyTorch negates the imaginary part of a conjugate only when it is read, as an input or as a gradient."""
    x = normal(6, 8, 5, mean=0)
    y = pw.iter_norm(x.requires_grad_(), group_size=4)
    (dx,) = torch.autograd.grad(y, x, normal(6, 8, 5, seed=1))
    negated, dy = (torch.complex(each, -each).conj().imag for each in (x.detach(), normal(6, 8, 5, seed=1)))
    assert negated.is_neg()
    assert dy.is_neg()
    with use_gpu_launches(structure):
        assert error(pw.iter_norm(negated, group_size=4), y.detach().double()) < 1e-5
        y = pw.iter_norm(x, group_size=4)
        assert error(torch.autograd.grad(y, x, dy)[0], dx.double()) < 1e-5


@runs
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("name", ["iter_norm", "group_whiten"])
def test_second_derivatives_and_transforms_are_those_of_the_default_kernels(name):
    check_second_derivatives_and_transforms(name)


def check_second_derivatives_and_transforms(name):
    x = normal(5, 4, 3)
    function = getattr(pw, name)
    options = {"group_size": 2} if name == "iter_norm" else {"num_groups": 2}

    def penalty(x):
        (slope,) = torch.autograd.grad((function(x, **options) ** 3).sum(), x, create_graph=True)
        return torch.autograd.grad((slope**2).sum(), x)[0]

    assert error(penalty(x.clone().requires_grad_()), penalty(x.double().requires_grad_())) < 1e-4
    cubed = lambda x: (function(x, **options) ** 3).sum()
    transformed = torch.func.vmap(torch.func.grad(cubed))(torch.stack([x, 2 * x]))
    assert error(transformed[0], torch.func.grad(cubed)(x.double())) < 1e-5


LAYERS = [
    lambda: IterNorm(10, group_size=4),
    lambda: IterNorm(160, group_size=80),
    lambda: GroupWhitening(5, 10),
]


CAPTURED = {  # torch.compile passes the same arguments for large groups as for others
    "IterNorm": ["a CUDA graph", "torch.compile"],
    "IterNorm, large groups": ["a CUDA graph"],
    "GroupWhitening": ["a CUDA graph", "torch.compile"],
}


@needs_device
@pytest.mark.parametrize(
    ("layer", "how"),
    [
        pytest.param(layer, how, id=f"{name}, {how}")
        for (name, ways), layer in zip(CAPTURED.items(), LAYERS, strict=True)
        for how in ways
    ],
)
def test_captured_steps_are_those_of_eager_mode(layer, how):
    check_captured_steps(layer().to(DEVICE), 7, how)


def check_captured_steps(layer, size, how):
    """Compare output and gradients of a captured step, for feature maps of this size, with those of eager mode."""
    x = normal(8, layer.bias.numel(), size, size).requires_grad_()

    def step():
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], 2 * y)]

    expected = [each.detach().clone() for each in step()]
    if how == "torch.compile":
        captured = torch.compile(step)()
    else:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for _ in range(3):
            graph.replay()
    for actual, wanted in zip(captured, expected, strict=True):
        assert error(actual, wanted.double()) < 1e-5


@compiled
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("layer", [IterNorm(8, group_size=4), GroupWhitening(4, 8)], ids=["IterNorm", "GroupWhitening"])
def test_no_kernel_is_given_parameters_that_end_too_early(layer, launches):
    """PyTorch's own operations raise an error for them."""
    layer.weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="size"), torch.no_grad():
        layer(torch.randn(6, 8, 3))
    given = [argument for _, arguments, constants in launches for argument in (*arguments, *constants.values())]
    assert not any(argument is layer.weight for argument in given)


@pytest.mark.parametrize(
    ("group_size", "tensors"),
    [
        (8, [normal(4, 16, 3, dtype=torch.float64)]),
        (8, [normal(0, 16, 3)]),
        (129, [normal(2, 129)]),
        (8, [torch.empty(1, device=DEVICE).expand(2**16, 8, 2**16)]),
        (8, [normal(4, 16, 3).requires_grad_()]),
        (8, [normal(4, 16, 3), normal(15)]),
        (8, [normal(4, 16, 3), None, None, normal(4, 16, 3).requires_grad_()]),
    ],
    ids=[
        "float64",
        "no elements",
        "more variables than a tile has",
        "more elements than 32 bits count",
        "recorded",
        "a weight that ends too early",
        "a recorded gradient",
    ],
)
def test_the_next_implementation_gets_what_triton_kernels_cannot_read(group_size, tensors):
    spec = WhiteningSpec(ChannelGroups(1, group_size), solver_for("newton", 5), 1e-5)
    assert not SEPARATE.supports(spec, *tensors)


@pytest.mark.parametrize(
    ("spec", "tensors"),
    [
        (
            WhiteningSpec(ChannelGroups(1, 8), solver_for("eigh", None), 1e-5, lambda a: a),
            [normal(4, 16, 3), normal(16)],
        ),
        (WhiteningSpec(SampleGroups(1, 4), solver_for("newton", 5), 1e-5), [normal(4, 16, 3).half(), None, None]),
        (None, [normal(2, 128, 128)]),
        (None, [normal(4, 16, 3), normal(16), normal(2, 8, 8), None, None]),
    ],
    ids=["another solver, workers", "half precision", "covariances", "frozen statistics"],
)
def test_triton_kernels_support_all_else(spec, tensors):
    assert SEPARATE.supports(spec, *tensors)


@runs
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("layer", [IterNorm(8, group_size=4), GroupWhitening(4, 8)], ids=["IterNorm", "GroupWhitening"])
def test_tracers_see_the_default_kernels(layer):
    layer, x = layer.eval().to(DEVICE), normal(4, 8, 3, 3)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,)).module()(x)
        traced = torch.jit.trace(layer, x)(x)
    for result in (exported, traced):
        assert error(result, layer(x).double()) < 1e-5


def test_tensors_on_the_cpu_are_not_supported():
    x, spec = normal(4, 16, 3).cpu(), WhiteningSpec(ChannelGroups(1, 8), solver_for("newton", 5), 1e-5)
    assert not SeparateImplementation().supports(spec, x)
    with use_gpu_launches("joined"):
        assert JoinedKernels().whitening(spec, x, None, None, None) is None
        assert AnywhereJoined().whitening(spec, x, None, None, None) is not None


def test_tf32_is_used_for_float32_only_where_users_allow_it():
    assert tiles.precision(torch.float32) == "tf32x3"
    assert {tiles.precision(dtype) for dtype in HALF} == {"tf32"}
    matmul = torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("high")
    try:
        assert tiles.precision(torch.float32) == "tf32"
        torch.set_float32_matmul_precision("highest")
        if hasattr(matmul, "fp32_precision"):  # newer, and once it is set, the older ones raise an error
            matmul.fp32_precision = "tf32"
            assert tiles.precision(torch.float32) == "tf32"
            matmul.fp32_precision = "ieee"
            assert tiles.precision(torch.float32) == "tf32x3"
    finally:
        torch.set_float32_matmul_precision("highest")


# ---------------------------------------------------------------- compiled, without a device

SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}  # limits of a program: on every device from 8.0 to 8.9, and on 9.0
MAX_SPILL = 544  # bytes a thread
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


EAGER, INDUCTOR = ("i32", "fp32"), ("i64", "fp64")  # the types of the integers and floats that they pass to kernels


def compile_offline(kernel, arguments, constants, capability, scalars=EAGER):
    """Compile a kernel as Triton would for a launch; return its registers, spilled bytes and shared memory."""
    from triton.backends import nvidia

    result = compile_kernel(kernel, arguments, constants, capability, scalars)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(result.asm["cubin"])
        cubin.flush()
        tool = Path(nvidia.__file__).with_name("bin") / "cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True)
    numbers = dict(re.findall(r"(REG|STACK):(\d+)", usage.stdout.rpartition("Function")[2]))
    return int(numbers["REG"]), int(numbers["STACK"]), result.metadata.shared


def compile_kernel(kernel, arguments, constants, capability, scalars=EAGER):
    """Compile a kernel as Triton would for a launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = dict(zip(kernel.arg_names, arguments, strict=False))
    options = {name: value for name, value in constants.items() if name not in kernel.arg_names}
    given |= {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, fixed, multiples_of_16 = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        is_specialized = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (is_specialized and value == 1):
            signature[parameter.name], fixed[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        else:
            signature[parameter.name] = scalars[0 if isinstance(value, int) else 1]
        kind = signature[parameter.name]
        if kind in POINTERS.values() or (kind == scalars[0] and is_specialized and value % 16 == 0):
            multiples_of_16[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, multiples_of_16)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.fixture
def launches(monkeypatch):
    """Record kernels and their arguments instead of launching them."""
    noted = []

    def note(self, *arguments, grid, warmup, **constants):
        assert all(0 < size < 2**16 for size in grid[1:])
        noted.append((self, arguments, constants))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", note)
    return noted


CASES = {
    "IterNorm, 64 channels first, float32": ((16, 128, 28, 28), ChannelGroups(1, 64), torch.float32),
    "IterNorm, 64 channels last, bfloat16": ((16, 28, 28, 128), ChannelGroups(3, 64), torch.bfloat16),
    "IterNorm, 128 channels first, float32": ((16, 128, 28, 28), ChannelGroups(1, 128), torch.float32),
    "group whitening, 32 channels first, float32": ((4, 256, 28, 28), SampleGroups(1, 32), torch.float32),
    "group whitening, 64 channels last, small, bfloat16": ((4, 7, 7, 128), SampleGroups(3, 64), torch.bfloat16),
}


def launch_a_step(case):
    """Call forward and backward."""
    shape, blocks, dtype = CASES[case]
    x, spec = torch.empty(shape, dtype=dtype), WhiteningSpec(blocks, solver_for("newton", 5), 1e-5)
    weight = torch.empty(shape[blocks.axis])
    y, stats = SEPARATE.forward(spec, x, weight, weight)
    SEPARATE.backward(spec, x, weight, weight, stats, y, NO_STATISTICS)


@compiled
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_within_the_resources_of_devices(case, capability, launches, record_property):
    launch_a_step(case)
    assert len(launches) >= 5
    for kernel, arguments, constants in launches:
        registers, spilled, shared = compile_offline(kernel, arguments, constants, capability)
        record_property(
            "resources",
            f"{kernel.__name__.lstrip('_'):<22} sm_{capability} {registers:>3} registers, {shared:>6} bytes shared, "
            f"{spilled:>3} of stack; {case}",
        )
        assert shared <= SHARED_MEMORY[capability], kernel.__name__
        assert spilled <= MAX_SPILL, kernel.__name__


def test_functions_of_kernels_have_different_names():
    """torch.compile copies a kernel and all functions that it calls into one module."""
    folder = Path(tiles.__file__).parent
    names = [
        name for file in folder.glob("*.py") for name in re.findall(r"@triton\.jit.*\ndef (\w+)", file.read_text())
    ]
    assert len(names) > 30
    assert len(set(names)) == len(names)


@compiled
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("case", [*CASES][::4])  # the first and the last launch all kernels
def test_kernels_compile_with_the_scalars_of_torch_compile(case, launches):
    launch_a_step(case)
    for kernel, arguments, constants in launches:
        compile_offline(kernel, arguments, constants, 90, INDUCTOR)


@compiled
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("layer", [IterNorm(8, group_size=4), GroupWhitening(4, 8)], ids=["IterNorm", "GroupWhitening"])
def test_torch_compile_puts_all_launches_into_one_graph(layer, monkeypatch):
    """They are traced and not run, which would take a device."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    called = []

    class TracedError(Exception):
        pass

    def backend(module, inputs):
        graphs = [part.graph for part in module.modules() if hasattr(part, "graph")]
        kernels = kernel_side_table.id_to_kernel
        for node in (node for graph in graphs for node in graph.nodes if "kernel_idx" in node.kwargs):
            kernel = kernels[node.kwargs["kernel_idx"]]  # wrapped if the launch has options
            called.append((kernel if hasattr(kernel, "__name__") else kernel.fn).__name__.lstrip("_"))
        raise TracedError

    step = torch.compile(layer, fullgraph=True, backend=backend)
    x = normal(4, 8, 3, 3).cpu().requires_grad_()
    torch._dynamo.maybe_mark_dynamic(x, 0)
    with pytest.raises(Exception, match="TracedError"):
        step(x)
    expected = ["combine_cross_moments", "inverse_sqrt_adjoint", "affine_map"]
    if isinstance(layer, IterNorm):
        forward_launches = ["partial_moments", "combine_moments", "inverse_sqrt", "affine_map"]
        expected = [*forward_launches, "partial_cross_moments", *expected]
    else:
        expected = ["whiten_sample", "partial_sample_cross_moments", *expected]
    assert called == expected
