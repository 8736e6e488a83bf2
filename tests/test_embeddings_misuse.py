"""Uses of the estimator that look right and aren't: each is an error that says so, or has the result one expects."""

import numpy as np
import pytest

import polywhiten as pw


def data(rows=300, dimensions=6, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(rows, dimensions)) @ random.normal(size=(dimensions, dimensions)) + 3


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_has_the_parameters_of_fit_not_those_that_were_set_since(tmp_path, suffix):
    x, path = data(), tmp_path / f"w{suffix}"
    whitening = pw.Whitening("pca", n_components=2).fit(x)
    whitening.set_params(method="zca", n_components=None, normalize=True, scale=2.0)
    whitening.save(path)
    loaded = pw.Whitening.load(path)
    np.testing.assert_array_equal(loaded.transform(x), whitening.transform(x))
    assert loaded.partial_fit(x).transform(x).shape == (300, 2)


@pytest.mark.parametrize("scale", [np.array(2.0), np.float32(2.0), [1, 2, 3, 4, 5, 6]])
def test_every_scale_that_fit_takes_can_be_saved(tmp_path, scale):
    whitening = pw.Whitening(scale=scale, eps=np.float32(0.5), normalize=np.True_).fit(data())
    whitening.save(tmp_path / "w.npz")
    loaded = pw.Whitening.load(tmp_path / "w.npz")
    np.testing.assert_array_equal(loaded.transform(data()), whitening.transform(data()))
