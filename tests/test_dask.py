"""What is special about Dask: nothing is computed before the user asks for it."""

import numpy as np
import pytest

import polywhiten as pw

da = pytest.importorskip("dask.array")
dask = pytest.importorskip("dask")


@pytest.fixture
def no_computation():
    def refuse(*_args, **_kwargs):
        raise AssertionError("computed before the user asked")

    with dask.config.set(scheduler=refuse):
        yield


@pytest.mark.parametrize("method", ["newton", "eigh", "minimax"])
@pytest.mark.usefixtures("no_computation")
def test_everything_is_lazy(method):
    x = da.random.normal(size=(12, 8, 4, 4), chunks=(5, 8, 4, 4))
    for y, pullback in (
        pw.iter_norm_vjp(x, group_size=3, method=method),
        pw.group_whiten_vjp(x, num_groups=4, method=method),
    ):
        dx, _, _ = pullback(y)
        assert isinstance(y, da.Array)
        assert isinstance(dx, da.Array)
        assert y.shape == dx.shape == x.shape
    stats = pw.whitening_stats(x, group_size=3, method=method)
    assert all(isinstance(s, da.Array) for s in (*stats, pw.apply_whitening(x, stats)))


@pytest.mark.usefixtures("no_computation")
def test_numpy_arrays_beside_a_dask_array_leave_it_lazy():
    """For example, the statistics of a sample are applied to all data."""
    x = da.random.normal(size=(1000, 8, 4, 4), chunks=(100, 8, 4, 4))
    sample = np.random.default_rng(0).normal(size=(50, 8, 4, 4))
    y = pw.apply_whitening(x, pw.whitening_stats(sample), weight=np.ones(8), bias=np.zeros(8))
    z, pullback = pw.iter_norm_vjp(x, weight=np.ones(8), bias=np.zeros(8))
    dx, dweight, dbias = pullback(np.ones(x.shape))
    assert all(isinstance(each, da.Array) for each in (y, z, dx, dweight, dbias))
    for each in (y, dx):
        assert max(each.chunks[0]) <= 100


def test_jax_arrays_beside_a_dask_array_become_chunks_of_its_library():
    jnp = pytest.importorskip("jax.numpy")
    x, weight = np.random.default_rng(0).normal(size=(20, 4)), np.arange(1.0, 5)
    y, pullback = pw.iter_norm_vjp(da.from_array(x, chunks=(5, 4)), weight=jnp.asarray(weight), group_size=3)
    expected, plain = pw.iter_norm_vjp(x, weight=weight, group_size=3)
    for actual, wanted in zip((y, *pullback(y)[:2]), (expected, *plain(expected)[:2]), strict=True):
        assert isinstance(actual.compute(), np.ndarray)
        np.testing.assert_allclose(actual, wanted, atol=1e-10)


def test_tensors_that_dask_does_not_convert_are_refused():
    tensor = pytest.importorskip("array_api_strict").ones(4)
    with pytest.raises(
        TypeError, match=r"weight is a array_api_strict.*: pass a Dask array, or what dask\.array\.asarray"
    ):
        pw.iter_norm(da.ones((8, 4)), weight=tensor)


def test_a_batch_larger_than_a_chunk_stays_in_chunks():
    x = da.random.normal(size=(1000, 8, 4, 4), chunks=(100, 8, 4, 4))
    assert max(pw.iter_norm(x, group_size=4).chunks[0]) <= 100


CALLS = {
    "iter_norm": pw.iter_norm,
    "group_whiten": lambda x: pw.group_whiten(x, num_groups=2),
    "whitening_stats": pw.whitening_stats,
    "apply_whitening": lambda x: pw.apply_whitening(
        x, pw.whitening_stats(np.random.default_rng(1).normal(size=(9, 4)))
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_unknown_chunk_sizes_are_an_error(call):
    x = da.from_array(np.random.default_rng(0).normal(size=(8, 4)), chunks=4)
    for unknown, shape in ((x[x[:, 0] > 0], r"\(nan, 4\)"), (x[:, x[0] > 0], r"\(8, nan\)")):
        with pytest.raises(ValueError, match=rf"x has shape {shape}, .* call x\.compute_chunk_sizes\(\) first"):
            call(unknown)


def test_matrices_of_unknown_number_are_an_error():
    cov = da.from_array(np.stack([np.eye(3)] * 4), chunks=(2, 3, 3))
    with pytest.raises(ValueError, match=r"cov has shape \(nan, 3, 3\), .* call cov\.compute_chunk_sizes\(\) first"):
        pw.inverse_sqrt(cov[da.arange(4, chunks=2) > 1])
