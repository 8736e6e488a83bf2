"""What `inspect` measures is what its documentation defines, and its suggestions fit the data that they are for."""

import numpy as np
import pytest

from polywhiten import Whitening
from polywhiten.embeddings import inspection
from polywhiten.embeddings.inspection import inspect
from polywhiten.embeddings.matrices import components_for
from polywhiten.embeddings.suggestion import suggest


def cosines_of_all_pairs(x):
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(x), 1)]


def data(rows=500, spectrum=(9, 4, 2, 1, 1, 0.5), mean=2.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, len(spectrum))) * np.sqrt(spectrum) + mean


def test_measures_are_those_of_their_definitions():
    x = data()
    found = inspect(x)
    cov = np.cov(x.T, bias=True)
    eigenvalues = np.linalg.eigvalsh(cov)[::-1]
    lengths = np.linalg.norm(x, axis=1)
    np.testing.assert_allclose(found.eigenvalues, eigenvalues, rtol=1e-9)
    damped = eigenvalues / (eigenvalues + 0.1 * eigenvalues.mean())  # by the eps that is suggested
    np.testing.assert_allclose(found.white_eigenvalues, damped, rtol=1e-6)
    assert (found.rows, found.skipped, found.dimension, found.rank) == (500, 0, 6, 6)
    assert found.mean_norm == pytest.approx(lengths.mean())
    assert found.norm_deviation == pytest.approx(lengths.std())
    assert found.centre_norm == pytest.approx(np.linalg.norm(x.mean(0)))
    assert found.condition_number == pytest.approx(eigenvalues[0] / eigenvalues[-1])
    assert found.effective_dimension == pytest.approx(np.trace(cov) ** 2 / np.sum(cov**2))
    assert found.mean_cosine == pytest.approx(cosines_of_all_pairs(x).mean())  # the sample has all rows
    white = Whitening(eps=0.1).fit(x).transform(x)
    assert found.white_mean_cosine == pytest.approx(cosines_of_all_pairs(white).mean(), abs=1e-9)
    assert len(found.cosines) == len(found.white_cosines) == 250
    assert abs(found.cosines.mean() - found.mean_cosine) < 0.1
    shares = np.cumsum(eigenvalues) / eigenvalues.sum()
    assert found.components == {share: int(np.argmax(shares >= share)) + 1 for share in (0.9, 0.95, 0.99)}


def test_batches_whose_memory_is_reused_give_what_the_array_gives():
    x = data()

    def batches():
        buffer = np.empty((64, x.shape[1]))
        for start in range(0, len(x), 64):
            part = x[start : start + 64]
            buffer[: len(part)] = part
            yield buffer[: len(part)]

    found, expected = inspect(batches()), inspect(x)
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-9)
    assert found.mean_norm == pytest.approx(expected.mean_norm)
    assert found.mean_cosine == pytest.approx(expected.mean_cosine)


def test_the_sample_is_uniform_over_all_batches(monkeypatch):
    """Each tenth of the rows is about a tenth of the sample, whether its batch came first or last."""
    sample = inspection._RowSample(200, seed=0)
    for start in range(0, 2000, 100):
        sample.add(np.arange(start, start + 100)[:, None])
    assert len(np.unique(sample.rows)) == 200
    counts = np.bincount(sample.rows[:, 0] // 200, minlength=10)
    assert counts.min() > 8  # 20 are expected, with a deviation of 4
    assert np.any(np.diff(sample.rows[:, 0]) < 0)  # in a random order, so that pairs are random too


def test_rows_that_are_not_finite_are_skipped_if_that_is_asked_for():
    x = data()
    with_nan = np.concatenate([x, [[np.nan] * 6]])
    found = inspect(with_nan, on_nonfinite="skip")
    assert (found.rows, found.skipped) == (500, 1)
    assert found.mean_cosine == pytest.approx(inspect(x).mean_cosine)
    with pytest.raises(ValueError, match="NaN"):
        inspect(with_nan)


def test_a_scale_is_the_same_as_scaled_data():
    x = (data() * 10).astype("int8")
    found, expected = inspect(x, scale=0.1), inspect(x * np.float32(0.1))
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-5)
    assert found.mean_norm == pytest.approx(expected.mean_norm, rel=1e-6)
    assert found.mean_cosine == pytest.approx(expected.mean_cosine, rel=1e-5)


def test_a_given_whitening_is_measured():
    x = data()
    whitening = Whitening("pca", n_components=2).fit(x)
    found = inspect(x, whitening=whitening)
    assert found.whitening is whitening
    assert len(found.white_eigenvalues) == 2
    assert found.suggestion.parameters == {"method": "zca", "eps": 0.1}


@pytest.mark.parametrize("x", [np.ones((10, 3)), np.ones((1, 3)), np.full((3, 3), np.nan), iter([])])
def test_data_that_cannot_be_whitened_are_an_error(x):
    with pytest.raises(ValueError, match=r"X has"):
        inspect(x, on_nonfinite="skip")


# ---------------------------------------------------------------- suggestions

FLAT = np.linspace(2, 1, 64)
STEEP = np.exp(-np.arange(64) / 4.0)
NO_RANK = np.where(np.arange(64) < 50, 1.0, 1e-18)
SUGGESTIONS = {
    "flat": ((FLAT, 10_000, 0.0), {"method": "zca"}, "all are kept"),
    "steep": ((STEEP, 10_000, 0.0), {"method": "pca", "n_components": 19}, "99% of the variance is in 19 of the 64"),
    "no full rank": ((NO_RANK, 10_000, 0.0), {"method": "pca", "n_components": 50}, "this is the rank of the data"),
    "few rows": (
        (FLAT, 600, 0.0),
        {"method": "zca", "shrinkage": "ledoit_wolf"},
        "600 rows are fewer than 10 for each",
    ),
    "rounded": ((FLAT, 10_000, 0.29), {"method": "zca", "eps": 0.2}, "variance of rounding errors"),
}


@pytest.mark.parametrize(("args", "parameters", "words"), SUGGESTIONS.values(), ids=SUGGESTIONS)
def test_a_suggestion_fits_the_spectrum_and_says_why(args, parameters, words):
    suggestion = suggest(*args)
    assert suggestion.parameters == {"eps": 0.1, **parameters}
    assert any(words in reason for reason in suggestion.reasons)
    assert len(suggestion.reasons) == len(set(parameters) | {"method", "eps"}) - ("n_components" in parameters)


def test_unit_length_is_kept():
    x = data(mean=0.0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    assert inspect(x.astype("float16")).suggestion.parameters["normalize"] is True
    assert "normalize" not in inspect(2 * x).suggestion.parameters


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_rank_is_found_through_rounding_errors(dtype):
    """Rounding gives directions without variance some; whitening them would be a mistake."""
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(3000, 10)) @ rng.normal(size=(10, 48)) + 1).astype(dtype)
    found = inspect(x)
    assert found.rank == 10
    assert found.condition_number == np.inf
    assert found.suggestion.parameters == {"method": "pca", "n_components": 10, "eps": 0.1}


def test_components_have_the_share_and_no_more_are_taken():
    values = np.array([6.0, 3.0, 1.0])
    assert [components_for(values, share) for share in (0.5, 0.6, 0.9, 0.91, 1.0)] == [1, 1, 2, 3, 3]
