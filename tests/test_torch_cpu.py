"""PyTorch's kernels for the CPU: pieces, however many, give what the plain kernels give for the whole."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import polywhiten.torch.namespace as xp  # noqa: E402
from polywhiten.blocks import SampleGroups  # noqa: E402
from polywhiten.kernels import Kernels, Term  # noqa: E402
from polywhiten.solvers import solver_for  # noqa: E402
from polywhiten.torch.cpu import kernels as cpu  # noqa: E402
from polywhiten.torch.cpu import pieces, sample_groups  # noqa: E402
from polywhiten.whitening import NO_STATISTICS, Plan, backward, forward  # noqa: E402

EXACT = Kernels(xp)
# (p, q, d, l): rows of one block and of several, with a last piece that is smaller; channels of few and many positions
SHAPES = [(48, 1, 8, 1), (50, 3, 4, 1), (7, 3, 4, 5), (7, 2, 4, 9), (9, 1, 3, 20), (7, 1, 4, 8)]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(pieces, "_BYTES", 1000)
    monkeypatch.setattr(sample_groups, "_SMALLEST", 2)
    monkeypatch.setattr(sample_groups, "_LARGEST", 4)
    sample_groups._largest_tile.cache_clear()
    yield
    sample_groups._largest_tile.cache_clear()


@pytest.fixture
def kernels(monkeypatch):
    """That never hand over to PyTorch's other kernels."""

    def serves(*tensors):
        assert original(*tensors), "these kernels serve all of these tests"
        return True

    original = cpu._serves
    monkeypatch.setattr(cpu, "_serves", serves)
    return cpu.CPUKernels(xp)


def close(found, expected, dtype=torch.float64):
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2}[dtype]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_channel_groups(kernels, shape, dtype, threads):
    _, q, d, _ = shape
    x, dy = torch.randn(2, *shape).to(dtype)
    x = x * 2 + 1
    statistics = torch.float32 if dtype == torch.bfloat16 else dtype
    a, b = torch.randn(2, q, d, d, dtype=statistics)
    mean, bias = torch.randn(2, q, d, dtype=statistics)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = [
            *kernels.moments(x, 1),
            *kernels.cross_moments(dy, x, mean, 1),
            kernels.affine_map([Term(a, x, mean)], bias, 1, dtype),
            kernels.affine_map([Term(a, dy, mean), Term(b, x, bias)], None, 1, dtype),
        ]
    finally:
        torch.set_num_threads(before)
    x, dy, a, b, mean, bias = (tensor.double() for tensor in (x, dy, a, b, mean, bias))
    expected = [
        *EXACT.moments(x, 1),
        *EXACT.cross_moments(dy, x, mean, 1),
        EXACT.affine_map([Term(a, x, mean)], bias, 1, torch.float64),
        EXACT.affine_map([Term(a, dy, mean), Term(b, x, bias)], None, 1, torch.float64),
    ]
    close(found[:4], expected[:4], statistics)
    close(found[4:], expected[4:], dtype)


# tiles of parts of a channel, of one, and of two; of positions, and of a sample where no size fits
GROUPED = [((7, 6, 5, 4), 1), ((5, 6, 2, 2), 1), ((5, 12, 2), 1), ((7, 5, 4, 6), 3), ((5, 3, 6, 4), 2)]


@pytest.mark.parametrize(("shape", "axis"), GROUPED, ids=str)
@pytest.mark.parametrize("given", ["weight and bias", "weight", "bias", "neither"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_group_whitening(kernels, shape, axis, given, dtype):
    x, dy = torch.randn(2, *shape).to(dtype)
    weight = torch.rand(shape[axis], dtype=dtype) + 0.5 if "weight" in given else None
    bias = torch.randn(shape[axis], dtype=dtype) if "bias" in given else None
    plan = Plan(SampleGroups(axis, 3), solver_for("newton", None), 1e-5)
    y, stats = kernels.whiten(plan, x, weight, bias)
    found = y, *kernels.whiten_adjoint(plan, x, weight, bias, stats, dy, NO_STATISTICS)
    assert all(tensor is None or tensor.dtype == dtype for tensor in found)
    x, dy, weight, bias = (None if tensor is None else tensor.double() for tensor in (x, dy, weight, bias))
    y, exact = forward(EXACT, plan, x, weight, bias)
    expected = y, *backward(EXACT, plan, x, weight, bias, exact, dy)
    assert [a is None for a in found] == [b is None for b in expected]
    close(stats, exact, torch.float32 if dtype == torch.bfloat16 else dtype)
    close([a for a in found if a is not None], [b for b in expected if b is not None], dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_survive_a_mean_far_above_the_deviation(kernels, shape):
    """In the worst order of samples too: sorted, so that the first ones are far from the mean of all."""
    x = torch.from_numpy(np.sort(np.random.default_rng(0).normal(1000, 1, shape), axis=0)).float()
    close(kernels.moments(x, 1), EXACT.moments(x.double(), 1), torch.float32)


def test_results_are_not_memory_that_is_used_again(kernels):
    x = torch.randn(7, 2, 4, 9)
    first = (
        kernels.moments(x, 1),
        kernels.affine_map([Term(torch.eye(4).expand(2, 4, 4), x, torch.zeros(2, 4))], None, 1, x.dtype),
    )
    copies = [tensor.clone() for tensor in (*first[0], first[1])]
    kernels.moments(x + 5, 1)
    kernels.affine_map([Term(torch.ones(2, 4, 4), x, torch.zeros(2, 4))], None, 1, x.dtype)
    assert all(torch.equal(a, b) for a, b in zip((*first[0], first[1]), copies, strict=True))
