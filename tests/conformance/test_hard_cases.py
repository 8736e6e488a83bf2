"""Inputs for which a careless implementation of whitening gives wrong results."""

import numpy as np
import pytest
import reference

import polywhiten as pw

METHODS = ("newton", "eigh", "minimax")
CALLS = {"iter_norm": {"group_size": 4}, "group_whiten": {"num_groups": 4}}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("mean", [1e3, 1e4])
@pytest.mark.parametrize("shape", [(64, 8, 10, 10), (2000, 8)], ids=["maps", "rows"])
def test_a_mean_far_larger_than_the_spread(library, mean, shape):
    x = (normal(*shape) + mean * np.linspace(0.5, 1, 8).reshape(1, 8, *[1] * (len(shape) - 2))).astype("float32")
    rows = np.moveaxis(np.float64(x), 1, 0).reshape(8, -1)
    stats = pw.whitening_stats(library.array(x), method="eigh")
    np.testing.assert_allclose(library.numpy(stats.covariance)[0], np.cov(rows, bias=True), atol=1e-4)
    np.testing.assert_allclose(library.numpy(stats.mean), rows.mean(axis=1), rtol=1e-6)
    y = library.call("iter_norm", x=x, method="eigh", eps=0.0)
    white = np.moveaxis(np.float64(y), 1, 0).reshape(8, -1)
    np.testing.assert_allclose(white @ white.T / white.shape[1], np.eye(8), atol=mean * 1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("x", "eps"),
    {
        "constant": (np.full((4, 8, 3), 7.0), 1e-5),
        "some channels constant": (normal(4, 8, 3) * (np.arange(8) > 3)[:, None], 1e-5),
        "fewer samples than channels": (normal(2, 8, 3), 1e-5),
        "one sample repeated": (np.repeat(normal(1, 8, 3), 6, axis=0), 1e-5),
        "two equal channels": (normal(4, 8, 3)[:, [0, 0, 2, 3, 4, 4, 6, 7]], 1e-5),
        "white already": (np.linalg.qr(normal(63, 8))[0].reshape(63, 8, 1).repeat(3, axis=2), 1e-5),
        "eps 0 with full rank": (normal(15, 8, 9), 0.0),
        "tiny": (1e-12 * normal(15, 8, 9), 1e-5),
        "huge": (1e12 * normal(15, 8, 9), 1e-5),
    }.values(),
    ids=lambda v: "" if isinstance(v, float) else None,
)
def test_output_and_gradient_are_finite(library, name, method, x, eps):
    x = x.astype("float32")
    y, (dx, _, _) = library.vjp(name, np.ones_like(x), x=x, method=method, eps=eps, **CALLS[name])
    assert np.all(np.isfinite(y))
    assert np.all(np.isfinite(dx))


def strided(shape, strides, seed=0):
    """Return an array whose elements share memory, because it is smaller than its shape and strides say."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    return np.lib.stride_tricks.as_strided(normal(size, seed=seed), shape, [8 * stride for stride in strides])


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("shape", "strides", "axis"),
    {
        "windows that overlap": ((61, 64), (2, 1), 1),
        "windows as channels": ((61, 8, 16), (16, 16, 1), 1),
        "repeated along an axis": ((16, 10, 64), (1, 0, 16), 2),
        "repeated samples": ((6, 8, 5), (0, 5, 1), 1),
    }.values(),
)
def test_elements_that_share_memory_are_read_as_any_others(library, name, shape, strides, axis):
    x, dy = strided(shape, strides), strided(shape, strides, seed=1)
    y, gradients = library.vjp(name, dy, x=x, axis=axis, **CALLS[name])
    expected, expected_gradients = library.vjp(name, dy.copy(), x=x.copy(), axis=axis, **CALLS[name])
    np.testing.assert_allclose(y, expected, atol=1e-9)
    np.testing.assert_allclose(gradients[0], expected_gradients[0], atol=1e-9)


STEPS = [("newton", t) for t in (12, 13, 20, 60)] + [("minimax", t) for t in (4, 5, 7, 60)] + [("eigh", None)]


@pytest.mark.parametrize(("method", "iterations"), STEPS)
# eps=1e-5 is above float32 rounding for a standard deviation of 1, and far below it for 10.
@pytest.mark.parametrize("std", [1, 10])
def test_fewer_samples_than_channels_for_any_number_of_iterations(library, method, iterations, std):
    x, dy = (std * normal(32, 64)).astype("float32"), normal(32, 64, seed=1).astype("float32")
    solver = {"method": method, "iterations": iterations}
    y, (dx, _, _) = library.vjp("iter_norm", dy, x=x, **solver)
    expected, pullback = pw.iter_norm_vjp(np.float64(x), **solver)
    assert np.linalg.norm(y - expected) < 2e-3 * np.linalg.norm(expected)
    wanted, _, _ = pullback(np.float64(dy))
    assert np.linalg.norm(dx - wanted) < 5e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize(("method", "iterations"), STEPS)
def test_equal_channels_for_any_number_of_iterations(library, method, iterations):
    x, dy = normal(500, 8)[:, [0, 0, 2, 3, 4, 4, 6, 7]].astype("float32"), normal(500, 8, seed=1).astype("float32")
    solver = {"method": method, "iterations": iterations}
    y, (dx, _, _) = library.vjp("iter_norm", dy, x=x, **solver)
    expected, pullback = pw.iter_norm_vjp(np.float64(x), **solver)
    assert np.linalg.norm(y - expected) < 1e-4 * np.linalg.norm(expected)
    wanted, _, _ = pullback(np.float64(dy))
    bound = 3e-2 if method == "eigh" else 5e-3  # LAPACK computes few digits of eigenvalues that are 1e-6 of the largest
    assert np.linalg.norm(dx - wanted) < bound * np.linalg.norm(wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("scale", [2.0**-53, 2.0**-43, 2.0**43, 2.0**53])  # 1e-16 to 1e16
def test_every_scale_that_float32_holds(library, name, method, scale):
    x, dy = normal(300, 8, 3).astype("float32"), normal(300, 8, 3, seed=1).astype("float32")
    arguments = {"method": method, "eps": 0.0, **CALLS[name]}
    expected, (wanted, _, _) = library.vjp(name, dy, x=x, **arguments)
    y, (dx, _, _) = library.vjp(name, dy, x=np.float32(scale) * x, **arguments)
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.float64(dx) * scale, wanted, rtol=1e-3, atol=1e-3 * np.max(np.abs(wanted)))


@pytest.mark.parametrize("eps", [{"eps": 0.0}, {"eps": 1e-5, "relative_eps": True}], ids=["0", "relative"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CALLS)
def test_constant_without_an_absolute_eps_is_zero(library, name, method, eps):
    """So are its gradient and its whitener: large ones would spoil the layers before, and running averages."""
    x = np.full((4, 8, 3), 7.0, "float32")
    y, (dx, _, _) = library.vjp(name, normal(*x.shape).astype("float32"), x=x, method=method, **eps, **CALLS[name])
    assert np.all(y == 0)
    assert np.all(dx == 0)
    if name == "iter_norm":
        stats = pw.whitening_stats(library.array(x), method=method, **eps, **CALLS[name])
        assert np.all(library.numpy(stats.whitener) == 0)


def test_float16_near_its_maximum(library):
    if "float16" not in library.value.dtypes:
        pytest.skip(f"{library.value.module} has no float16")
    x = (normal(64, 8, 5) * 8e3).clip(-65504, 65504).astype("float16")
    for name, grouping in CALLS.items():
        y = library.call(name, x=x, method="eigh", **grouping)
        np.testing.assert_allclose(y, getattr(reference, name)(x, method="eigh", **grouping), atol=2e-2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_input_spoils_its_own_block_alone(library, method, bad):
    x = normal(6, 8, 5)
    x[2, 5, 3] = bad
    with np.errstate(invalid="ignore"):
        y = library.call("iter_norm", x=x, method=method, group_size=4)
        assert np.all(np.isfinite(y[:, :4]))
        assert not np.any(np.isfinite(y[:, 4:]))
        y = library.call("group_whiten", x=x, method=method, num_groups=4)
    assert np.all(np.isfinite(np.delete(y, 2, axis=0)))
    assert not np.any(np.isfinite(y[2]))


@pytest.mark.parametrize("method", METHODS)
def test_nonfinite_matrix_has_no_finite_root(library, method):
    cov = np.stack([np.eye(3), np.full((3, 3), np.nan)])
    w = library.call("inverse_sqrt", cov=cov, method=method)
    assert np.all(np.isfinite(w[0]))
    assert not np.any(np.isfinite(w[1]))
