"""In training, the outputs and gradients of every framework's layers are those of NumPy in float64."""

import numpy as np
import pytest

import polywhiten as pw

SHAPES = {"rows": (40, 24), "sequences": (8, 6, 9), "pictures": (4, 6, 5, 3), "volumes": (3, 6, 2, 3, 4)}
TOLERANCE = {"float64": 1e-10, "float32": 1e-4}
# These aren't all combinations, because JAX compiles each for seconds.
CASES = [(shape, "newton", "float64") for shape in SHAPES]
CASES += [("pictures", "eigh", "float64"), ("pictures", "minimax", "float64"), ("pictures", "newton", "float32")]


@pytest.mark.parametrize(("shape", "method", "dtype"), CASES)
@pytest.mark.parametrize("name", ["iter_norm", "group_whiten"])
def test_a_training_step(layers, name, method, shape, dtype):
    shape = SHAPES[shape]
    rng = np.random.default_rng(0)
    x, dy = rng.normal(1, 2, size=(2, *shape)).astype(dtype)
    api, channels = layers.value.layers, shape[1]
    if name == "iter_norm":
        options, layer = {"group_size": 4}, api.iter_norm(channels, dtype, group_size=4, method=method)
    else:
        options, layer = {"num_groups": 2}, api.group_whitening(2, channels, dtype, method=method)
    y, gradients = api.gradients(layer, x, dy)
    exact, pullback = getattr(pw, f"{name}_vjp")(
        np.float64(x), weight=np.ones(channels), bias=np.zeros(channels), method=method, **options
    )
    for actual, expected in zip((y, *gradients), (exact, *pullback(np.float64(dy))), strict=True):
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[dtype] * np.max(np.abs(expected)))


@pytest.mark.parametrize("name", ["iter_norm", "group_whiten"])
def test_a_relative_eps_is_that_of_the_functions(layers, name):
    x = 1e-3 * np.random.default_rng(0).normal(size=(40, 6, 3))
    api, eps = layers.value.layers, {"eps": 0.1, "relative_eps": True}
    if name == "iter_norm":
        # Its averages are the statistics of one batch, so evaluation does the same as training.
        options, layer = {"group_size": 4}, api.iter_norm(6, group_size=4, momentum=1.0, track="covariance", **eps)
    else:
        options, layer = {"num_groups": 3}, api.group_whitening(3, 6, **eps)
    expected = getattr(pw, name)(x, **options, **eps)
    for y in (api.train(layer, x), api.evaluate(layer, x)):
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)


def test_eps_of_every_number_type_is_kept_as_a_float(layers):
    api = layers.value.layers
    for layer in (api.iter_norm(6, eps=np.float32(0.5)), api.group_whitening(3, 6, eps=np.float32(0.5))):
        assert type(getattr(layer, "eps", None) or layer.epsilon) is float  # so that a configuration can be serialized


def test_eps_may_be_set_at_any_time(layers):
    """As with the frameworks' own layers."""
    x = np.random.default_rng(0).normal(size=(40, 6, 3))
    api = layers.value.layers
    for make in (lambda eps: api.iter_norm(6, eps=eps), lambda eps: api.group_whitening(3, 6, eps=eps)):
        layer = make(1e-5)
        setattr(layer, "eps" if hasattr(layer, "eps") else "epsilon", 0.5)
        np.testing.assert_array_equal(api.train(layer, x), api.train(make(0.5), x))
