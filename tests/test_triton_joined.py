"""The joined kernels in Triton: as exact as the separate ones, deterministic, and with few launches."""

import re
import warnings
from collections import Counter
from contextlib import suppress
from functools import partial

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
tl = triton.language

from test_triton import (  # noqa: E402  # fixtures too
    DEVICE,
    EAGER,
    EXACT,
    EXACT_KERNELS,
    INDUCTOR,
    IS_INTERPRETED,
    KERNELS,
    MAX_SPILL,
    POINTERS,
    SHARED_MEMORY,
    check_captured_steps,
    check_second_derivatives_and_transforms,
    compile_kernel,
    compile_offline,
    compiled,
    error,
    in_float64,
    needs_device,
    normal,
    products_of_bfloat16,  # noqa: F401
    runs,
    tensor_cores,  # noqa: F401
    triton_backend,  # noqa: F401
)
from torch.autograd import forward_ad  # noqa: E402

import polywhiten as pw  # noqa: E402
from polywhiten.blocks import ChannelGroups, SampleGroups  # noqa: E402
from polywhiten.gpu_launches import use_gpu_launches  # noqa: E402
from polywhiten.solvers import solver_for  # noqa: E402
from polywhiten.spec import WhiteningSpec  # noqa: E402
from polywhiten.torch import GroupWhitening, IterNorm  # noqa: E402
from polywhiten.torch.averages import RunningAverages  # noqa: E402
from polywhiten.torch.triton import (  # noqa: E402
    joined_gradient_map,
    joined_tiles,
    last_program,
    plan_cache,
    prepared_launch,
    sample_parts,
    support,
    tiles,
)
from polywhiten.torch.triton.bfloat16_parts import add_square, multiply_parts  # noqa: E402
from polywhiten.torch.triton.joined_problem import JoinedProblem  # noqa: E402
from polywhiten.torch.triton.joined_whitening import JoinedWhitening  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("triton_backend", "launch_joined"),
    pytest.mark.filterwarnings(
        "ignore:(overflow|invalid value) encountered:RuntimeWarning"
    ),  # from Triton's interpreter
]
LAST = torch.channels_last
POINTERS |= {torch.int32: "*i32", torch.int64: "*i64"}


@pytest.fixture
def launch_joined():
    with use_gpu_launches("joined"):
        yield


@pytest.fixture
def noted(monkeypatch):
    """Record launches instead of launching kernels: those by Triton, and those of compiled kernels."""
    launches = []

    class Compiled:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *arguments, stream: launches.append((self.kernel, arguments, "again"))

    def note(self, *arguments, grid, warmup, **constants):
        launches.append((self, arguments, constants))
        return Compiled(self)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", note)
    forget_plans(monkeypatch)
    return launches


def forget_plans(monkeypatch):
    monkeypatch.setattr(plan_cache, "_CACHED", {})


@pytest.fixture
def small_clusters(monkeypatch):
    """Cut few samples into clusters of small parts, and sum the gradients of weights in several steps."""
    monkeypatch.setattr(joined_gradient_map, "_ROWS_AT_ONCE", triton.language.constexpr(2))
    monkeypatch.setattr(sample_parts, "MAX_SAMPLE_ELEMENTS", 1)
    for module, name, value in (
        (tiles, "_MIN_TILES_PER_PART", 1),
        (last_program, "_MAX_PARTS_WITHOUT_CLUSTERS", 2),
        (last_program, "_MIN_CLUSTER_SIZE", 3),
    ):
        monkeypatch.setattr(module, name, value)
    forget_plans(monkeypatch)


def names(launches):
    return [kernel.__name__ for kernel, *_ in launches]


# ---------------------------------------------------------------- results

WHITENINGS = [
    pytest.param((3, 10, 5, 7), ChannelGroups(1, 5), id="IterNorm, channels first"),
    pytest.param((150, 32), ChannelGroups(1, 16), id="IterNorm, rows"),
    pytest.param((40, 3, 3, 24), ChannelGroups(3, 24), id="IterNorm, channels last"),
    pytest.param((2, 3, 20, 7), ChannelGroups(2, 10), id="IterNorm, positions on both sides of the channels"),
    pytest.param((1, 70, 30), ChannelGroups(1, 70), id="IterNorm, one large group"),
    pytest.param((1000, 6), ChannelGroups(1, 6), id="IterNorm, one array of rows"),
    pytest.param((2, 12, 5, 7), SampleGroups(1, 4), id="group whitening, channels first"),
    pytest.param((2, 5, 7, 60), SampleGroups(3, 20), id="group whitening, channels last"),
    pytest.param((2, 5, 7, 16), SampleGroups(3, 4), id="group whitening, channels last, a power of 2"),
    pytest.param((3, 24), SampleGroups(1, 4), id="group whitening, rows"),
    pytest.param((1, 8, 500), SampleGroups(1, 4), id="group whitening, one large sample"),
]


def joined_of(blocks, iterations=3, eps=1e-3):
    spec = WhiteningSpec(blocks, solver_for("newton", iterations), eps)
    return JoinedWhitening(JoinedProblem.of(spec, iterations))


interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="TRITON_INTERPRET isn't 1; compiling all takes minutes")


@interpreted
@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize(
    ("dtype", "parameters"),
    [
        pytest.param(torch.float32, (True, True), id="float32, weight and bias"),
        pytest.param(torch.float32, (False, True), id="float32, bias"),
        pytest.param(torch.bfloat16, (False, False), id="bfloat16"),
    ],
)
@pytest.mark.parametrize(("shape", "blocks"), WHITENINGS)
@pytest.mark.parametrize("parts", ["few", "many"])
def test_whitening_and_its_gradients_are_those_of_float64(
    shape, blocks, dtype, parameters, parts, request, monkeypatch
):
    if parts == "many":
        request.getfixturevalue("small_clusters")
    check_against_float64(shape, blocks, dtype, parameters)


def check_against_float64(shape, blocks, dtype, parameters):
    channels = shape[blocks.axis]
    x, dy = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1)
    weight, bias = (
        normal(channels, seed=seed) if there else None for there, seed in zip(parameters, (2, 3), strict=True)
    )
    whitening = joined_of(blocks)
    y, stats = whitening.forward(x, weight, bias)
    gradients = whitening.backward(x, weight, bias, stats, dy)
    spec, given = WhiteningSpec(blocks, solver_for("newton", 3), 1e-3), in_float64(x, weight, bias)
    exact, exact_stats = EXACT.forward(spec, *given)
    exact_gradients = EXACT.backward(spec, *given, exact_stats, dy.double())
    for actual, wanted in zip((y, *gradients), (exact, *exact_gradients), strict=True):
        assert (actual is None) == (wanted is None)
        if actual is not None:
            assert error(actual, wanted) < (1e-4 if dtype == torch.float32 else 2e-2)


def sum_of_squares(layer, x, dtype):
    """Take a training step; return the output, all gradients and buffers, and the output in evaluation."""
    x = x.detach().to(dtype, copy=True).requires_grad_()
    y = layer.train()(x)
    (y * x).sum().backward()
    gradients = [each.grad for each in (x, layer.weight, layer.bias) if each is not None]
    with torch.no_grad():
        return [y, *gradients, *layer.buffers(), layer.eval()(x)]


@runs
@pytest.mark.parametrize("memory", [torch.contiguous_format, LAST], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        partial(IterNorm, 10, group_size=4),
        partial(IterNorm, 10, group_size=4, momentum=None, track="covariance"),
        partial(IterNorm, 10, group_size=16, momentum=0.7, affine=False),
        partial(GroupWhitening, 5, 10),
    ],
    ids=["IterNorm, a smaller last group", "IterNorm, plain average of covariances", "IterNorm, one group", "GW"],
)
def test_layers_train_and_evaluate_as_with_the_default_kernels(make, memory):
    x = normal(6, 10, 5, 5).to(memory_format=memory)
    results = []
    for dtype in (torch.float32, torch.float64):  # the second one is PyTorch's own
        layer = make(dtype=dtype).to(DEVICE)
        with torch.no_grad():
            for seed, parameter in enumerate(layer.parameters()):
                parameter.copy_(normal(10, seed=seed))
        results.append([each for _ in range(2) for each in sum_of_squares(layer, x, dtype)])
    assert results[0][0].is_contiguous(memory_format=memory)
    for actual, wanted in zip(*results, strict=True):
        assert error(actual, wanted.double()) < 1e-5


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_layers_in_half_precision_train_and_evaluate(dtype):
    """The kernels read and write parameters and averages in half precision too."""
    x, results = normal(6, 10, 5, 5, dtype=dtype), []
    for each in (dtype, torch.float64):
        results.append(sum_of_squares(IterNorm(10, group_size=4, dtype=each).to(DEVICE), x, each))
    for actual, wanted in zip(*results, strict=True):
        assert error(actual, wanted.double()) < 10 * torch.finfo(dtype).eps


@runs
def test_gradients_in_another_memory_order_and_expanded_gradients_are_read():
    x = normal(4, 6, 5, 5).requires_grad_()
    for layer in (IterNorm(6, group_size=3), GroupWhitening(3, 6)):
        y = layer.to(DEVICE)(x)
        for dy in (normal(4, 6, 5, 5, seed=1).to(memory_format=LAST), normal(1, 6, 1, 1, seed=1).expand(4, 6, 5, 5)):
            actual, wanted = (torch.autograd.grad(y, x, each, retain_graph=True)[0] for each in (dy, dy.contiguous()))
            assert error(actual, wanted.double()) < 1e-6


@runs
def test_memory_orders_that_results_and_gradients_cannot_have_are_read():
    """The result for an expanded array has another order, and a gradient may have one that kernels can't read."""
    expanded = normal(1, 1, 1).expand(3, 4, 5) + normal(3, 4, 5)[:, :, :1]
    last = normal(2, 3, 5, 8).permute(
        0, 1, 3, 2
    )  # (2, 3, 8, 5), with positions around the channels that can be read as one axis
    for x in (expanded, normal(1, 4, 1, 1).expand(3, 4, 5, 6), last):
        axis = 2 if x is last else 1
        x = x.detach().requires_grad_()
        y = pw.group_whiten(x, num_groups=2, axis=axis)
        dy = normal(*reversed(x.shape), seed=1).permute(*range(x.ndim)[::-1])
        given = x.detach().double().requires_grad_()
        exact = pw.group_whiten(given, num_groups=2, axis=axis)
        assert error(y.detach(), exact.detach()) < 1e-4
        (dx,), (exact_dx,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(exact, given, dy.double())
        assert error(dx, exact_dx) < 1e-4


@runs
@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize(
    ("d", "rank", "eps", "iterations"),
    [(1, 2, 1e-2, 2), (9, 18, 1e-2, 1), (9, 4, 1e-8, 5), (16, 32, 1e-2, 2), (20, 60, 1e-2, 12), (60, 30, 1e-5, 5)],
)
def test_newton_in_registers_and_its_gradient_are_those_of_float64(d, rank, eps, iterations):
    """The limit is half of what the iteration in memory is allowed, with covariances of a low rank among them."""
    factor, grad = normal(2, d, rank, mean=0), normal(2, d, d, seed=1, mean=0)
    cov, solver = factor @ factor.mT / rank, solver_for("newton", iterations)
    for kernel, given in (("inverse_sqrt", (cov,)), ("inverse_sqrt_adjoint", (cov, grad))):
        exact = getattr(EXACT_KERNELS, kernel)(solver, *in_float64(*given), eps)
        assert error(getattr(KERNELS, kernel)(solver, *given, eps), exact) < 5e-6


@runs
@pytest.mark.usefixtures("tensor_cores")
def test_many_steps_whiten_data_of_few_dimensions_as_float64_does():
    """They multiply rounding errors where the data have no variance, and the whitened data must not contain these."""
    few = normal(8, 64, mean=0) * torch.logspace(0, -3, 8, device=DEVICE)[:, None]
    x = normal(600, 8, seed=1, mean=0) @ few
    cov, solver = x.mT @ x / 600, solver_for("newton", 12)
    whitener, exact = (
        kernels.inverse_sqrt(solver, given[None], 1e-10)[0].double()
        for kernels, given in ((KERNELS, cov), (EXACT_KERNELS, cov.double()))
    )
    assert error(x.double() @ whitener.mT, x.double() @ exact) < 2e-4


@runs
def test_a_mean_far_above_the_standard_deviation_costs_no_digits():
    x = normal(40, 16, 9, mean=1e3)
    assert error(pw.iter_norm(x, group_size=16), pw.iter_norm(x.double(), group_size=16)) < 1e-3


@runs
@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mean", [0, 3, 5, 100])
@pytest.mark.parametrize("blocks", [ChannelGroups(1, 16), SampleGroups(1, 16)], ids=["IterNorm", "group whitening"])
def test_sums_of_half_precision_have_more_digits_than_their_arrays(blocks, mean, dtype):
    """Only what is stored in half precision is rounded to it: neither a large mean nor the products cost digits."""
    x, dy = normal(4, 16, 200, mean=mean, dtype=dtype), normal(4, 16, 200, mean=0, seed=1, dtype=dtype)
    weight, whitening = torch.ones(16, device=DEVICE), joined_of(blocks)
    _, saved = whitening.forward(x, weight, None)
    _, dweight, _ = whitening.backward(x, weight, None, saved, dy)
    spec, given = WhiteningSpec(blocks, solver_for("newton", 3), 1e-3), in_float64(x, weight, None)
    _, stats = EXACT.forward(spec, *given)
    _, exact_dweight, _ = EXACT.backward(spec, *given, stats, dy.double())
    cov = saved[0][: stats.covariance.numel()].view_as(stats.covariance)
    assert error(cov, stats.covariance) < 5e-4
    assert error(dweight, exact_dweight) < 2e-4


@runs
@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize(("precision", "limit"), [("bf16x6", 1e-6), ("bf16x3", 1e-4)])
def test_products_of_parts_in_bfloat16_are_as_exact_as_the_precision_says(precision, limit):
    a, b = normal(64, 64, mean=0), normal(64, 64, mean=0, seed=1)
    product, square = torch.empty_like(a), torch.empty_like(a)
    _multiply_by_parts[(1,)](a, b, product, square, PRECISION=precision, SIZE=64)
    for actual, exact in ((product, a.double() @ b.double()), (square, a.double() @ a.double().mT)):
        assert error(actual, exact) < limit


@triton.jit
def _multiply_by_parts(a, b, product, square, PRECISION: tl.constexpr, SIZE: tl.constexpr):  # noqa: N803
    offsets = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    zeros = tl.zeros((SIZE, SIZE), tl.float32)
    a, b = tl.load(a + offsets), tl.load(b + offsets)
    tl.store(product + offsets, multiply_parts(a, b, zeros, PRECISION))
    squares, mixed = add_square(a, zeros, zeros, PRECISION)
    tl.store(square + offsets, squares + mixed + tl.trans(mixed))


@runs
@pytest.mark.parametrize("name", ["iter_norm", "group_whiten"])
def test_second_derivatives_and_transforms_are_those_of_the_default_kernels(name):
    check_second_derivatives_and_transforms(name)


@runs
@pytest.mark.parametrize("name", ["iter_norm", "group_whiten"])
def test_gradients_with_a_derivative_count_every_way_and_hook_once(name):
    """Weight and bias may depend on each other and on x, and hooks may change gradients of x or of a parameter."""
    results = []
    for dtype in (torch.float32, torch.float64):
        start, parameter = (each.to(dtype).requires_grad_() for each in (normal(5, 4, 3), normal(4, seed=1)))
        x = 2 * start
        x.register_hook(lambda gradient: 3 * gradient)
        parameter.register_hook(lambda gradient: 5 * gradient)
        weight = x.mean((0, 2)) * parameter
        options = {"group_size": 2} if name == "iter_norm" else {"num_groups": 2}
        y = getattr(pw, name)(x, weight=weight, bias=weight, **options)
        first = torch.autograd.grad((y**3).sum(), [start, parameter], create_graph=True)
        results.append([*first, *torch.autograd.grad(sum((each**2).sum() for each in first), [start, parameter])])
    for actual, wanted in zip(*results, strict=True):
        assert error(actual, wanted) < 1e-4


@runs
@pytest.mark.parametrize("layer", [IterNorm(6, group_size=4), GroupWhitening(3, 6)], ids=["IterNorm", "GroupWhitening"])
def test_gradients_in_transforms_have_their_batch_and_their_tangents(layer):
    layer, x = layer.to(DEVICE), normal(4, 6, 5).requires_grad_()
    y, dy, tangent = layer(x), normal(4, 6, 5, seed=1, mean=0), normal(4, 6, 5, seed=2, mean=0)

    def gradient(dy):
        return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    wanted = [gradient(each) for each in (dy, tangent)]
    batch = torch.func.vmap(gradient)(torch.stack([dy, tangent]))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(gradient(forward_ad.make_dual(dy, tangent)))
    for actual in (batch, dual):
        for each, exact in zip(actual, wanted, strict=True):
            assert error(each, exact.double()) < 1e-5


@runs
@pytest.mark.parametrize("layer", [IterNorm(8, group_size=4), GroupWhitening(4, 8)], ids=["IterNorm", "GroupWhitening"])
def test_gradients_in_batches_are_those_one_by_one(layer):
    """A batch of gradients is not in memory like a single gradient."""
    layer, x = layer.to(DEVICE), normal(4, 8, 3, 3).requires_grad_()
    y, batch = layer(x), normal(2, 4, 8, 3, 3, seed=1)
    given = [x, layer.weight, layer.bias]
    together = torch.autograd.grad(y, given, batch, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, given, dy, retain_graph=True) for dy in batch]
    for actual, wanted in zip(together, zip(*one_by_one, strict=True), strict=True):
        assert error(actual, torch.stack(wanted).double()) < 1e-5


@pytest.mark.skipif(not IS_INTERPRETED, reason="programs run in another order only in Triton's interpreter")
@pytest.mark.usefixtures("small_clusters")
@pytest.mark.parametrize("blocks", [ChannelGroups(1, 4), SampleGroups(1, 4)], ids=["IterNorm", "group whitening"])
def test_results_do_not_depend_on_which_program_is_the_last(blocks, monkeypatch):
    """Results agree to the last bit, and the counters are 0 again after every launch."""
    x = normal(1, 8, 1000)
    results = []
    orders = {"as they are": lambda i: i, "backwards": lambda i: -i, "mixed": lambda i: i * 7 % 13}
    for key in orders.values():

        def in_order(*bounds, key=key):
            return sorted(range(*bounds), key=key) if len(bounds) == 1 else range(*bounds)

        monkeypatch.setattr(triton.runtime.interpreter, "range", in_order, raising=False)
        y, stats = joined_of(blocks).forward(x, None, None)
        dx, *_ = joined_of(blocks).backward(x, None, None, stats, y)
        results.append((y, dx))
        assert all((each == 0).all() for each in last_program._counters.values())
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])


# ---------------------------------------------------------------- running averages


@runs
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_batch_that_would_make_one_average_infinite_changes_none(bad, dtype):
    """1e30 squared is infinite in float32. The second group is at fault, but those of the first don't change either."""
    layer = IterNorm(8, group_size=4, track="covariance", dtype=dtype).to(DEVICE)
    layer(normal(6, 8, 3, 3))
    before = [each.clone() for each in layer.buffers()]
    assert layer.num_batches_tracked == 1
    x = normal(6, 8, 3, 3)
    x[2, 5, 1, 1] = bad
    y = layer(x)
    assert y[:, :4].isfinite().all()
    for now, former in zip(layer.buffers(), before, strict=True):
        assert torch.equal(now, former)


@runs
def test_averages_in_half_precision_must_be_finite_in_half_precision():
    layer = IterNorm(4, track="covariance", dtype=torch.float16, momentum=1.0).to(DEVICE)
    layer(100 * normal(6, 4, 3, 3))
    assert layer.num_batches_tracked == 1
    layer(1000 * normal(6, 4, 3, 3))  # a variance of 1e6
    assert layer.num_batches_tracked == 1
    assert layer.running_covariance.isfinite().all()


@runs
def test_changes_of_the_averages_are_counted():
    """Autograd thereby notices if a graph needs the former values."""
    layer = IterNorm(8, group_size=4).to(DEVICE)
    before = [each._version for each in layer.buffers()]
    layer(normal(6, 8, 3, 3))
    assert all(each._version > version for each, version in zip(layer.buffers(), before, strict=True))


# ---------------------------------------------------------------- launches


def operations(run, *arguments):
    """Return the result of a call, as a tuple, and how often it called each of PyTorch's operations directly."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = run(*arguments)
    events = [event for event in profile.events() if event.name.startswith("aten::")]
    found = Counter(event.name.removeprefix("aten::") for event in events if not _is_within_another(event))
    del found["detach"]  # of a gradient that becomes that of a leaf; it allocates nothing
    return (result,), found


def _is_within_another(event):
    return event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::")


STEPS = {
    "IterNorm": (
        lambda: IterNorm(256),
        ["joined_statistics", "joined_map"],
        ["joined_cross_moments", "joined_gradient_map"],
    ),
    "IterNorm, 128 channels": (
        lambda: IterNorm(256, group_size=128),
        ["joined_statistics", "joined_map"],
        ["joined_cross_moments", "joined_gradient_map"],
    ),
    "IterNorm, a smaller last group": (
        lambda: IterNorm(256, group_size=100),
        ["joined_statistics", "joined_map"],
        ["joined_cross_moments", "joined_gradient_map"],
    ),
    "GroupWhitening": (
        lambda: GroupWhitening(32, 256),
        ["joined_statistics"],
        ["joined_sample_cross_moments", "joined_gradient_map"],
    ),
}


@compiled
@pytest.mark.parametrize("memory", [torch.contiguous_format, LAST], ids=str)
@pytest.mark.parametrize("what", STEPS)
def test_a_step_has_exactly_these_launches_and_allocations(what, memory, noted):
    """Forward allocates y, the statistics and a workspace, backward the gradients and a workspace."""
    make, forward_launches, backward_launches = STEPS[what]
    layer, x = make(), torch.randn(8, 256, 7, 7).to(memory_format=memory)
    dy = torch.empty_like(x)
    expected = {"empty_like": 1, "empty": 2}, {"empty_like": 3, "empty": 1}
    for again in (False, True):
        noted.clear()
        x = x.detach().requires_grad_()
        layer.zero_grad()
        (y, *_), of_forward = operations(layer, x)
        assert names(noted) == forward_launches
        noted.clear()
        _, of_backward = operations(y.backward, dy)
        assert names(noted) == backward_launches
        assert again == all(how == "again" for *_, how in noted)
    assert (of_forward, of_backward) == expected  # of the second step, which finds the counters


@compiled
def test_evaluation_is_one_launch_and_one_allocation(noted):
    layer, x = IterNorm(256, group_size=100).eval(), torch.randn(8, 256, 7, 7)
    with torch.no_grad():
        layer(x)
        _, found = operations(layer, x)
    assert found == {"empty_like": 1}
    assert names(noted) == ["joined_map"] * 2


@compiled
def test_a_large_sample_takes_two_launches(noted):
    pw.group_whiten(torch.randn(2, 64, 64, 64), num_groups=32)
    assert names(noted) == ["joined_statistics", "joined_map"]


@compiled
@pytest.mark.parametrize("known", [True, False])
def test_launches_are_repeated_without_triton_if_its_version_is_known(known, noted, monkeypatch):
    monkeypatch.setattr(prepared_launch, "IS_KNOWN_VERSION", known)
    x = torch.randn(8, 16, 7, 7)
    launched = []
    for _ in range(2):
        noted.clear()
        pw.iter_norm(x, group_size=16)
        launched.append(list(noted))
        ways = {"again" if how == "again" else "by Triton" for *_, how in noted}
    assert ways == {"again" if known else "by Triton"}
    if known:
        for (kernel, pointers, others), (_, arguments, _) in zip(*launched, strict=True):
            given = dict(zip(kernel.arg_names, pointers, strict=False)) | others
            for name, argument in zip(kernel.arg_names, arguments, strict=True):
                expected = given[name]
                if isinstance(expected, torch.Tensor):
                    assert argument == x.data_ptr() if name == "x" else argument % 16 == 0
                else:
                    assert argument is expected or argument == expected


def test_a_thread_that_launches_while_another_prepares_gives_all_arguments():
    given = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments, stream: given.append(len(arguments))

    class Kernel:
        is_asked = False

        def __getitem__(self, grid):
            return lambda *arguments, **constants: given.append(len(arguments) + len(constants)) or Compiled()

        @property
        def arg_names(self):
            if not self.is_asked:
                self.is_asked = True
                launch(0, x)  # as another thread does at this moment
            return ["x", "number", "CONSTANT"]

    x = torch.empty(16)
    launch = prepared_launch.PreparedLaunch(Kernel(), (1, 1, 1), {"number": 7}, {"CONSTANT": 8})
    for _ in range(2):
        launch(0, x)
    assert given == [3, 3, 3]


@compiled
def test_triton_launches_kernels_for_unaligned_memory(noted):
    memory = torch.randn(8 * 16 * 49 + 1)
    for x in (memory[:-1], memory[1:], memory[:-1]):
        pw.iter_norm(x.view(8, 16, 7, 7), group_size=16)
    assert [how == "again" for *_, how in noted] == [False] * 4 + [True] * 2


def test_every_stream_has_counters_of_its_own_that_grow():
    device = torch.device("cpu")
    first = last_program.get_counters(device, 1, 10, rank=0)
    assert last_program.get_counters(device, 1, 20, rank=0) is first
    assert last_program.get_counters(device, 2, 10, rank=0) is not first
    larger = last_program.get_counters(device, 1, 5000, rank=0)
    assert larger.numel() >= 5000
    assert not larger.any()
    assert last_program.get_counters(device, 1, 0, rank=0) is None


@compiled
@pytest.mark.parametrize(
    "run",
    [
        lambda: IterNorm(8, on_nonfinite="raise")(torch.randn(4, 8, 3)),
        lambda: pw.iter_norm(torch.randn(4, 8, 3), method="eigh"),
        lambda: pw.iter_norm(torch.randn(4, 8, 3), relative_eps=True),
        lambda: pw.iter_norm(torch.randn(400, 129), group_size=129),
        lambda: pw.iter_norm(torch.randn(4, 8, 3, dtype=torch.float64)),
        lambda: pw.iter_norm(torch.randn(4, 8, 3), all_reduce=lambda a: a + 0),
        lambda: pw.iter_norm(torch.randn(5, 6, 8).permute(0, 2, 1)[:, :, ::2].unflatten(2, (3, 1)).expand(5, 8, 3, 2)),
        lambda: pw.group_whiten(torch.randn(2, 3, 12, 5), num_groups=4, axis=2),
        lambda: pw.group_whiten(torch.randn(4097, 8), num_groups=4),
        lambda: torch.func.vmap(partial(pw.iter_norm, group_size=4))(torch.randn(3, 4, 8, 3)),
    ],
    ids=[
        "raise",
        "eigh",
        "relative eps",
        "129 channels",
        "float64",
        "workers",
        "strides",
        "both sides",
        "rows",
        "vmap",
    ],
)
def test_other_kernels_get_what_the_joined_ones_cannot_read(run, noted, monkeypatch):
    launched = []
    monkeypatch.setattr(JoinedWhitening, "forward", lambda *given: launched.append(given))
    with warnings.catch_warnings(), suppress(ValueError):  # nothing is computed, so averages may appear to be infinite
        warnings.simplefilter("ignore")
        run()
    assert not launched


@compiled
@pytest.mark.parametrize(
    ("name", "shape"), [("weight", 3), ("bias", 16), ("running_mean", 3), ("running_whitener", (1, 4, 4))], ids=str
)
@pytest.mark.parametrize("training", [True, False])
def test_no_kernel_is_given_memory_that_ends_too_early(name, shape, training, noted):
    """Users may replace a layer's parameters and averages. Other kernels raise errors if their sizes don't fit."""
    layer = IterNorm(8, group_size=4).train(training).requires_grad_(False)
    value = torch.ones(shape)
    setattr(layer, name, torch.nn.Parameter(value, requires_grad=False) if name in ("weight", "bias") else value)
    with suppress(ValueError, RuntimeError):
        layer(torch.randn(6, 8, 3))
    assert not {"joined_statistics", "joined_map"} & set(names(noted))


@runs
def test_of_statistics_for_more_channels_than_x_has_the_first_are_used():
    given = normal(20, 4), normal(4, seed=1), normal(1, 6, 6, seed=2)
    actual, wanted = (
        pw.apply_whitening(x, pw.WhiteningStats(mean, whitener, whitener))
        for x, mean, whitener in (given, in_float64(*given))
    )
    assert error(actual, wanted) < 1e-5


def test_a_layer_without_averages_whitens_by_the_batch(noted, monkeypatch):
    # what no kernel writes could be NaN, and such a batch isn't counted
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    layer = IterNorm(8)
    layer.running_mean = layer.running_whitener = None
    layer(torch.randn(4, 8, 3))
    assert layer.num_batches_tracked == 1


# ---------------------------------------------------------------- compiled, without a device

CASES = {
    "IterNorm, 64 channels first, float32": ((16, 128, 28, 28), ChannelGroups(1, 64), torch.float32),
    "IterNorm, 64 channels last, bfloat16": ((16, 28, 28, 128), ChannelGroups(3, 64), torch.bfloat16),
    "IterNorm, 128 channels first, float32": ((16, 128, 28, 28), ChannelGroups(1, 128), torch.float32),
    "IterNorm, 128 channels last, bfloat16": ((16, 28, 28, 128), ChannelGroups(3, 128), torch.bfloat16),
    "group whitening, 32 channels first, float32": ((4, 256, 28, 28), SampleGroups(1, 32), torch.float32),
    "group whitening, 64 channels last, small, bfloat16": ((4, 7, 7, 128), SampleGroups(3, 64), torch.bfloat16),
}


def note_a_step(case):
    shape, blocks, dtype = CASES[case]
    x, weight = torch.empty(shape, dtype=dtype), torch.empty(shape[blocks.axis])
    averages = None
    if isinstance(blocks, ChannelGroups):
        d = blocks.group_size
        matrices, count = torch.empty(len(weight) // d, d, d), torch.zeros((), dtype=torch.int64)
        averages = RunningAverages(weight, matrices, count, 0.1, of_covariance=False)
    whitening = joined_of(blocks, 5, 1e-5)
    y, stats = whitening.forward(x, weight, weight, averages)
    whitening.backward(x, weight, weight, stats, y)


_FIRST, *_, _LAST_128, _GROUPS, _SMALL = CASES
COMPILED = [  # each takes seconds to compile
    *((case, 90, EAGER) for case in CASES if case != _LAST_128),
    *((case, 80, EAGER) for case in (_FIRST, _LAST_128, _GROUPS)),  # they iterate in memory, and in registers
    *((case, 90, INDUCTOR) for case in (_FIRST, _SMALL)),  # all kernels
]


@compiled
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_newton_in_registers_compiles_within_the_resources_of_devices(noted, record_property):
    cov, solver = torch.empty(32, 64, 64), solver_for("newton", 5)
    KERNELS.inverse_sqrt(solver, cov, 1e-5)
    KERNELS.inverse_sqrt_adjoint(solver, cov, cov, 1e-5)
    assert names(noted) == ["_inverse_sqrt_in_registers", "_inverse_sqrt_adjoint_in_registers"]
    for kernel, arguments, constants in noted:
        registers, spilled, shared = compile_offline(kernel, arguments, constants, 90, EAGER)
        record_property("resources", f"{kernel.__name__} {registers} registers, {shared} shared, {spilled} of stack")
        assert shared <= SHARED_MEMORY[90]
        assert spilled <= MAX_SPILL


@compiled
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("case", "capability", "scalars"), COMPILED)
def test_kernels_compile_within_the_resources_of_devices(
    case, capability, scalars, noted, monkeypatch, record_property
):
    """The scalars of torch.compile have 64 bits; kept so, they would take twice as many registers."""
    monkeypatch.setattr(support, "capability", lambda device: divmod(capability, 10))
    note_a_step(case)
    assert len(noted) >= 3
    for kernel, arguments, constants in noted:
        registers, spilled, shared = compile_offline(kernel, arguments, constants, capability, scalars)
        record_property(
            "resources",
            f"{kernel.__name__:<22} sm_{capability} {registers:>3} registers, {shared:>6} bytes shared, "
            f"{spilled:>3} of stack; {case}",
        )
        assert shared <= SHARED_MEMORY[capability], kernel.__name__
        assert spilled <= MAX_SPILL, kernel.__name__


@compiled
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("shape", "blocks", "dtype", "num_bytes"),
    [
        pytest.param((16, 128, 28, 28), ChannelGroups(1, 64), torch.float32, 16, id="channels first"),
        pytest.param((16, 64, 14, 14), ChannelGroups(1, 64), torch.float32, 16, id="14 x 14"),
        pytest.param((16, 64, 14, 14), ChannelGroups(1, 64), torch.bfloat16, 8, id="14 x 14, bfloat16"),
        pytest.param((16, 28, 28, 128), ChannelGroups(3, 64), torch.bfloat16, 16, id="channels last"),
        pytest.param((4, 256, 28, 28), SampleGroups(1, 32), torch.float32, 16, id="group whitening, channels first"),
        pytest.param((4, 28, 28, 256), SampleGroups(3, 32), torch.bfloat16, 16, id="group whitening, channels last"),
    ],
)
def test_samples_are_copied_as_many_bytes_at_a_time_as_are_aligned(shape, blocks, dtype, num_bytes, noted):
    x = torch.empty(shape, dtype=dtype)
    joined_of(blocks).forward(x, None, None)
    assert names(noted)[-1] == "joined_map"
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x(\w+),", compile_kernel(*noted[-1], 90).asm["ptx"])
    assert copies
    assert {int(size, 16) for size in copies} == {num_bytes}


@pytest.mark.parametrize("blocks", [1, 4, 7, 64])
def test_no_program_of_a_large_layer_waits_for_others_to_end(blocks):
    """So many programs as a device holds at a time share the samples: with one more, all others would wait for it."""
    given, device = (blocks, 64, 400_000 // blocks, torch.float32), torch.device("cpu")
    for tiles_of, at_once, others in (
        (joined_tiles.tiles_of_sums(*given, device), 2, 0),
        (joined_tiles.tiles_of_sums(*given, device, other_programs=1), 2, 1),
        (joined_tiles.tiles_of_map(*given, device), 3, 0),
        (joined_tiles.tiles_of_map(*given, device, of_gradient=True), 2, 0),
    ):
        assert 0.9 <= blocks * (tiles_of.num_parts + others) / (at_once * joined_tiles._MULTIPROCESSORS) <= 1


class _Driver:
    """Answer what PyTorch asks Triton about the device while it traces kernels."""

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


@compiled
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("what", "dynamic"), [("IterNorm", True), ("IterNorm", False), ("GroupWhitening", False)], ids=str
)
def test_torch_compile_launches_nothing_but_these_kernels(what, dynamic, monkeypatch):
    """There is one graph forward and one backward, which only set counters to 0 besides, and copy no outputs."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr(triton.runtime.driver, "_active", _Driver())
    graphs = []

    def note(module, inputs):
        nodes = [node for node in module.graph.nodes if node.op == "call_function"]
        graphs.append([_kernel_of(node) or _operation_of(node) for node in nodes])
        results = [node if node is None else node.meta["val"] for node in module.graph.output_node().args[0]]

        def run(arguments):
            arguments.clear()
            return [_made_up(each) for each in results]

        run._boxed_call = True
        return run

    torch._dynamo.reset()
    make, forward_launches, backward_launches = STEPS[what]
    layer, x = make(), torch.randn(8, 256, 30, 30).requires_grad_()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    if what == "GroupWhitening":
        forward_launches = ["joined_statistics", "joined_map"]  # the samples are large
    partition = {"partition_fn": min_cut_rematerialization_partition}  # as Inductor does
    backend = aot_autograd(fw_compiler=note, bw_compiler=note, **partition)
    step = torch.compile(layer, fullgraph=True, backend=backend)
    step(x).sum().backward()
    for graph, launches in zip(graphs, (forward_launches, backward_launches), strict=True):
        found = [each for each in graph if each not in NO_LAUNCHES]
        assert [each for each in found if each != "zeros"] == launches
        assert found.count("zeros") <= 1


def _made_up(result):
    """Return a tensor, a size or None for a result of a graph; a batch of unknown size has 8 samples."""
    if isinstance(result, torch.Tensor):
        return torch.zeros([size if type(size) is int else 8 for size in result.shape])
    return None if result is None else 8


NO_LAUNCHES = {"empty", "new_empty", "empty_like", "getitem", "view", "expand", "sym_size", "mul", "add", "sub"}
NO_LAUNCHES |= {"floordiv", "sym_min", "sym_max", "eq", "le", "lt", "ge", "gt"}


def _kernel_of(node):
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    index = node.kwargs.get("kernel_idx")
    if index is None:
        return None
    kernel = kernel_side_table.id_to_kernel[index]
    empties = [each for each in node.kwargs["kwargs"].values() if _operation_of(each) in ("new_empty", "empty_like")]
    assert len(set(empties)) == len(empties), "PyTorch would merge two of them into one, and copy it"
    return (kernel if hasattr(kernel, "__name__") else kernel.fn).__name__


def _operation_of(node):
    name = getattr(node.target, "__name__", str(node.target))
    return name.partition(".")[0]


# ---------------------------------------------------------------- on a device


@needs_device
@pytest.mark.parametrize(
    ("shape", "blocks", "dtype"),
    [
        ((32, 64, 56, 56), ChannelGroups(1, 64), torch.float32),
        ((32, 28, 28, 160), ChannelGroups(3, 64), torch.bfloat16),
        ((16, 256, 14, 14), ChannelGroups(1, 128), torch.float32),
        ((4, 64, 64, 64), SampleGroups(1, 32), torch.float32),
        ((4, 7, 7, 128), SampleGroups(3, 64), torch.bfloat16),
    ],
    ids=["parts in clusters", "a smaller last group", "128 channels", "large samples", "small samples"],
)
def test_devices_whiten_as_float64_does(shape, blocks, dtype):
    check_against_float64(shape, blocks, dtype, (True, True))


@needs_device
@pytest.mark.parametrize("layer", [lambda: IterNorm(10, group_size=4), lambda: GroupWhitening(5, 10)])
@pytest.mark.parametrize("how", ["a CUDA graph", "torch.compile"])
def test_captured_steps_are_those_of_eager_mode(layer, how):
    check_captured_steps(layer().to(DEVICE), 50, how)  # so large that samples have several parts


@needs_device
def test_results_are_the_same_every_time_and_on_every_stream():
    layer = IterNorm(64, track_running_stats=False).to(DEVICE)
    x = normal(64, 64, 56, 56)
    expected = layer(x)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(layer(x))
        torch.cuda.synchronize()
        assert all(torch.equal(y, expected) for y in results)
        results.clear()
