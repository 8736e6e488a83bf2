"""The compiled kernels on NumPy's arrays: what the plain kernels give in float64."""

import multiprocessing
import threading

import array_api_compat.numpy as xp
import numpy as np
import pytest

pytest.importorskip("numba")

from array_pointers import pointer
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

import polywhiten as pw
from polywhiten.blocks import ChannelGroups, SampleGroups
from polywhiten.cpu import arguments, geometry, kernels, launches, numpy_library, schedule, tuning, workspace
from polywhiten.cpu.backend import numpy_backend
from polywhiten.cpu.device import panels, prefetch
from polywhiten.cpu.device.simd import CACHE_LINE
from polywhiten.cpu.implementation import CpuImplementation
from polywhiten.cpu.kernels import CpuKernels
from polywhiten.cpu.numpy_library import NumPyLibrary
from polywhiten.cpu.runtime import parallel
from polywhiten.kernels import Kernels, Term
from polywhiten.reference import Reference
from polywhiten.solvers import solver_for
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import NO_STATISTICS, Statistics

EXACT = Kernels(xp)
NEWTON = solver_for("newton", 5)
# (p, q, d, l) of channels over the batch: rows and columns of less, and of more, than a panel and than a tile; small
# pictures, several of which are a panel; a single sample
SHAPES = [(1, 40, 3, 1), (3, 1, 3, 1), (600, 3, 17, 1), (5, 2, 40, 49), (3, 2, 16, 300), (300, 2, 5, 4), (1, 2, 33, 7)]
TOLERANCE = {"float64": 1e-12, "float32": 2e-5}


@pytest.fixture
def tune(monkeypatch):
    """Change what plans are made by, for this test."""

    def set_to(**constants):
        for name, value in constants.items():
            monkeypatch.setattr(tuning, name, value)
        forget_plans()

    yield set_to
    forget_plans()


def forget_plans():
    for module in (kernels, schedule):
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


@pytest.fixture(autouse=True)
def _several_threads(monkeypatch, tune):
    """Even for small arrays, and never the plain kernels instead."""

    def can_read(library, *arrays):
        assert original(library, *arrays), "compiled kernels serve all of these tests"
        return True

    original = NumPyLibrary.can_read
    monkeypatch.setattr(NumPyLibrary, "can_read", can_read)
    tune(MIN_OPS_PER_THREAD=10)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def compiled(request, monkeypatch):
    monkeypatch.setattr(numpy_library, "num_threads", lambda: request.param)
    return CpuKernels(xp, NumPyLibrary(), EXACT)


def implementation(used):
    return Reference(used) if used is EXACT else CpuImplementation(used, used.library)


def forward(kernels, spec, *arrays):
    return implementation(kernels).forward(spec, *arrays)


def backward(kernels, spec, *arrays):
    return implementation(kernels).backward(spec, *arrays)


def random(*shape, dtype="float64", seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE[str(a.dtype)] * np.abs(b).max())


def exact(arrays):
    return [None if array is None else array.astype("float64") for array in arrays]


def in_memory(x, order):
    """X with its axes in memory in that order."""
    return np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2), (3, 2, 1, 0)], ids=["columns", "rows", "reversed"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channels_over_the_batch(compiled, shape, dtype, order):
    _, q, d, _ = shape
    x, dy = (in_memory(random(*shape, dtype=dtype, seed=seed), order) for seed in (1, 2))
    x = 2 * x + 3
    a, b = random(2, q, d, d, dtype=dtype)
    bias, s = random(2, q, d, dtype=dtype)
    mean, cov = compiled.moments(x, 1)
    close((mean, cov), EXACT.moments(*exact([x]), 1))
    close(compiled.cross_moments(dy, x, mean, 1), EXACT.cross_moments(*exact([dy, x, mean]), 1))
    terms = [Term(a, dy, s), Term(b, x, mean)]
    for part, shift in ((terms, bias), (terms[1:], bias), (terms, None)):
        found = compiled.affine_map(part, shift, 1, x.dtype)
        wanted = EXACT.affine_map([Term(*exact(term)) for term in part], *exact([shift]), 1, np.float64)
        close([found], [wanted])
        assert found.flags.c_contiguous or order != (0, 1, 2, 3)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("shape", "axis", "groups"),
    [
        ((3, 8, 5, 7), 1, 4),  # channels first: several, and one channel of a group in a panel
        ((2, 6, 300), 1, 3),
        ((3, 32, 10, 14), 1, 16),  # panels that are runs
        ((3, 5, 7, 8), 3, 4),  # channels last: short runs, of one channel, long, and longer than a panel
        ((2, 300, 6), 2, 6),
        ((2, 9, 2, 80), 3, 4),
        ((2, 40, 66), 2, 2),
        ((2, 23, 64), 2, 2),
        ((2, 8, 7, 7), 1, 4),
        ((2, 3, 600), 2, 2),
        ((3, 4, 8, 3), 2, 4),  # between
        ((4, 24), 1, 2),  # no positions
    ],
    ids=str,
)
@pytest.mark.parametrize("affine", ["weight and bias", "weight", "bias", "none"])
def test_group_whitening(compiled, shape, axis, groups, dtype, affine):
    x, dy = random(*shape, dtype=dtype, seed=1) * 2 + 3, random(*shape, dtype=dtype, seed=2)
    weight, bias = random(2, shape[axis], dtype=dtype, seed=3)
    given = x, weight if "weight" in affine else None, bias if "bias" in affine else None
    check_both_passes(compiled, WhiteningSpec(SampleGroups(axis, groups), NEWTON, 1e-3), given, dy)


def check_both_passes(compiled, plan, given, dy):
    """Of x, weight and bias, either of which may be None."""
    y, stats = forward(compiled, plan, *given)
    wanted, expected = forward(EXACT, plan, *exact(given))
    close([y, *stats], [wanted, *expected])
    wanted = backward(EXACT, plan, *exact(given), expected, *exact([dy]))
    for known in (stats, stats._replace(whitener=None), NO_STATISTICS):
        found = backward(compiled, plan, *given, known, dy)
        assert [a is None for a in found] == [a is None for a in given]
        close([a for a in found if a is not None], [a for a in wanted if a is not None])


@pytest.mark.parametrize("cached", [True, False], ids=["block by block", "step by step"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2)], ids=["columns", "rows"])
@pytest.mark.parametrize("affine", ["weight and bias", "weight", "bias", "none"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_iter_norm(compiled, tune, dtype, affine, order, cached):
    tune(MAX_CACHED_BLOCK_BYTES=1 << 19 if cached else 0)
    x, dy = (in_memory(random(5, 24, 6, 7, dtype=dtype, seed=seed), order) for seed in (1, 2))
    x = 2 * x + 3
    weight, bias = random(2, 24, dtype=dtype, seed=3)
    given = x, weight if "weight" in affine else None, bias if "bias" in affine else None
    for size in (4, 12, 24):
        check_both_passes(compiled, WhiteningSpec(ChannelGroups(1, size), NEWTON, 1e-3), given, dy)


@pytest.mark.parametrize("iterations", [1, 2, 5, 12])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("blocks", "d"), [((3,), 1), ((2, 2), 16), ((1,), 40), ((2,), 130)], ids=str)
def test_newton(compiled, blocks, d, dtype, iterations):
    samples = random(*blocks, d, 3 * d)
    cov = (samples @ samples.swapaxes(-1, -2) / (3 * d)).astype(dtype)
    grad = random(*blocks, d, d, dtype=dtype, seed=4)
    solver = solver_for("newton", iterations)
    close([compiled.inverse_sqrt(solver, cov, 1e-5)], [EXACT.inverse_sqrt(solver, *exact([cov]), 1e-5)])
    found = compiled.inverse_sqrt_adjoint(solver, cov, grad, 1e-5)
    close([found], [EXACT.inverse_sqrt_adjoint(solver, *exact([cov, grad]), 1e-5)])


def both_passes(kernels, plan, x, dy, weight, bias):
    """Y, the statistics and the gradients."""
    given = x, weight, bias
    y, stats = forward(kernels, plan, *given)
    return [y, *stats, *backward(kernels, plan, *given, stats, dy)]


@pytest.mark.parametrize("blocks", [ChannelGroups(1, 12), SampleGroups(1, 4)], ids=["channels", "samples"])
class TestBothPasses:
    """What forward and backward have in common, with all that may differ from the usual."""

    x, dy = random(3, 24, 6, 7) + 3, random(3, 24, 6, 7, seed=1)
    weight, bias = random(2, 24, seed=2)

    def check(self, compiled, blocks, solver=NEWTON, **other):
        given = {"x": self.x, "dy": self.dy, "weight": self.weight, "bias": self.bias} | other
        plan = WhiteningSpec(blocks, solver, 1e-3)
        found, wanted = (both_passes(kernels, plan, **given) for kernels in (compiled, EXACT))
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 if a.dtype == np.float32 else 1e-11 * np.abs(b).max())
        for kept in (Statistics(*found[1:3], None), NO_STATISTICS):
            again = backward(compiled, plan, given["x"], given["weight"], given["bias"], kept, given["dy"])
            for a, b in zip(again, found[4:], strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("method", ["eigh", "minimax"])
    def test_other_solvers(self, compiled, blocks, method):
        self.check(compiled, blocks, solver_for(method, None))

    def test_memory_that_is_too_large_to_keep(self, compiled, blocks, tune, monkeypatch):
        tune(MAX_KEPT_BYTES=0)
        monkeypatch.setattr(workspace, "_KEPT", workspace._Kept())
        self.check(compiled, blocks)
        assert workspace._KEPT.workspace is None

    def test_matrices_that_threads_share(self, compiled, blocks, tune):
        tune(MIN_SHARED_SIZE=1)
        one_block = ChannelGroups(1, 24) if isinstance(blocks, ChannelGroups) else blocks
        self.check(compiled, one_block, x=self.x[:1], dy=self.dy[:1])

    def test_parameters_of_another_dtype(self, compiled, blocks):
        self.check(compiled, blocks, weight=self.weight.astype("float32"), bias=self.bias.astype("float32"))

    def test_parameters_with_strides(self, compiled, blocks):
        self.check(compiled, blocks, weight=random(24, 2)[:, 1], bias=np.broadcast_to(np.float64(0.5), (24,)))

    def test_views(self, compiled, blocks):
        for order in ((0, 2, 3, 1), (0, 2, 1, 3), (3, 1, 2, 0)):
            self.check(compiled, blocks, x=in_memory(self.x, order))
            self.check(compiled, blocks, dy=in_memory(self.dy, order))


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1)], ids=["columns", "rows"])
def test_more_channels_than_a_panel_has_samples(compiled, order):
    x, dy = (in_memory(random(2, 272, 301, seed=seed), order) for seed in (0, 1))
    weight, bias = random(2, 272, seed=2)
    for blocks in (ChannelGroups(1, 272), SampleGroups(1, 272)):
        plan = WhiteningSpec(blocks, NEWTON, 1e-3)
        close(*(both_passes(kernels, plan, x, dy, weight, bias) for kernels in (compiled, EXACT)))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("d", [16, 32, 48])
def test_rows_of_large_results_go_past_the_caches(compiled, tune, monkeypatch, dtype, offset, d):
    """Only to where lines of the cache begin: the processor has no such stores to other places."""

    def empty_strided(library, array, like):
        memory = np.empty(like.nbytes + 128, "uint8")
        start = -memory.ctypes.data % 64 + offset * like.itemsize
        return memory[start : start + like.nbytes].view(like.dtype).reshape(like.shape)

    def run(job, *options):
        jobs.append(job)
        original(job, *options)

    jobs, original = [], launches.run
    monkeypatch.setattr(launches, "run", run)
    tune(STREAMING_STORE_BYTES=1)
    monkeypatch.setattr(NumPyLibrary, "empty_strided", empty_strided)
    x, dy = random(2, 603, 3, d, 1, dtype=dtype)
    a, b = random(2, 3, d, d, dtype=dtype)
    mean, shift = random(2, 3, d, dtype=dtype)
    terms = [Term(a, dy, mean), Term(b, x, mean)]
    found = compiled.affine_map(terms, shift, 1, x.dtype)
    close([found], [EXACT.affine_map([Term(*exact(term)) for term in terms], *exact([shift]), 1, np.float64)])
    keys = tuple(compiled.library.key(array) for array in (dy, x))
    plan = kernels._affine_map_plan(compiled.library, keys, 1, compiled.library.num_threads(), True, False)
    *_, (index, _) = plan.programs[0].alignments
    assert [job[index] for job in jobs] == [offset == 0]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_memory_of_workers_begins_where_lines_do(dtype):
    builder = launches.LaunchBuilder(dtype, num_workers=3, worker_size=17)
    assert workspace.workspace(builder.workspace_bytes).address % CACHE_LINE == builder.worker_bytes % CACHE_LINE == 0
    assert builder.temporary(5).offset % CACHE_LINE == builder.temporary(5).offset % CACHE_LINE == 0


@njit
def listed(x, layout, start, samples, lines):
    panel = panels.Panel(pointer(x.ctypes.data, x), layout, 1, start, samples)
    addresses = pointer(lines.ctypes.data, lines)
    found = prefetch.list_lines(prefetch.Prefetch((panel, panel, panel), 1, addresses), 7)
    return found.end, found.per_interval


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2)], ids=["columns", "rows"])
@pytest.mark.parametrize("d", [19, 64])  # of 64 every row begins at the same place of a line
@pytest.mark.parametrize(("inner", "start", "samples"), [(100, 30, 200), (5, 0, 250), (5, 3, 90), (300, 256, 44)])
def test_lines_of_a_panel_are_listed(dtype, order, d, inner, start, samples):
    """All of its memory and no other's; as many as there is room for."""
    x = in_memory(random(64, 2, d, inner, dtype=dtype), order)
    strides = [stride // x.itemsize for stride in x.strides]
    layout = panels.Layout(2, 64, d, inner, strides[1], strides[0], strides[2], strides[3])
    lines = np.zeros(geometry.prefetch_list_size(d) // 2, np.int64)
    count, each = listed(x, layout, start, samples, lines)
    assert (each - 1) * 7 < count <= 7 * each
    numbers = np.arange(x.size).reshape(x.transpose(order).shape).transpose(np.argsort(order))
    numbers = numbers[:, 1].swapaxes(1, 2).reshape(-1, d)[start : start + samples]
    wanted = (parallel.address(x.transpose(order)) + numbers.astype(np.int64) * x.itemsize) // CACHE_LINE * CACHE_LINE
    assert set(lines[:count]) == set(wanted.ravel())
    assert not lines[count:].any()


def test_constant_channels_without_eps(compiled):
    for dtype in ("float32", "float64"):
        zero = np.zeros((2, 3, 3), dtype)
        assert np.isfinite(compiled.inverse_sqrt(NEWTON, zero)).all()
        np.testing.assert_array_equal(compiled.inverse_sqrt_adjoint(NEWTON, zero, zero), zero)


def test_matrices_that_threads_share(compiled, tune):
    tune(MIN_SHARED_SIZE=1)
    for d in (3, 40, 130):
        cov = np.cov(random(d, 3 * d))[None]
        grad = random(1, d, d, seed=4)
        close([compiled.inverse_sqrt(NEWTON, cov, 1e-5)], [EXACT.inverse_sqrt(NEWTON, cov, 1e-5)])
        found = compiled.inverse_sqrt_adjoint(NEWTON, cov, grad, 1e-5)
        close([found], [EXACT.inverse_sqrt_adjoint(NEWTON, cov, grad, 1e-5)])


def test_other_solvers_are_the_plain_ones(compiled):
    cov, solver = np.cov(random(4, 20))[None], solver_for("eigh", None)
    np.testing.assert_array_equal(compiled.inverse_sqrt(solver, cov), EXACT.inverse_sqrt(solver, cov))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::-1],
        lambda x: x[:, :, ::2],
        lambda x: x[..., 1:3],
        lambda x: np.broadcast_to(x[:, :, :, :1], x.shape),
        lambda x: np.asfortranarray(x),
        lambda x: np.frombuffer(x.tobytes()).reshape(x.shape),  # may not be written to
    ],
)
@pytest.mark.parametrize("blocks", [ChannelGroups, SampleGroups], ids=["channels", "samples"])
@pytest.mark.parametrize("channels", [8, 64])  # of 64, blocks have whole tiles of variables
def test_views_are_read_as_they_are(compiled, view, blocks, channels):
    x = view(random(6, channels, 5, 40))
    dy = random(*x.shape, seed=1)
    plan = WhiteningSpec(blocks(1, channels // 2), NEWTON, 1e-5)
    for gradient in (dy, np.broadcast_to(dy[:, :1], dy.shape), np.asfortranarray(dy)):
        y, stats = forward(compiled, plan, x, None, None)
        wanted, expected = forward(EXACT, plan, x, None, None)
        close([y], [wanted])
        dx = backward(compiled, plan, x, None, None, stats, gradient)[0]
        close([dx], [backward(EXACT, plan, x, None, None, expected, gradient)[0]])


@pytest.mark.parametrize("shape", [(600, 1, 8, 1), (3, 2, 16, 300), (9, 2, 16, 49)], ids=["rows", "runs", "columns"])
def test_a_mean_of_a_million_deviations(compiled, shape):
    x = (random(*shape) + 1e6).astype("float32")
    close([compiled.moments(x, 1)[1]], [EXACT.moments(*exact([x]), 1)[1]])


def test_what_is_not_a_number_stays_so(compiled):
    x = random(40, 2, 4, 9)
    x[3, 0, 1, 2] = np.nan
    mean, cov = compiled.moments(x, 1)
    assert np.isnan(mean).sum() == 1
    assert np.isnan(cov).sum() == 7
    assert np.isnan(compiled.inverse_sqrt(NEWTON, cov, 1e-5)[0]).all()
    dy = np.ones((600, 1, 64, 1))
    dy[3, 0, 5, 0] = np.inf
    s, _ = compiled.cross_moments(dy, np.ones_like(dy), np.zeros((1, 64)), 1)
    np.testing.assert_array_equal(s[0], np.where(np.arange(64) == 5, np.inf, 600))


def test_odd_arrays_are_left_to_the_plain_kernels(monkeypatch):
    monkeypatch.undo()
    x = random(30, 4)
    field = np.zeros(30, [("byte", "u1"), ("x", "f8", 4)])["x"]
    field[...] = x
    for odd in (field, x.astype(">f8"), x.view(type("Mine", (np.ndarray,), {}))):
        assert not NumPyLibrary().can_read(odd)
        np.testing.assert_allclose(pw.iter_norm(odd), pw.iter_norm(x), rtol=1e-10)
    assert not NumPyLibrary().can_read(x.astype("float16"))
    assert pw.iter_norm(x.astype("float16")).dtype == np.float16


def test_numpy_without_numba(monkeypatch):
    monkeypatch.setattr("polywhiten.cpu.backend.is_available", lambda: False)
    assert len(numpy_backend().implementations) == 1
    monkeypatch.undo()
    assert len(numpy_backend().implementations) == 2


@pytest.mark.parametrize("layer", ["workqueue", "omp"])
def test_threads_may_call_at_the_same_time(monkeypatch, layer):
    monkeypatch.setattr(parallel.numba, "threading_layer", lambda: layer)
    parallel._numba_threads_lock.cache_clear()
    assert (parallel._numba_threads_lock() is parallel._LOCK) == (layer == "workqueue")
    x = random(300, 64)
    wanted, found = pw.iter_norm(x), []
    callers = [threading.Thread(target=lambda: found.append(pw.iter_norm(x))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    parallel._numba_threads_lock.cache_clear()
    assert len(found) == 4
    for y in found:
        np.testing.assert_array_equal(y, wanted)


def _whitened(x):
    return pw.iter_norm(x)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes aren't forked here")
def test_a_forked_process_whitens_too():
    x = random(300, 64)
    wanted = pw.iter_norm(x)  # with threads, which no child process has
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply_async(_whitened, (x,)).get(timeout=60)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_statistics_of_another_shape_are_an_error(compiled):
    with pytest.raises(ValueError, match=r"shape \(1, 3\): they need \(1, 4\)"):
        compiled.affine_map([Term(np.ones((1, 4, 4)), random(9, 1, 4, 1), np.ones((1, 3)))], None, 1, np.float64)


def test_memory_that_is_too_large_to_keep(compiled, tune, monkeypatch):
    tune(MAX_KEPT_BYTES=0, MIN_SHARED_SIZE=1)
    monkeypatch.setattr(workspace, "_KEPT", workspace._Kept())
    x = random(40, 1, 300, 1)
    mean, cov = compiled.moments(x, 1)
    y = compiled.affine_map([Term(compiled.inverse_sqrt(NEWTON, cov, 1e-5), x, mean)], None, 1, x.dtype)
    assert workspace._KEPT.workspace is None
    mean, cov = EXACT.moments(x, 1)
    close([y], [EXACT.affine_map([Term(EXACT.inverse_sqrt(NEWTON, cov, 1e-5), x, mean)], None, 1, x.dtype)])


def test_sums_of_many_samples_are_exact(compiled):
    dy = np.full((300_000, 1, 16, 1), 0.1, "float32")
    s, _ = compiled.cross_moments(dy, dy, np.zeros((1, 16), "float32"), 1)
    np.testing.assert_allclose(s, 30_000, rtol=1e-6)
    dy = np.full((100_000, 1, 64, 1), 0.1, "float32")  # in panels of fewer samples
    _, k = compiled.cross_moments(dy, np.ones_like(dy), np.zeros((1, 64), "float32"), 1)
    np.testing.assert_allclose(k, 10_000, rtol=3e-6)
    x, dy = random(1, 30_000, 16, dtype="float32"), np.full((1, 30_000, 16), 0.1, "float32")
    plan, bias = WhiteningSpec(SampleGroups(2, 1), NEWTON, 1e-3), np.zeros(16, "float32")
    _, stats = forward(compiled, plan, x, None, bias)
    np.testing.assert_allclose(backward(compiled, plan, x, None, bias, stats, dy)[2], 3000, rtol=1e-6)


@pytest.mark.parametrize("cls", arguments.KERNEL_ARGS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_packed_arguments_are_unpacked_by_the_kernel(cls, dtype):
    """Every field is its own, in the order of the class, whatever its type."""

    @njit
    def unpacked(packed, like):
        args = arguments.unpack(cls, pointer(packed.ctypes.data, packed), pointer(like.ctypes.data, like))
        return plain(args)

    kinds = list(arguments.leaf_types(cls))
    values = [i % 3 > 0 if kind is bool else i + 100 for i, kind in enumerate(kinds)]
    values = [value + 0.5 if kind is float else value for kind, value in zip(kinds, values, strict=True)]
    packed = np.frombuffer(arguments.pack(cls, values), np.int64)
    assert len(packed) == len(values)
    found = unpacked(packed, np.zeros(1, dtype))
    assert list(arguments.flattened([found])) == values


@intrinsic
def plain(typingctx, args):
    """Nested tuples with pointers as integers, which Python can have."""

    def kind(field):
        if isinstance(field, types.BaseTuple):
            return types.Tuple([kind(each) for each in field])
        return types.int64 if isinstance(field, types.CPointer) else field

    def converted(context, builder, field, value):
        if isinstance(field, types.BaseTuple):
            parts = (builder.extract_value(value, i) for i in range(len(field)))
            parts = [converted(context, builder, each, part) for each, part in zip(field, parts, strict=True)]
            return context.make_tuple(builder, kind(field), parts)
        return builder.ptrtoint(value, ir.IntType(64)) if isinstance(field, types.CPointer) else value

    def generate(context, builder, signature, values):
        return converted(context, builder, args, values[0])

    return kind(args)(args), generate
