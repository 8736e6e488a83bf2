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


def test_batches_and_estimators_of_different_scales_are_not_merged():
    x = data()
    changed = pw.Whitening().fit(x).set_params(scale=2.0)
    with pytest.raises(ValueError, match=r"scale=2.0 was None for the data so far"):
        changed.partial_fit(x)
    with pytest.raises(ValueError, match=r"scale=2.0 was None for the data so far"):
        pw.Whitening(scale=2.0).fit(x) + changed
    assert changed.n_samples_seen_ == 300


def test_estimators_of_features_in_another_order_are_not_merged():
    a, b = pw.Whitening().fit(data()), pw.Whitening().fit(data())
    a.feature_names_in_, b.feature_names_in_ = np.array(list("abcdef"), object), np.array(list("bacdef"), object)
    with pytest.raises(ValueError, match=r"'a', 'b'.* and .*'b', 'a'.* differ"):
        a + b


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ma.masked_greater(data(), 6), "X has masked values"),
        (data().astype("datetime64[s]"), r"X has dtype datetime64\[s\]: real numbers"),
    ],
)
def test_values_that_would_silently_be_taken_for_numbers_are_refused(x, message):
    with pytest.raises(TypeError, match=message):
        pw.Whitening().fit(x)


def test_white_rows_and_weights_have_to_be_real():
    whitening = pw.Whitening().fit(data())
    with pytest.raises(TypeError, match="X has dtype complex128: real numbers"):
        whitening.inverse_transform(data() + 0j)
    with pytest.raises(TypeError, match="sample_weight has dtype complex128: real numbers"):
        whitening.fit(data(), sample_weight=np.ones(300) + 0j)
    with pytest.raises(TypeError, match="sample_weight has dtype <U5: real numbers"):
        whitening.fit(data(), sample_weight="equal")


@pytest.mark.parametrize("unit", [1e-300, 1e-46, 1e39, 1e300])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_unit_of_weights_does_not_matter(unit, dtype):
    x, weights = data().astype(dtype), np.arange(300.0)
    expected, whitening = (
        pw.Whitening().fit(x, sample_weight=weights),
        pw.Whitening().fit(x, sample_weight=weights * unit),
    )
    np.testing.assert_allclose(whitening.matrix_, expected.matrix_, rtol=1e-3)
    np.testing.assert_allclose(whitening.mean_, expected.mean_, rtol=1e-5)


@pytest.mark.parametrize("scale", ["a", 1j, [1.0, "b"]])
def test_a_scale_that_is_no_number_is_named(scale):
    with pytest.raises(ValueError, match=r"scale=.* must be a number"):
        pw.Whitening(scale=scale).fit(data())


@pytest.mark.parametrize("name", ["mean", "scatter", "matrix"])
def test_a_file_whose_arrays_do_not_fit_together_is_not_loaded(tmp_path, name):
    pw.Whitening().fit(data()).save(tmp_path / "w.npz")
    arrays = dict(np.load(tmp_path / "w.npz"))
    np.savez(tmp_path / "w.npz", **{**arrays, name: arrays[name][..., :5]})
    with pytest.raises(ValueError, match=r"w.npz is damaged.*shapes"):
        pw.Whitening.load(tmp_path / "w.npz")


def test_a_file_of_an_unknown_version_is_not_loaded(tmp_path):
    np.savez(tmp_path / "w.npz", json='{"format": "polywhiten.Whitening", "version": "x"}')
    with pytest.raises(ValueError, match=r"w.npz has no whitening"):
        pw.Whitening.load(tmp_path / "w.npz")
