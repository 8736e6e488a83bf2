"""The estimator whitens rows of every library, in the library's own arrays, as it whitens NumPy's in float64."""

import numpy as np
import pytest

import polywhiten as pw
from polywhiten import rows

TOLERANCE = {"float64": 1e-10, "float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
WEIGHTS = np.random.default_rng(1).integers(0, 3, 60).astype(np.float64)


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Cut the arrays of these tests into blocks, which would take more rows."""
    monkeypatch.setattr(rows, "BLOCK_VALUES", 100)


def data(dtype="float64", dimensions=6):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, dimensions)) @ (np.eye(dimensions) + 0.3 * rng.normal(size=(dimensions, dimensions))) + 2
    return x.astype(dtype)


@pytest.mark.parametrize("parameters", [{}, {"method": "pca", "n_components": 3, "normalize": True}, {"group_size": 4}])
def test_outputs_have_the_library_and_dtype_of_the_input_and_agree_with_float64(library, parameters):
    expected = pw.Whitening(**parameters).fit(library.array(data())).transform(data())
    for dtype in library.value.dtypes:  # of which the library has registered bfloat16 with NumPy
        x = library.array(data(dtype))
        y = pw.Whitening(**parameters).fit(x).transform(x)
        assert type(y) is type(x)
        assert y.dtype == x.dtype
        np.testing.assert_allclose(library.numpy(y).astype(float), expected, atol=TOLERANCE[dtype] * 10, rtol=0)


@pytest.mark.parametrize("sample_weight", [None, WEIGHTS], ids=["equal", "weighted"])
def test_moments_of_blocks_agree_with_their_definition(library, sample_weight):
    fitted = pw.Whitening(shrinkage="ledoit_wolf").fit(library.array(data()), sample_weight=sample_weight)
    x, weights, moments = data(), np.ones(60) if sample_weight is None else sample_weight, fitted.moments_
    mean = weights @ x / weights.sum()
    squared = np.sum((x - mean) ** 2, axis=1)
    assert (moments.count, moments.weight) == (np.count_nonzero(weights), weights.sum())
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(moments.scatter, (weights * (x - mean).T) @ (x - mean), atol=1e-11)
    np.testing.assert_allclose(moments.third, (weights * squared) @ (x - mean), atol=1e-9)
    np.testing.assert_allclose(moments.fourth, weights @ squared**2, rtol=1e-12)


def test_inverse_transform_restores_the_data(library):
    x = library.array(data())
    for parameters in ({}, {"method": "cholesky", "group_size": 4, "scale": 0.5}):
        fitted = pw.Whitening(**parameters).fit(x)
        np.testing.assert_allclose(library.numpy(fitted.inverse_transform(fitted.transform(x))), data(), atol=1e-9)


def test_quantized_integers_are_whitened_as_the_numbers_that_they_stand_for(library):
    quantized, scale = np.clip(np.round(data() * 20), -128, 127).astype(np.int8), np.full(6, 0.05)
    y = pw.Whitening(scale=scale).fit(library.array(quantized)).transform(library.array(quantized))
    np.testing.assert_allclose(library.numpy(y), pw.Whitening().fit_transform(quantized * scale), atol=1e-4)


def test_rows_that_are_not_finite_are_an_error_or_left_out(library):
    x = data()
    x[[20, 41], [3, 5]] = np.nan, np.inf
    # Dask reads chunks at the same time, and may come to the second of these rows first.
    with pytest.raises(ValueError, match=r"NaN or infinity in row (20|41).*skip"):
        pw.Whitening().fit(library.array(x))
    fitted, kept = pw.Whitening(on_nonfinite="skip").fit(library.array(x)), np.delete(np.arange(60), [20, 41])
    y = library.numpy(fitted.transform(library.array(x)))
    assert (fitted.n_samples_seen_, fitted.n_skipped_) == (58, 2)
    np.testing.assert_allclose(y[kept], pw.Whitening().fit_transform(x[kept]), atol=1e-9)
    assert np.isnan(y[[20, 41]]).all()


def test_complex_numbers_are_refused_instead_of_losing_their_imaginary_part(library):
    with pytest.raises((TypeError, ValueError), match=r"dtype.*complex128.*: real numbers|Complex data not supported"):
        pw.Whitening().fit(library.array(data() + 0j))


def test_weights_may_have_any_dtype_of_the_library(library):
    x = library.array(data())
    for dtype in library.value.dtypes:
        weighted = pw.Whitening().fit(x, sample_weight=library.array(WEIGHTS.astype(dtype)))
        np.testing.assert_allclose(weighted.mean_, WEIGHTS @ data() / WEIGHTS.sum())
