"""What layers average in training, what they use in evaluation, and what they never average."""

import numpy as np
import pytest
import reference

X = np.random.default_rng(0).normal(size=(16, 5, 4)) * np.linspace(1, 3, 5)[:, None] + 2


def covariance(x):
    return np.cov(np.moveaxis(x, 1, 0).reshape(5, -1), bias=True)


def blocks(matrix):
    """Return the diagonal blocks for 5 channels in groups of 3; the smaller one is padded with the identity."""
    last = np.eye(3)
    last[:2, :2] = matrix[3:, 3:]
    return np.stack([matrix[:3, :3], last])


@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0])
def test_running_averages(layers, momentum):
    api = layers.value.layers
    layer = api.iter_norm(5, group_size=3, momentum=momentum, track="covariance")
    mean, expected = np.zeros(5), np.tile(np.eye(3), (2, 1, 1))
    for shift in (0.0, 1.0, -3.0):
        api.train(layer, X + shift)
        mean += momentum * ((X + shift).mean(axis=(0, 2)) - mean)
        expected += momentum * (blocks(covariance(X)) - expected)
    running = api.running(layer)
    np.testing.assert_allclose(running["mean"], mean, atol=1e-12)
    np.testing.assert_allclose(running["covariance"], expected, atol=1e-12)


@pytest.mark.parametrize("track", ["whitener", "covariance"])
@pytest.mark.parametrize("method", ["newton", "eigh", "minimax"])
def test_evaluation_uses_what_was_tracked(layers, track, method):
    api = layers.value.layers
    layer = api.iter_norm(5, group_size=3, momentum=1.0, track=track, method=method)
    trained = api.train(layer, X)
    np.testing.assert_allclose(api.evaluate(layer, X), trained, atol=1e-8)
    other = api.evaluate(layer, X[:1] + 10)
    centred = X[:1] + 10 - X.mean(axis=(0, 2))[:, None]
    w = np.zeros((5, 5))
    for part in (slice(0, 3), slice(3, 5)):
        w[part, part] = reference.inverse_sqrt(
            covariance(X)[part, part] + 1e-5 * np.eye(part.stop - part.start), method
        )
    np.testing.assert_allclose(other, w @ centred, atol=1e-6)


def test_evaluation_changes_nothing(layers):
    api = layers.value.layers
    layer = api.iter_norm(5)
    api.train(layer, X)
    before = api.running(layer)
    api.evaluate(layer, X + 5)
    for name, value in api.running(layer).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_batches_never_enter(layers, bad):
    api = layers.value.layers
    layer, spoilt = api.iter_norm(5, group_size=3), X.copy()
    spoilt[3, 4, 1] = bad
    api.train(layer, X)
    before = api.running(layer)
    assert not np.all(np.isfinite(api.train(layer, spoilt)))
    for name, value in api.running(layer).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_batch_without_variance_spoils_no_average(layers):
    """As after a layer of which all units are dead. A relative eps is 0 then, so it bounds no whitener."""
    api = layers.value.layers
    layer = api.iter_norm(5, group_size=3, relative_eps=True)
    api.train(layer, X)
    before = np.abs(api.evaluate(layer, X)).max()
    api.train(layer, np.full_like(X, 2.0))
    assert np.abs(api.evaluate(layer, X)).max() < 2 * before
