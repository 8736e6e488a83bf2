"""The compiled kernels on PyTorch's tensors, beside what the conformance suite and `test_cpu.py` hold them to."""

import mmap
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba")

import polywhiten as pw  # noqa: E402
from polywhiten.cpu import schedule, tuning  # noqa: E402
from polywhiten.cpu.runtime import large_pages, parallel  # noqa: E402
from polywhiten.torch import GroupWhitening, IterNorm, cpu  # noqa: E402


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["iter_norm", "group_whiten"])
def test_any_number_of_threads_gives_the_same(set_threads, monkeypatch, name):
    monkeypatch.setattr(tuning, "MIN_OPS_PER_THREAD", 1)  # even for small tensors
    schedule.forward_plan.cache_clear()
    schedule.backward_plan.cache_clear()
    x = torch.randn(40, 64, 30, dtype=torch.float64, requires_grad=True)
    found = []
    for number in (1, 2, 3):
        set_threads(number)
        y = getattr(pw, name)(x)
        found.append((y.detach(), *torch.autograd.grad(y.pow(3).sum(), x)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-10)


def test_torch_keeps_its_number_of_threads(set_threads):
    for number in (1, 2):
        set_threads(number)
        parallel._start_numba_threads.cache_clear()
        parallel.num_threads()  # Numba's, which NumPy's arrays are whitened by
        assert torch.get_num_threads() == number


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["iter_norm", "group_whiten"])
def test_half_precision_is_computed_in_float32(dtype, name):
    x = torch.randn(8, 16, 20, dtype=getattr(torch, dtype))
    y = getattr(pw, name)(x, **({"num_groups": 4} if name == "group_whiten" else {}))
    wanted = getattr(pw, name)(x.double(), **({"num_groups": 4} if name == "group_whiten" else {}))
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=2e-2)


def test_tensors_that_are_not_what_their_memory_holds():
    z = torch.randn(30, 8, dtype=torch.complex128)
    x = z.conj().imag  # memory of the other sign
    torch.testing.assert_close(pw.iter_norm(x), pw.iter_norm(x.resolve_neg().clone()))


@pytest.mark.parametrize("name", ["iter_norm", "group_whiten"])
def test_parameters_that_are_not_what_a_cpus_memory_holds(name):
    x, weight = torch.randn(30, 8, 4), torch.randn(8)
    kwargs = {"num_groups": 2} if name == "group_whiten" else {}
    found = getattr(pw, name)(x, weight=torch._neg_view(weight), **kwargs)
    torch.testing.assert_close(found, getattr(pw, name)(x, weight=-weight, **kwargs))
    with pytest.raises(ValueError, match="weight is on meta and x on cpu"):
        getattr(pw, name)(x, weight=torch.ones(8, device="meta"), **kwargs).sum().item()


def test_statistics_of_another_dtype_are_never_read_as_those_of_x():
    x = torch.randn(30, 8)
    with pytest.raises(RuntimeError, match="dtype"):
        pw.iter_norm(x, all_reduce=lambda total: total.double())


@pytest.mark.parametrize(
    ("layer", "keeps"),
    [(IterNorm(64), False), (GroupWhitening(16, 64), False), (IterNorm(64, method="eigh"), True)],
    ids=["IterNorm", "GroupWhitening", "eigh"],
)
def test_statistics_that_are_not_small_are_computed_again(layer, keeps):
    """Where that isn't slow: eigendecompositions are kept."""
    x, kept = torch.randn(8, 64, 7, 7, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    others = [t for t in kept if not any(t is given for given in (x, *layer.parameters()))]
    assert (sum(t.nbytes for t in others) > 0.01 * x.nbytes) == keeps
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(layer(x).pow(3).sum(), x)
    torch.testing.assert_close(again, dx)  # one with a derivative of its own, by other kernels
    torch.autograd.grad(dx.pow(2).sum(), x)


@pytest.mark.parametrize(
    ("layer", "shape", "d"),
    [
        (IterNorm(32, group_size=16), (1200, 32), 16),
        (IterNorm(14, group_size=7), (600, 14), 7),
        (GroupWhitening(8, 16), (3, 16, 300), 8),
    ],
    ids=["IterNorm", "odd", "GroupWhitening"],
)
def test_half_of_a_covariance_is_kept_where_all_of_it_is_not_small(layer, shape, d, monkeypatch):
    x, kept, passes = torch.randn(shape, requires_grad=True), [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert [t.shape[1:] for t in kept[-2:]] == [(d,), (d * (d + 1) // 2,)]
    monkeypatch.setattr(schedule, "add_moments", lambda *args: passes.append(args))
    schedule.backward_plan.cache_clear()
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x, retain_graph=True)
    assert not passes
    monkeypatch.undo()
    (again,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)  # from the statistics themselves
    torch.testing.assert_close(dx, again)


def test_half_of_a_covariance_on_another_default_device_and_of_half_precision():
    layer, x = IterNorm(22, group_size=11), torch.randn(900, 22, requires_grad=True)
    with torch.device("meta"):  # of new tensors, where x isn't one
        (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), x)
    (again,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(dx, again)
    half = x.detach().bfloat16().requires_grad_()
    (dx,) = torch.autograd.grad(layer(half).float().pow(3).sum(), half)
    torch.testing.assert_close(dx.float(), again.detach(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0, None])
@pytest.mark.parametrize("track", ["whitener", "covariance"])
def test_running_averages_are_those_of_plain_operations(momentum, track, monkeypatch):
    layers = [IterNorm(6, momentum=momentum, track=track, group_size=4) for _ in range(2)]
    batches = 1e4 * torch.randn(3, 40, 6)
    batches[1, 2, 3] = torch.inf
    for batch in batches:
        layers[0](batch)
    monkeypatch.setattr(cpu, "update_averages", lambda *arguments: None)
    for batch in batches:
        layers[1](batch)
    assert layers[0].num_batches_tracked == 2
    torch.testing.assert_close(layers[0].state_dict(), layers[1].state_dict(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "change"),
    {
        "half": ("running_whitener", lambda t: t.half()),
        "float64": ("running_mean", lambda t: t.double()),
        "strides": ("running_whitener", lambda t: t.mT.contiguous().mT),
        "a count of int32": ("num_batches_tracked", lambda t: t.int()),
    }.values(),
    ids=["half", "float64", "strides", "int32"],
)
def test_buffers_that_were_exchanged(name, change):
    x, layers = torch.randn(40, 6), [IterNorm(6, group_size=3) for _ in range(2)]
    setattr(layers[0], name, change(getattr(layers[0], name)))
    for layer in layers:
        layer(x)
    for own, wanted in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
        torch.testing.assert_close(own.to(wanted.dtype), wanted, rtol=1e-3, atol=1e-3)


def test_buffers_of_another_shape_are_an_error():
    layer = IterNorm(6)
    layer.running_mean = torch.zeros(12)
    with pytest.raises(RuntimeError, match="size"):
        layer(torch.randn(40, 6))


def test_fewer_threads_than_asked_for():
    """Each takes the work of several, and all wait for each other between steps."""
    code = (
        "import torch, polywhiten as pw; torch.manual_seed(0); x = torch.randn(500, 64); print(pw.iter_norm(x).std())"
    )
    command, options = [sys.executable, "-P", "-c", code], {"check": True, "capture_output": True}
    outputs = [
        subprocess.run(command, env={**os.environ, **limit}, **options).stdout
        for limit in ({}, {"OMP_THREAD_LIMIT": "1"})
    ]
    assert outputs[0] == outputs[1] != b""


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux has large pages to ask for")
def test_large_results_ask_for_large_pages(monkeypatch):
    asked = []
    monkeypatch.setattr(large_pages, "_madvise", lambda: lambda *given: asked.append(given))
    pw.iter_norm(torch.randn(100, 64))
    assert not asked
    y = pw.iter_norm(torch.randn(1 << 16, 64))
    ((start, length, advice),) = asked
    assert advice == mmap.MADV_HUGEPAGE
    assert start % mmap.PAGESIZE == length % mmap.PAGESIZE == 0
    assert y.data_ptr() <= start < start + length <= y.data_ptr() + y.nbytes < start + length + mmap.PAGESIZE


def test_tensors_without_memory_are_not_read():
    """PyTorch has zeros without memory as gradients, and sharded modules free the memory of their parameters."""
    layer, x = IterNorm(8), torch.randn(16, 8)
    assert (layer(torch._efficientzerotensor((16, 8))) == 0).all()
    (gradient,) = torch.autograd.grad(layer(x), layer.weight, torch._efficientzerotensor((16, 8)))
    assert (gradient == 0).all()
    for freed in (layer.weight, layer.running_mean, x):
        memory = freed.untyped_storage()
        values = freed.detach().clone()
        memory.resize_(0)
        with pytest.raises(RuntimeError, match="has no memory, because its storage was resized to 0"):
            layer(x)
        memory.resize_(values.nbytes)
        freed.detach().copy_(values)
    layer(x)


def test_torch_without_numba(monkeypatch):
    x = torch.randn(300, 64, dtype=torch.float64)
    wanted = pw.iter_norm(x)
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    monkeypatch.setattr(cpu, "_compiled", lambda: None)
    torch.testing.assert_close(pw.iter_norm(x), wanted)
