"""The estimator: its matrices are those of the definitions, and it keeps the promises of scikit-learn's estimators."""

import inspect
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import polywhiten as pw
from polywhiten.moments import Moments

PARAMETERS = list(inspect.signature(pw.Whitening).parameters)
METHODS = ("zca", "pca", "cholesky", "zca_cor", "newton")


def data(rows=400, dimensions=6, mean=2.0, seed=0):
    rng = np.random.default_rng(seed)
    mixing = np.eye(dimensions) + 0.5 * rng.normal(size=(dimensions, dimensions))
    return rng.normal(size=(rows, dimensions)) @ mixing + mean


@parametrize_with_checks(
    [
        pw.Whitening(),
        pw.Whitening("pca", n_components=2),
        pw.Whitening("cholesky", normalize=True),
        pw.Whitening("zca_cor", group_size=2, shrinkage="ledoit_wolf"),
        pw.Whitening("newton", on_nonfinite="skip"),
    ]
)
def test_scikit_learns_checks_of_estimators_pass(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pw.RankWarning)  # the checks fit to few rows
        check(estimator)


@pytest.mark.parametrize("method", METHODS[:4])
@pytest.mark.parametrize("group_size", [None, 4])
def test_outputs_of_exact_methods_are_white_within_groups(method, group_size):
    y = pw.Whitening(method, group_size=group_size, eps=0).fit_transform(data())
    cov = y.T @ y / len(y)
    for group in (slice(0, group_size or 6), slice(group_size or 6, 6)):
        np.testing.assert_allclose(cov[group, group], np.eye(len(cov[group])), atol=1e-12)
    assert group_size is None or abs(cov[0, 5]) > 0.01, "groups aren't whitened against each other"


def test_each_method_has_the_matrix_of_its_definition():
    x = data()
    cov = np.cov(x.T, bias=True)
    matrix = {method: pw.Whitening(method, eps=0).fit(x).matrix_ for method in METHODS[:4]}
    np.testing.assert_allclose(matrix["zca"], matrix["zca"].T, atol=1e-14)
    assert np.all(np.linalg.eigvalsh(matrix["zca"]) > 0)
    np.testing.assert_allclose(np.tril(matrix["cholesky"], -1), 0, atol=0)
    np.testing.assert_allclose(matrix["cholesky"].T @ matrix["cholesky"], np.linalg.inv(cov), atol=1e-12)
    # the correlation of outputs and data is symmetric: that of the data to the power of 1/2
    deviation = np.sqrt(np.diag(cov))
    crossed = matrix["zca_cor"] @ cov / deviation
    np.testing.assert_allclose(crossed @ crossed, cov / np.outer(deviation, deviation), atol=1e-12)
    of_pca = PCA(whiten=True).fit(x)
    np.testing.assert_allclose(
        matrix["pca"], of_pca.components_ / np.sqrt(of_pca.explained_variance_ * 399 / 400)[:, None]
    )


def test_newton_is_the_partial_whitening_of_iternorm():
    x = data()
    fitted = pw.Whitening("newton", iterations=3, eps=1e-3, relative_eps=False).fit(x)
    np.testing.assert_allclose(fitted.transform(x), pw.iter_norm(x, iterations=3, eps=1e-3), atol=1e-10)


def test_eps_is_a_fraction_of_the_mean_variance_unless_it_is_absolute():
    x = data()
    relative, absolute = (pw.Whitening(eps=0.1, relative_eps=relative).fit(x) for relative in (True, False))
    cov = np.cov(x.T, bias=True)
    for fitted, eps in ((relative, 0.1 * np.trace(cov) / 6), (absolute, 0.1)):
        np.testing.assert_allclose(np.linalg.inv(fitted.matrix_ @ fitted.matrix_), cov + eps * np.eye(6), atol=1e-12)
    scaled = pw.Whitening(eps=0.1).fit(1e-4 * x)
    np.testing.assert_allclose(scaled.matrix_ * 1e-4, relative.matrix_, rtol=1e-10)


@pytest.mark.parametrize("method", METHODS[:4])
def test_n_components_keeps_the_principal_components_of_the_largest_variance(method):
    x = data()
    y = pw.Whitening(method, n_components=2, eps=0).fit_transform(x)
    assert y.shape == (400, 2 if method == "pca" else 6)
    np.testing.assert_allclose(np.linalg.eigvalsh(y.T @ y / 400)[-2:], 1, atol=1e-12)
    assert np.linalg.matrix_rank(y) == 2
    principal = PCA(2).fit_transform(x)
    residual = y - principal @ np.linalg.lstsq(principal, y, rcond=None)[0]
    np.testing.assert_allclose(residual, 0, atol=1e-10)


def test_a_share_of_the_variance_chooses_the_number_of_components():
    x = data()
    for share in (0.5, 0.8, 0.99):
        assert pw.Whitening("pca", n_components=share).fit(x).n_components_ == PCA(share).fit(x).n_components_


@given(st.lists(st.integers(1, 399), max_size=6), st.sampled_from([0.0, 1e6]), st.randoms())
def test_batches_in_any_order_give_what_all_data_give(cuts, mean, random):
    x = data(mean=mean)
    batches = np.split(x, sorted(set(cuts)))
    random.shuffle(batches)
    streamed = pw.Whitening(shrinkage="ledoit_wolf")
    for batch in batches:
        streamed.partial_fit(batch)
    first, second = (pw.Whitening(shrinkage="ledoit_wolf").fit(part) for part in (x[:7], x[7:]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pw.RankWarning)
        whole = pw.Whitening(shrinkage="ledoit_wolf").fit(x)
    tolerance = 1e-9 if mean else 1e-12
    for each in (streamed, second + first, pw.Whitening(shrinkage="ledoit_wolf").fit(iter(batches))):
        np.testing.assert_allclose(each.covariance_, whole.covariance_, atol=tolerance)
        np.testing.assert_allclose(each.matrix_, whole.matrix_, atol=tolerance)
        np.testing.assert_allclose(each.shrinkage_, whole.shrinkage_, rtol=tolerance)


def test_statistics_of_float32_with_a_large_mean_are_as_good_as_those_of_float64():
    x = data(rows=5000, mean=1000).astype(np.float32)
    np.testing.assert_allclose(
        pw.Whitening().fit(x).covariance_, pw.Whitening().fit(x.astype(float)).covariance_, rtol=1e-4, atol=1e-4
    )


def test_ledoit_wolfs_shrinkage_is_that_of_scikit_learn():
    for rows in (5, 30, 400):
        x = data(rows)
        assert pw.Whitening(shrinkage="ledoit_wolf").fit(x).shrinkage_ == pytest.approx(ledoit_wolf(x)[1], rel=1e-10)


def test_shrinkage_moves_the_covariance_to_a_multiple_of_the_identity():
    x = data()
    matrix, cov = pw.Whitening(shrinkage=0.3, eps=0).fit(x).matrix_, np.cov(x.T, bias=True)
    np.testing.assert_allclose(
        np.linalg.inv(matrix @ matrix), 0.7 * cov + 0.3 * np.trace(cov) / 6 * np.eye(6), atol=1e-12
    )


def test_a_weight_counts_rows():
    x, weights = data(100), np.random.default_rng(1).integers(0, 4, 100)
    weighted = pw.Whitening(shrinkage="ledoit_wolf").fit(x, sample_weight=weights)
    repeated = pw.Whitening(shrinkage="ledoit_wolf").fit(np.repeat(x, weights, axis=0))
    np.testing.assert_allclose(weighted.matrix_, repeated.matrix_, atol=1e-12)


def test_normalize_gives_rows_of_length_one_and_leaves_zeros():
    x = data()
    fitted = pw.Whitening(normalize=True).fit(x)
    np.testing.assert_allclose(np.linalg.norm(fitted.transform(x), axis=1), 1)
    np.testing.assert_array_equal(fitted.transform(fitted.mean_[None]), np.zeros((1, 6)))
    with pytest.raises(ValueError, match="normalize=True"):
        fitted.inverse_transform(x)


@pytest.mark.parametrize("method", METHODS)
def test_too_few_rows_and_constant_dimensions_warn_and_give_finite_outputs(method):
    few, constant = data(4, 6), data(100)
    constant[:, 2] = 7
    with pytest.warns(pw.RankWarning, match="4 rows are few for 6 directions"):
        assert np.isfinite(pw.Whitening(method).fit_transform(few)).all()
    with pytest.warns(pw.RankWarning, match=r"1 dimension is constant \(2\)"):
        y = pw.Whitening(method).fit_transform(constant)
    assert np.isfinite(y).all()
    assert method == "pca" or np.abs(y[:, 2]).max() < 1e-6


@pytest.mark.filterwarnings("ignore::polywhiten.RankWarning")
def test_directions_without_variance_are_divided_by_the_root_of_eps_and_not_by_rounding_errors():
    x = np.random.default_rng(0).uniform(size=(9, 30))
    whitening = pw.Whitening(eps=1e-6, relative_eps=False).fit(x)
    within = np.linalg.svd(x - x.mean(axis=0))[2][:8]  # the directions with variance
    outside = np.eye(30) - within.T @ within
    np.testing.assert_allclose(outside @ whitening.matrix_, outside / 1e-3, rtol=0, atol=1e-9)


def test_directions_without_variance_become_zero_without_eps():
    x = data() @ np.diag([1, 1, 1, 1, 0, 0])
    with pytest.warns(pw.RankWarning, match=r"2 dimensions are constant \(4, 5\)"):
        y = pw.Whitening(eps=0).fit_transform(x)
    np.testing.assert_allclose(y.T @ y / 400, np.diag([1, 1, 1, 1, 0, 0]), atol=1e-12)
    with pytest.warns(pw.RankWarning), pytest.raises(ValueError, match='method="cholesky" needs a positive definite'):
        pw.Whitening("cholesky", eps=0).fit(x)


def test_a_whitening_is_loaded_as_it_was_saved(tmp_path):
    x = data()
    for suffix in (".npz", ".safetensors"):
        for parameters in (
            {"method": "pca", "n_components": np.int64(3)},
            {"scale": np.full(6, 2.0), "shrinkage": "ledoit_wolf"},
        ):
            fitted = pw.Whitening(**parameters).fit(x)
            fitted.save(tmp_path / f"w{suffix}")
            loaded = pw.Whitening.load(tmp_path / f"w{suffix}")
            np.testing.assert_array_equal(loaded.transform(x), fitted.transform(x))
            np.testing.assert_array_equal((loaded + fitted).matrix_, (fitted + fitted).matrix_)
            assert repr(loaded.get_params()) == repr({**fitted.get_params(), **loaded.get_params()})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.npz", "w.safetensors"]


def test_files_that_have_no_whitening_say_so(tmp_path):
    np.savez(tmp_path / "other.npz", a=1)
    pw.Whitening().fit(data()).save(tmp_path / "cut.npz")
    pw.Whitening().fit(data()).save(tmp_path / "cut.safetensors")
    for name in ("cut.npz", "cut.safetensors"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    for name in ("other.npz", "cut.npz", "cut.safetensors"):
        with pytest.raises(ValueError, match=f"{name}.* is damaged"):
            pw.Whitening.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        pw.Whitening.load(tmp_path / "missing.safetensors")
    with pytest.raises(FileNotFoundError, match=r"'.*missing'$"):
        pw.Whitening().fit(data()).save(tmp_path / "missing" / "w.npz")
    with pytest.raises(ValueError, match=r"must end with \.npz or \.safetensors"):
        pw.Whitening().fit(data()).save(tmp_path / "w.pickle")


def test_a_failed_save_keeps_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "w.npz"
    pw.Whitening().fit(data()).save(path)
    before = path.read_bytes()

    def fail(file, **arrays):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="No space"):
        pw.Whitening().fit(data(seed=1)).save(path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"method": "zcaa"}, r"method='zcaa' is unknown: use one of 'zca', 'pca'"),
        ({"n_components": 7}, "n_components=7 is more than the 6 dimensions of x"),
        ({"n_components": 3, "group_size": 2}, "n_components=3 is more than the 2 dimensions of a group"),
        ({"n_components": 1.5}, "n_components=1.5 must be an integer of 1 or more, or a share"),
        ({"group_size": 0}, "group_size=0 must be 1 or more"),
        ({"iterations": 3}, 'iterations=3 is for method="newton" alone'),
        ({"eps": -1}, "eps=-1.0 must be 0 or more"),
        ({"relative_eps": "yes"}, "relative_eps='yes' must be True or False"),
        ({"shrinkage": 2}, "shrinkage=2 must be a number from 0 to 1"),
        ({"shrinkage": "oas"}, "shrinkage='oas' must be"),
        ({"scale": 0}, "scale=0 must be"),
        ({"scale": [1, 2]}, "scale has 2 values: one, or 6"),
        ({"on_nonfinite": "drop"}, "on_nonfinite='drop' is unknown"),
    ],
)
def test_a_wrong_parameter_is_named_with_its_value(parameters, message):
    with pytest.raises((TypeError, ValueError), match=message):
        pw.Whitening(**parameters).fit(data())


def test_a_failed_fit_leaves_the_estimator_as_it_was():
    x = data()
    fitted = pw.Whitening().fit(x)
    expected = fitted.transform(x)
    with pytest.raises(ValueError, match="NaN or infinity in row 3"):
        fitted.fit(np.where(np.arange(400)[:, None] == 3, np.nan, x)[:, :5])
    np.testing.assert_array_equal(fitted.transform(x), expected)


def test_wrong_data_are_named():
    x = data()
    fitted = pw.Whitening().fit(x)
    for wrong, message in (
        (x[0], "1D array|2 dimensions"),
        (x[:, :5], "5 features, but Whitening is expecting 6 features"),
        (x[:1], "n_samples=1|minimum of 2"),
        (x * 1e200, "overflow float64"),
        (iter([]), "iterator without batches"),
    ):
        with pytest.raises(ValueError, match=message):
            (fitted.transform if wrong is not x and "expecting" in message else pw.Whitening().fit)(wrong)
    for weights, message in (
        ([1.0], r"shape \(1,\)"),
        (-np.ones(400), "below 0"),
        (np.zeros(400), "zero for all rows"),
    ):
        with pytest.raises(ValueError, match=f"sample_weight.*{message}"):
            pw.Whitening().fit(x, sample_weight=weights)
    with pytest.raises(ValueError, match=r"eps=1e-05 and eps=0\.1 differ"):
        fitted + pw.Whitening(eps=0.1).fit(x)


def test_it_works_in_a_pipeline_and_is_cloned_and_pickled():
    x = data()
    pipeline = make_pipeline(StandardScaler(), pw.Whitening("pca", n_components=2)).fit(x)
    assert list(pipeline.get_feature_names_out()) == ["whitening0", "whitening1"]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(pipeline)).transform(x), pipeline.transform(x))
    assert clone(pipeline[-1]).get_params() == pipeline[-1].get_params()
    assert list(pw.Whitening().fit(x).get_feature_names_out()) == [f"x{i}" for i in range(6)]


def test_dimensions_of_other_units_are_white_with_the_default_eps():
    """`eps` is a fraction of each dimension's own variance, and so is `shrinkage`."""
    x = np.random.default_rng(0).normal(size=(5000, 3))
    x[:, 1] += x[:, 0] / 2
    units = np.array([1.0, 1e3, 1e-2])
    white = pw.Whitening("zca_cor").fit_transform(x * units)
    np.testing.assert_allclose(white.T @ white / 5000, np.eye(3), atol=1e-4)
    for parameters in ({"eps": 0.1}, {"shrinkage": 0.1}):
        whitening = pw.Whitening("zca_cor", **parameters)
        np.testing.assert_allclose(whitening.fit_transform(x * units), whitening.fit_transform(x), atol=1e-9)


def test_a_small_deviation_beside_a_large_one_or_a_large_mean_is_not_called_constant():
    x = np.random.default_rng(0).normal(size=(1000, 2)) * [1.0, 1e8]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pw.Whitening("zca_cor").fit(x)
    with pytest.warns(pw.RankWarning, match=r"1 dimension varies by less than 1e-07 of its mean \(1\): float32"):
        pw.Whitening().fit(x * [1, 1e-8] + [0, 1e8])


def test_an_iterator_is_not_fitted_and_transformed_at_once():
    """The second pass would find nothing."""
    with pytest.raises(TypeError, match="X is an iterator, which can be read only once"):
        pw.Whitening().fit_transform(iter(np.split(data(), 4)))


def test_rows_of_weight_0_are_not_there():
    x, weight = data(), np.zeros(400)
    weight[:8] = 1
    with pytest.warns(pw.RankWarning, match="8 rows are few for 6 directions"):
        fitted = pw.Whitening().fit(x, sample_weight=weight)
    assert fitted.n_samples_seen_ == 8
    np.testing.assert_allclose(fitted.covariance_, np.cov(x[:8].T, bias=True), atol=1e-12)
    with pytest.raises(ValueError, match="n_samples=1: a covariance needs at least 2 rows"):
        pw.Whitening().fit(x, sample_weight=weight * (np.arange(400) == 0))


def test_an_iterator_with_a_wrong_batch_adds_nothing():
    x = data()
    whitening = pw.Whitening().partial_fit(x)
    with pytest.raises(ValueError, match="NaN"):
        whitening.partial_fit(iter([x, np.nan * x]))
    assert whitening.n_samples_seen_ == len(x)
    np.testing.assert_array_equal(whitening.mean_, pw.Whitening().fit(x).mean_)


def test_an_iterator_cannot_become_a_data_frame():
    fitted = pw.Whitening().fit(data())
    with pytest.raises(ValueError, match=r'set_output\(transform="pandas"\) can\'t make a data frame'):
        fitted.set_output(transform="pandas").transform(iter([data()]))


def test_a_subclass_may_choose_the_parameters():
    class Compressed(pw.Whitening):
        def __init__(self):
            super().__init__("pca", n_components=2)

    x = data()
    np.testing.assert_array_equal(Compressed().fit_transform(x), pw.Whitening("pca", n_components=2).fit_transform(x))


def test_batches_of_an_iterator_are_transformed_one_by_one():
    x = data()
    fitted = pw.Whitening().fit(iter(np.split(x, 4)))
    outputs = fitted.transform(batch for batch in np.split(x, 4))
    np.testing.assert_array_equal(next(outputs), fitted.transform(x[:100]))
    np.testing.assert_allclose(np.concatenate(list(outputs)), fitted.transform(x[100:]), atol=1e-12)


WITHOUT_SKLEARN = """
import sys
sys.modules["sklearn"] = None
import numpy as np
import polywhiten as pw

x = np.random.default_rng(0).normal(size=(50, 3))

class Frame:
    def __init__(self, columns):
        self.columns = list(columns)

    def __array__(self, dtype=None, copy=None):
        return x

w = pw.Whitening("pca", eps=0.1)
assert np.allclose(w.fit_transform(x), w.fit(x.tolist()).transform(x))
print(w, w.get_params()["eps"])
print(w.set_params(eps=0.2))
for action in (
    lambda: w.transform(x[:, :2]),
    lambda: w.fit(x[0]),
    lambda: w.fit([["a", "b"]]),
    lambda: w.set_params(a=1),
    lambda: pw.Whitening().transform(x),
    lambda: w.fit(Frame("abc")).transform(Frame("acb")),
):
    try:
        action()
    except (TypeError, ValueError) as error:
        print(type(error).__name__, error)
"""


def test_it_works_without_scikit_learn():
    run = subprocess.run([sys.executable, "-c", WITHOUT_SKLEARN], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        "Whitening(method='pca', eps=0.1) 0.1",
        "Whitening(method='pca', eps=0.2)",
        "ValueError X has 2 features, but Whitening is expecting 3 features",
        "ValueError X has shape (3,): 2 dimensions, rows (n, d), are needed",
        "TypeError X has dtype <U1: real numbers are needed",
        f"ValueError a=1 is no parameter of Whitening: use {', '.join(PARAMETERS)}",
        "NotFittedError this Whitening isn't fitted yet: call fit or partial_fit first",
        "ValueError X has columns ['a', 'c', 'b']: they should match the feature names that were passed during fit, "
        "['a', 'b', 'c']",
    ]


def test_importing_polywhiten_does_not_import_scikit_learn():
    code = "import sys, polywhiten; from polywhiten import *; assert 'sklearn' not in sys.modules; polywhiten.Whitening"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_moments_of_nothing_are_the_neutral_element():
    moments = pw.Whitening().fit(data()).moments_
    for total in (Moments.empty(6) + moments, moments + Moments.empty(6)):
        np.testing.assert_array_equal(total.scatter, moments.scatter)
        np.testing.assert_array_equal(total.mean, moments.mean)
    with pytest.raises(ValueError, match="6 and of 5 dimensions"):
        moments + Moments.empty(5)
    with pytest.raises(ValueError, match="with and without fourth"):
        moments + Moments.empty(6, fourth=True)
