"""The measures against closed forms and plain definitions, the constraints against equations that are counted."""

import itertools
import math

import numpy as np
import pytest

import polywhiten as pw
from polywhiten import analysis

KINDS = ("batch_norm", "batch_whitening", "group_norm", "group_whitening")


def rotated(values, seed=0):
    """A covariance with these eigenvalues."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))
    return basis * np.asarray(values) @ basis.T


# ---------------------------------------------------------------- covariances


def test_covariance_is_that_of_samples_and_positions(library):
    x = np.random.default_rng(0).normal(size=(5, 6, 3, 2)) + 100
    rows = np.moveaxis(x, 1, 0).reshape(6, -1)
    cov = analysis.covariance(library.array(x))
    np.testing.assert_allclose(library.numpy(cov), np.cov(rows, bias=True), rtol=1e-9)
    cov = analysis.covariance(library.array(np.moveaxis(x, 1, -1)), axis=-1)
    np.testing.assert_allclose(library.numpy(cov), np.cov(rows, bias=True), rtol=1e-9)


def test_covariance_within_samples_is_that_of_groups(library):
    x = np.random.default_rng(0).normal(size=(4, 6, 5))
    wanted = [np.cov(sample.reshape(3, -1), bias=True) for sample in x]
    np.testing.assert_allclose(library.numpy(analysis.covariance(library.array(x), num_groups=3)), wanted, rtol=1e-9)


def test_measures_of_a_known_spectrum(library):
    values = [[9.0, 4.0, 1.0, 0.25], [1.0, 1.0, 1.0, 1.0]]
    cov = library.array(np.stack([rotated(v) for v in values]))
    np.testing.assert_allclose(library.numpy(analysis.spectrum(cov)), values, rtol=1e-9)
    np.testing.assert_allclose(library.numpy(analysis.condition_number(cov)), [36, 1], rtol=1e-9)
    np.testing.assert_allclose(library.numpy(analysis.condition_number(cov, fraction=0.75)), [9, 1], rtol=1e-9)
    error = np.sqrt((64 + 9 + 0 + 0.75**2) / 4)
    np.testing.assert_allclose(library.numpy(analysis.whitening_error(cov)), [error, 0], rtol=1e-9, atol=1e-12)


def test_correlation_is_that_of_numpy_and_a_constant_variable_has_none(library):
    cov = rotated([9.0, 4.0, 1.0])
    deviations = np.sqrt(np.diag(cov))
    wanted = cov / np.outer(deviations, deviations)
    np.testing.assert_allclose(library.numpy(analysis.correlation(library.array(cov))), wanted, rtol=1e-9)
    mean = np.abs(wanted[np.triu_indices(3, 1)]).mean()
    np.testing.assert_allclose(library.numpy(analysis.mean_correlation(library.array(cov))), mean, rtol=1e-9)
    cov[1] = cov[:, 1] = 0
    result = library.numpy(analysis.correlation(library.array(cov)))
    np.testing.assert_allclose(result[1], [0, 1, 0])
    assert library.numpy(analysis.mean_correlation(library.array(np.ones((1, 1))))) == 0


def test_condition_number_of_what_has_none(library):
    singular = np.stack([np.ones((3, 3)), np.zeros((3, 3)), np.full((3, 3), np.nan)])
    for dtype in ("float32", "float64"):
        result = library.numpy(analysis.condition_number(library.array(singular.astype(dtype))))
        np.testing.assert_array_equal(result, [np.inf, np.nan, np.nan])


# ---------------------------------------------------------------- SND


def batch_norm(x):
    return (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)


def group_norm(x):
    groups = x.reshape(len(x), 4, -1)
    return ((groups - groups.mean(2, keepdims=True)) / groups.std(2, keepdims=True)).reshape(x.shape)


def test_disturbance_by_centring_is_that_of_a_mean():
    """F(x) = x - mean: the sample's output moves with the mean of the m - 1 others, a Gaussian of known covariance."""
    d, m = 64, 17
    scale = np.linspace(0.5, 2, d)
    x = np.random.default_rng(0).normal(size=(20_000, d)) * scale
    batches = analysis.sample_batches(x, m, num_samples=20, num_batches=200)
    snd = analysis.stochastic_normalization_disturbance(lambda x: x - x.mean(axis=0), batches)
    normals = np.random.default_rng(1).normal(size=(100_000, d)) * scale
    wanted = np.linalg.norm(normals, axis=1).mean() * np.sqrt(m - 1) / m / d
    assert abs(snd.value - wanted) < 4 * snd.standard_error + wanted / 400  # of the mean over 200 batches
    assert 0 < snd.standard_error < wanted / 50


@pytest.mark.parametrize("group_size", [1, 4])
def test_disturbance_of_gaussian_data_by_its_definition(group_size):
    d, m = 4, 12
    random = np.random.default_rng(3)
    x = random.normal(size=(6, d))
    batches = [[np.concatenate([sample[None], random.normal(size=(m - 1, d))]) for _ in range(20)] for sample in x]

    def output(batch):
        centred = batch - batch.mean(axis=0)
        if group_size == 1:
            return centred[0] / np.sqrt(batch.var(axis=0))
        values, vectors = np.linalg.eigh(np.cov(batch.T, bias=True))
        return vectors / np.sqrt(values) @ vectors.T @ centred[0]

    outputs = np.array([[output(batch) for batch in one] for one in batches])
    off = outputs - outputs.mean(axis=1, keepdims=True)
    distances = np.sqrt((off**2).sum(axis=2)).mean(axis=1) / d
    snd = analysis.stochastic_normalization_disturbance(
        lambda x: pw.iter_norm(x, group_size=group_size, method="eigh", eps=0), batches
    )
    np.testing.assert_allclose(snd.value, distances.mean(), rtol=1e-9)
    np.testing.assert_allclose(snd.standard_error, distances.std(ddof=1) / math.sqrt(6), rtol=1e-9)


def test_disturbance_grows_with_the_group_and_falls_with_the_batch():
    x = np.random.default_rng(0).normal(size=(1000, 32))

    def snd(m, group_size):
        batches = analysis.sample_batches(x, m, num_samples=20, num_batches=20)
        return analysis.stochastic_normalization_disturbance(
            lambda x: pw.iter_norm(x, group_size=group_size, method="eigh"), batches
        ).value

    by_size = [snd(64, g) for g in (1, 4, 16, 32)]
    by_batch = [snd(m, 8) for m in (16, 64, 256)]
    assert by_size == sorted(by_size)
    assert by_batch == sorted(by_batch, reverse=True)


def test_what_normalizes_samples_has_no_disturbance_at_all(library):
    x = library.array(np.random.default_rng(0).normal(size=(40, 8, 3, 3)).astype("float32"))
    batches = analysis.sample_batches(x, 7, num_samples=3, num_batches=5)
    snd = analysis.stochastic_normalization_disturbance(lambda x: pw.group_whiten(x, num_groups=4), batches)
    assert snd == (0, 0)


def test_group_norm_has_no_disturbance_at_all():
    x = np.random.default_rng(0).normal(size=(40, 8, 3, 3))
    snd = analysis.stochastic_normalization_disturbance(
        group_norm, analysis.sample_batches(x, 7, num_samples=3, num_batches=5)
    )
    assert snd == (0, 0)


def test_disturbance_is_the_same_in_every_library(library):
    x = np.random.default_rng(0).normal(size=(40, 6, 2))
    result = []
    for array in (x, library.array(x)):
        batches = analysis.sample_batches(array, 16, num_samples=3, num_batches=4)
        result.append(analysis.stochastic_normalization_disturbance(lambda x: pw.iter_norm(x, group_size=3), batches))
    np.testing.assert_allclose(*result, rtol=1e-6)


def test_batches_hold_their_sample_first_and_no_sample_twice():
    x = np.arange(30.0)[:, None]
    batches = analysis.sample_batches(x, 8, num_samples=30, num_batches=20, seed=1)
    chosen, seen = [], np.zeros(30)
    for one_sample in batches:
        drawn = np.stack([batch[:, 0] for batch in one_sample]).astype(int)
        assert drawn.shape == (20, 8)
        assert (drawn[:, 0] == drawn[0, 0]).all()
        assert all(len(set(row)) == 8 for row in drawn)
        chosen.append(drawn[0, 0])
        seen += np.bincount(drawn[:, 1:].ravel(), minlength=30)
    assert sorted(chosen) == list(range(30))
    expected = 20 * 30 * 7 / 30
    assert (abs(seen - expected) < 5 * np.sqrt(expected)).all()


def test_batches_are_the_same_when_gone_through_again_and_others_with_another_seed():
    x = np.arange(30.0)[:, None]

    def all_of(batches):
        return np.array([list(one) for one in batches])

    batches = analysis.sample_batches(x, 8, num_samples=3, num_batches=2)
    np.testing.assert_array_equal(all_of(batches), all_of(batches))
    assert not np.array_equal(
        all_of(batches), all_of(analysis.sample_batches(x, 8, num_samples=3, num_batches=2, seed=1))
    )


# ---------------------------------------------------------------- constraints


def equations(kind, y, g):
    """The paper's system for one batch or one sample, y (variables, samples): zero where y is normalized."""
    means = y.mean(axis=1)
    products = y @ y.T / y.shape[1] - np.eye(len(y))
    if kind.endswith("norm"):
        return np.concatenate([means, np.diag(products)])
    return np.concatenate([means, products[np.triu_indices(len(y))]])


def rank(kind, variables, samples):
    """Independent equations at a normalized output: rank of their Jacobian, by central differences."""
    y = pw.iter_norm(
        np.random.default_rng(0).normal(size=(samples, variables)),
        group_size=variables if kind.endswith("whitening") else 1,
        method="eigh",
        eps=0,
    ).T
    assert np.abs(equations(kind, y, variables)).max() < 1e-9
    columns = []
    for i, j in np.ndindex(y.shape):
        step = np.zeros_like(y)
        step[i, j] = 1e-4
        columns.append((equations(kind, y + step, variables) - equations(kind, y - step, variables)) / 2e-4)
    return np.linalg.matrix_rank(np.stack(columns, axis=1), tol=1e-6)


@pytest.mark.parametrize("kind", ["batch_norm", "batch_whitening"])
@pytest.mark.parametrize(("d", "m"), [(1, 2), (1, 5), (2, 4), (3, 4), (3, 9), (5, 6), (5, 12)])
def test_equations_of_a_batch(kind, d, m):
    assert analysis.constraint_number(kind, d, m) == rank(kind, d, m)


@pytest.mark.parametrize("kind", ["group_norm", "group_whitening"])
@pytest.mark.parametrize(("d", "g"), [(6, 1), (6, 2), (12, 3), (20, 4), (30, 5)])
def test_equations_of_a_sample(kind, d, g):
    assert analysis.constraint_number(kind, d, num_groups=g) == rank(kind, g, d // g)


def test_equations_of_groups_and_of_data_sets():
    number = analysis.constraint_number
    assert number("batch_whitening", 11, 16, group_size=4) == 2 * rank("batch_whitening", 4, 16) + rank(
        "batch_whitening", 3, 16
    )
    assert number("batch_whitening", 11, 16, group_size=1) == number("batch_norm", 11, 16)
    assert number("batch_norm", 64, 32, num_samples=1000) == 2 * 64 * 1000 / 32
    assert number("batch_whitening", 64, 32, num_samples=1000) == 64 * 67 / 2 * 1000 / 32
    assert number("group_norm", 64, num_groups=8, num_samples=1000) == 2 * 8 * 1000
    assert number("group_whitening", 64, num_groups=8, num_samples=1000) == 8 * 11 / 2 * 1000


def test_feasible_while_the_equations_are_no_more_than_the_outputs():
    for d, m in itertools.product(range(1, 20), range(1, 20)):
        for kind in ("batch_norm", "batch_whitening"):
            fits = analysis.constraint_number(kind, d, m) <= d * m
            assert analysis.feasible(kind, d, m) == fits == (m >= analysis.least_batch_size(kind, d))
        assert analysis.feasible("batch_norm", d, m) == (m >= 2)
        assert analysis.feasible("batch_whitening", d, m) == (m >= (d + 3) / 2)
        if m > 1:
            assert analysis.feasible("batch_whitening", d, m) == (d <= analysis.largest_group_size(m))
        assert analysis.feasible("batch_whitening", 20, m, group_size=d) == analysis.feasible("batch_whitening", d, m)
    for d in range(2, 200):
        for g in range(1, d + 1):
            for kind in ("group_norm", "group_whitening"):
                fits = analysis.constraint_number(kind, d, num_groups=g) <= d
                assert analysis.feasible(kind, d, num_groups=g) == fits == (g <= analysis.most_groups(kind, d))
            assert analysis.feasible("group_norm", d, num_groups=g) == (g <= d / 2)
            assert analysis.feasible("group_whitening", d, num_groups=g) == (g <= (math.sqrt(8 * d + 9) - 3) / 2)


# ---------------------------------------------------------------- wrong use

X = np.random.default_rng(0).normal(size=(6, 4))
WRONG = {
    "kind": (lambda: analysis.feasible("layer_norm", 4, 4), ValueError, "kind='layer_norm' is unknown: use one of"),
    "missing batch": (
        lambda: analysis.constraint_number("batch_norm", 4),
        ValueError,
        "batch_size=None: kind='batch_norm' needs it",
    ),
    "missing groups": (
        lambda: analysis.constraint_number("group_norm", 4),
        ValueError,
        "num_groups=None: kind='group_norm' needs it",
    ),
    "needless groups": (
        lambda: analysis.feasible("batch_norm", 4, 4, 2),
        ValueError,
        "num_groups=2 has no meaning for kind='batch_norm': leave it out",
    ),
    "needless size": (
        lambda: analysis.feasible("batch_norm", 4, 4, group_size=2),
        ValueError,
        "group_size=2 has no meaning",
    ),
    "too many groups": (lambda: analysis.feasible("group_norm", 4, num_groups=5), ValueError, "num_groups=5 is more"),
    "one sample": (lambda: analysis.largest_group_size(1), ValueError, "batch_size=1 has no covariance"),
    "one feature": (lambda: analysis.most_groups("group_norm", 1), ValueError, "num_features=1 has no variance"),
    "kind over batches": (lambda: analysis.most_groups("batch_norm", 4), ValueError, "kind='batch_norm' is unknown"),
    "fraction": (lambda: analysis.condition_number(np.eye(2), fraction=0), ValueError, "fraction=0 must be above 0"),
    "square": (lambda: analysis.spectrum(X), ValueError, r"cov has shape \(6, 4\): square"),
    "no array": (lambda: analysis.whitening_error([[1.0]]), TypeError, "cov is a builtins.list"),
    "groups": (lambda: analysis.covariance(X, num_groups=3), ValueError, "num_groups=3 doesn't divide 4"),
    "batch": (lambda: analysis.sample_batches(X, 7), ValueError, "batch_size=7 must be from 2 to .* 6"),
    "batch of one": (lambda: analysis.sample_batches(X, 1), ValueError, "batch_size=1 must be from 2"),
    "samples": (lambda: analysis.sample_batches(X, 4), ValueError, "num_samples=50 must be from 1 to .* 6"),
    "seed": (lambda: analysis.sample_batches(X, 4, num_samples=2, seed=-1), ValueError, "seed=-1 must be 0"),
    "no sample": (
        lambda: analysis.stochastic_normalization_disturbance(batch_norm, []),
        ValueError,
        "sample_batches has no samples",
    ),
    "one batch": (
        lambda: analysis.stochastic_normalization_disturbance(batch_norm, [[X]]),
        ValueError,
        "a sample has 1 batches in sample_batches: at least 2",
    ),
    "another shape": (
        lambda: analysis.stochastic_normalization_disturbance(lambda x: x[:, :2], [[X, X]]),
        ValueError,
        r"normalize\(batch\) has shape \(6, 2\): that of the batch, \(6, 4\)",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use(call, error, message):
    with pytest.raises(error, match=message):
        call()
