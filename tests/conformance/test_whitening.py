"""Every backend computes the values, gradients and statistics of the papers, in every layout and precision."""

import functools
import threading

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

import polywhiten as pw

METHODS = ("newton", "eigh", "minimax")
TOLERANCE = {"float64": 1e-8, "float32": 2e-3, "float16": 2e-2, "bfloat16": 2e-1}


LAYOUTS = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "strided": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
}


@st.composite
def problems(draw, dtypes=("float32", "float64")):
    """Draw a function of `polywhiten` and NumPy arguments for it, with any rank, axis, layout, grouping and solver."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    name, first_axis = draw(st.sampled_from((("iter_norm", 0), ("group_whiten", 1))))
    rank = draw(st.integers(2, 5))
    axis = draw(st.integers(first_axis, rank - 1))
    shape = [draw(st.integers(1, 4)) for _ in range(rank)]
    # Enough samples for a covariance of full rank; test_hard_cases.py tests others.
    others = [i for i in range(first_axis, rank) if i != axis]
    if others:
        shape[others[-1]] = 24
    if name == "iter_norm":
        channels = draw(st.integers(1, 7))
        arguments = {"group_size": draw(st.integers(1, 8))}
    else:
        arguments = {"num_groups": draw(st.integers(1, 4))}
        channels = arguments["num_groups"] * (draw(st.integers(1, 3)) if others else 12)
    shape[axis] = channels
    q, _ = np.linalg.qr(rng.normal(size=(channels, channels)))
    mixing = q * np.geomspace(1, draw(st.sampled_from((1, 0.3, 0.03))), channels) @ q.T
    x = np.moveaxis(np.moveaxis(rng.normal(size=shape), axis, -1) @ mixing + rng.normal(size=channels), -1, axis)
    dtype, method = draw(st.sampled_from(dtypes)), draw(st.sampled_from(METHODS))
    affine = {"weight": rng.uniform(0.5, 2, channels), "bias": rng.normal(size=channels)}
    arguments |= {k: v.astype(dtype) if draw(st.booleans()) else None for k, v in affine.items()}
    arguments |= {
        "x": LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](x.astype(dtype)),
        "axis": draw(st.sampled_from((axis, axis - rank))),
        "method": method,
        "eps": draw(st.sampled_from((1e-5, 1e-3))),
        "relative_eps": draw(st.sampled_from((False, False, True))),
    }
    if method != "eigh":
        arguments["iterations"] = draw(st.sampled_from((1, 3, 5, 8)))
    return name, arguments


def relative_error(actual, expected):
    return np.max(np.abs(np.float64(actual) - expected), initial=0) / max(1, np.max(np.abs(expected), initial=0))


def in_float64(arguments):
    return {k: np.float64(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}


@given(problem=problems())
def test_forward_is_the_definition(library, problem):
    name, arguments = problem
    y = library.call(name, **arguments)
    expected = getattr(reference, name)(**in_float64(arguments))
    dtype = arguments["x"].dtype.name
    assert y.shape == arguments["x"].shape
    assert y.dtype.name == dtype
    assert relative_error(y, expected) < TOLERANCE[dtype]


@given(problem=problems(dtypes=("float64",)), seed=st.integers(0, 99))
def test_gradients_are_those_of_finite_differences(library, problem, seed):
    name, arguments = problem
    rng = np.random.default_rng(seed)
    dy = rng.normal(size=arguments["x"].shape)
    _, gradients = library.vjp(name, dy, **arguments)
    step = 1e-6
    for parameter, gradient in zip(("x", "weight", "bias"), gradients, strict=True):
        value = arguments[parameter]
        if value is None:
            assert gradient is None
            continue
        direction = rng.normal(size=value.shape)
        above, below = (
            np.sum(dy * getattr(reference, name)(**{**arguments, parameter: value + sign * step * direction}))
            for sign in (1, -1)
        )
        slope = (above - below) / (2 * step)
        assert np.sum(gradient * direction) == pytest.approx(slope, rel=2e-5, abs=2e-5 * np.linalg.norm(gradient))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "grouping"), [("iter_norm", {"group_size": 4}), ("group_whiten", {"num_groups": 3})])
def test_lower_precision_stays_near_float64(library, name, grouping, method, dtype):
    if dtype not in library.value.dtypes:
        pytest.skip(f"{library.value.module} has no {dtype}")
    rng = np.random.default_rng(0)
    library.array(np.zeros(1))  # NumPy knows bfloat16 only after a library that defines it is loaded
    x, dy = rng.normal(size=(2, 7, 6, 5, 3)).astype(dtype)
    weight, bias = rng.uniform(0.5, 2, (2, 6)).astype(dtype)
    arguments = {"x": x, "weight": weight, "bias": bias, "method": method, **grouping}
    y, gradients = library.vjp(name, dy, **arguments)
    exact = in_float64(arguments)
    expected, pullback = getattr(pw, f"{name}_vjp")(**exact)
    for actual, wanted in zip((y, *gradients), (expected, *pullback(np.float64(dy))), strict=True):
        assert actual.dtype.name == dtype
        assert relative_error(actual, wanted) < TOLERANCE[dtype]


@given(problem=problems(dtypes=("float64",)))
def test_statistics_applied_are_iter_norm(library, problem):
    name, arguments = problem
    if name != "iter_norm":
        return
    affine = {k: arguments.pop(k) for k in ("weight", "bias")}
    x = library.array(arguments.pop("x"))
    stats = pw.whitening_stats(x, **arguments)
    given_affine = {k: library.array(v) for k, v in affine.items()}
    y = pw.apply_whitening(x, stats, axis=arguments["axis"], **given_affine)
    assert relative_error(library.numpy(y), library.numpy(pw.iter_norm(x, **arguments, **given_affine))) < 1e-10


def test_statistics_are_mean_covariance_and_whitener(library):
    x = np.random.default_rng(0).normal(size=(50, 5)) + 3
    stats = pw.whitening_stats(library.array(x), group_size=3, method="eigh", eps=1e-3)
    mean, covariance, whitener = (library.numpy(s) for s in stats)
    full = np.cov(x.T, bias=True)
    np.testing.assert_allclose(mean, x.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(covariance[0], full[:3, :3], atol=1e-12)
    np.testing.assert_allclose(covariance[1, :2, :2], full[3:, 3:], atol=1e-12)
    for matrix in (covariance[1], whitener[1]):  # the last group is smaller, and padded with the identity
        np.testing.assert_array_equal(matrix[2], [0, 0, 1])
        np.testing.assert_array_equal(matrix[:, 2], [0, 0, 1])
    np.testing.assert_allclose(whitener[0], reference.inverse_sqrt(full[:3, :3] + 1e-3 * np.eye(3)), atol=1e-10)


def test_frozen_statistics_whiten_an_empty_batch(library):
    stats = pw.whitening_stats(library.array(np.random.default_rng(0).normal(size=(20, 5))), group_size=3)
    y = pw.apply_whitening(library.array(np.zeros((0, 5, 4, 4))), stats)
    assert y.shape == (0, 5, 4, 4)


def test_group_whitening_of_an_empty_batch_is_empty(library):
    y = library.call("group_whiten", x=np.zeros((0, 6, 4, 4)), num_groups=3)
    assert y.shape == (0, 6, 4, 4)


def test_group_size_1_is_batch_normalization(library):
    x = np.random.default_rng(0).normal(2, 3, size=(8, 5, 6))
    y = library.call("iter_norm", x=x, group_size=1)
    expected = (x - x.mean(axis=(0, 2), keepdims=True)) / np.sqrt(x.var(axis=(0, 2), keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 4, 4), (5, 5), (2, 3, 6, 6)])
@pytest.mark.parametrize("method", METHODS)
def test_inverse_sqrt_of_stacked_matrices(library, shape, method):
    a = np.random.default_rng(0).normal(size=(*shape[:-1], 20))
    cov = a @ np.swapaxes(a, -1, -2) / 20
    w = library.call("inverse_sqrt", cov=cov, method=method)
    matrices = cov.reshape(-1, *shape[-2:])
    expected = np.stack([reference.inverse_sqrt(m, method) for m in matrices]).reshape(shape)
    np.testing.assert_allclose(w, expected, rtol=1e-8, atol=1e-8)


def _workers(count):
    """Return an `all_reduce` for each of `count` threads, which returns the sum of the arrays of all threads."""
    barrier, shared = threading.Barrier(count, timeout=60), [None] * count

    def all_reduce(rank, array):
        shared[rank] = array
        barrier.wait()
        total = functools.reduce(lambda a, b: a + b, shared)
        barrier.wait()
        return total

    return [functools.partial(all_reduce, rank) for rank in range(count)]


@pytest.mark.parametrize("method", METHODS)
def test_workers_that_share_statistics_are_one_batch(library, method):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 9, 5, 3)) + 2
    arguments = {"weight": rng.uniform(1, 2, 5), "bias": rng.normal(size=5), "group_size": 3, "method": method}
    whole, expected = library.vjp("iter_norm", dy, x=x, **arguments)
    shares, results = (slice(0, 1), slice(1, 1), slice(1, 9)), [None] * 3  # one sample, no sample, eight samples

    def work(rank, all_reduce):
        share = shares[rank]
        results[rank] = library.vjp("iter_norm", dy[share], x=x[share], all_reduce=all_reduce, **arguments)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(_workers(3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    np.testing.assert_allclose(np.concatenate([y for y, _ in results]), whole, atol=1e-10)
    dx, dweight, dbias = zip(*(gradients for _, gradients in results), strict=True)
    np.testing.assert_allclose(np.concatenate(dx), expected[0], atol=1e-9)
    np.testing.assert_allclose(sum(dweight), expected[1], atol=1e-9)
    np.testing.assert_allclose(sum(dbias), expected[2], atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_same_input_same_output(library, method):
    x = np.random.default_rng(0).normal(size=(15, 12, 7)).astype("float32")
    dy = np.ones_like(x)
    for name in ("iter_norm", "group_whiten"):
        grouping = {"group_size": 8} if name == "iter_norm" else {"num_groups": 4}
        (y, first), (again, second) = (library.vjp(name, dy, x=x, method=method, **grouping) for _ in range(2))
        np.testing.assert_array_equal(y, again)
        np.testing.assert_array_equal(first[0], second[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_relative_eps_whitens_embeddings_of_length_1_as_it_does_those_of_variance_1(library, method):
    x = np.random.default_rng(0).normal(size=(600, 256)).astype("float32")
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    arguments = {"group_size": 256, "method": method, "eps": 1e-5, "relative_eps": True}
    y = library.call("iter_norm", x=x, **arguments)
    np.testing.assert_allclose(y, library.call("iter_norm", x=np.float32(16) * x, **arguments), rtol=1e-4, atol=1e-4)
    if method == "eigh":
        assert np.linalg.norm(np.cov(y.T, bias=True) - np.eye(256), 2) < 1e-3  # with an absolute eps=1e-5 it is 0.03
