"""Measures are compared with closed forms and definitions, constraints with numbers of independent equations."""

import gc
import itertools
import math
import re
import sys
import warnings
import weakref

import numpy as np
import pytest

import polywhiten as pw
from polywhiten import analysis

KINDS = ("batch_norm", "batch_whitening", "group_norm", "group_whitening")


def rotated(values, seed=0):
    """Return a covariance with these eigenvalues."""
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
    """With F(x) = x - mean, a sample's output varies with the mean of the other m - 1, which is Gaussian."""
    d, m = 64, 17
    scale = np.linspace(0.5, 2, d)
    x = np.random.default_rng(0).normal(size=(20_000, d)) * scale
    batches = analysis.sample_batches(x, m, num_samples=20, num_batches=200)
    snd = analysis.stochastic_normalization_disturbance(lambda x: x - x.mean(axis=0), batches)
    normals = np.random.default_rng(1).normal(size=(100_000, d)) * scale
    wanted = np.linalg.norm(normals, axis=1).mean() * np.sqrt(m - 1) / m / d
    # The second term is for the mean over 200 batches.
    assert abs(snd.value - wanted) < 4 * snd.standard_error + wanted / 400
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
        arrays = np.array([list(one) for one in batches])
        return arrays[np.argsort(arrays[:, 0, 0, 0])]  # sorted by sample, because samples come in any order

    batches = analysis.sample_batches(x, 8, num_samples=30, num_batches=2)
    np.testing.assert_array_equal(all_of(batches), all_of(batches))
    other = all_of(analysis.sample_batches(x, 8, num_samples=30, num_batches=2, seed=1))
    assert (all_of(batches) != other).any(axis=(1, 2, 3)).all()


# ---------------------------------------------------------------- constraints


def equations(kind, y, g):
    """Return the paper's equations for a batch or sample y (variables, samples), which are zero for normalized y."""
    means = y.mean(axis=1)
    products = y @ y.T / y.shape[1] - np.eye(len(y))
    if kind.endswith("norm"):
        return np.concatenate([means, np.diag(products)])
    return np.concatenate([means, products[np.triu_indices(len(y))]])


def rank(kind, variables, samples):
    """Count the independent equations at a normalized output: the rank of their Jacobian by central differences."""
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
            assert analysis.is_feasible(kind, d, m) == fits == (m >= analysis.min_batch_size(kind, d))
        assert analysis.is_feasible("batch_norm", d, m) == (m >= 2)
        assert analysis.is_feasible("batch_whitening", d, m) == (m >= (d + 3) / 2)
        if m > 1:
            assert analysis.is_feasible("batch_whitening", d, m) == (d <= analysis.largest_group_size(m))
        of_group = analysis.is_feasible("batch_whitening", 20, m, group_size=d)
        assert of_group == analysis.is_feasible("batch_whitening", d, m)
    for d in range(2, 200):
        for g in range(1, d + 1):
            for kind in ("group_norm", "group_whitening"):
                fits = analysis.constraint_number(kind, d, num_groups=g) <= d
                assert analysis.is_feasible(kind, d, num_groups=g) == fits == (g <= analysis.max_num_groups(kind, d))
            assert analysis.is_feasible("group_norm", d, num_groups=g) == (g <= d / 2)
            assert analysis.is_feasible("group_whitening", d, num_groups=g) == (g <= (math.sqrt(8 * d + 9) - 3) / 2)


@pytest.mark.parametrize(
    ("former", "present"),
    [("feasible", "is_feasible"), ("least_batch_size", "min_batch_size"), ("most_groups", "max_num_groups")],
)
def test_former_names_go_on_working_with_a_warning_that_says_the_present_ones(former, present):
    with pytest.warns(DeprecationWarning, match=f"polywhiten.analysis.{former} is called {present} now"):
        assert getattr(analysis, former) is getattr(analysis, present)


def test_the_former_module_goes_on_working_with_a_warning():
    sys.modules.pop("polywhiten.analysis.constraints", None)
    with pytest.warns(DeprecationWarning, match="constraints is deprecated: use polywhiten.analysis") as caught:
        from polywhiten.analysis.constraints import InfeasibleWarning, feasible
    assert caught[0].filename == __file__
    assert feasible is analysis.is_feasible
    assert InfeasibleWarning is analysis.InfeasibleWarning


def test_a_name_that_there_never_was_is_an_error():
    with pytest.raises(AttributeError, match=r"'polywhiten\.analysis' has no attribute 'fewest_groups'"):
        analysis.fewest_groups  # noqa: B018


# ---------------------------------------------------------------- wrong use

X = np.random.default_rng(0).normal(size=(6, 4))
WRONG = {
    "kind": (lambda: analysis.is_feasible("layer_norm", 4, 4), ValueError, "kind='layer_norm' is unknown: use one of"),
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
        lambda: analysis.is_feasible("batch_norm", 4, 4, 2),
        ValueError,
        "num_groups=2 has no meaning for kind='batch_norm': leave it out",
    ),
    "needless size": (
        lambda: analysis.is_feasible("batch_norm", 4, 4, group_size=2),
        ValueError,
        "group_size=2 has no meaning",
    ),
    "too many groups": (
        lambda: analysis.is_feasible("group_norm", 4, num_groups=5),
        ValueError,
        "num_groups=5 is more",
    ),
    "one sample": (lambda: analysis.largest_group_size(1), ValueError, "batch_size=1 has no covariance"),
    "one feature": (lambda: analysis.max_num_groups("group_norm", 1), ValueError, "num_features=1 has no variance"),
    "kind over batches": (lambda: analysis.max_num_groups("batch_norm", 4), ValueError, "kind='batch_norm' is unknown"),
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
        "sample_batches gives fewer than 2 batches for a sample: 1",
    ),
    "no steps": (lambda: analysis.convergence(np.eye(2), 0), ValueError, "iterations=0 must be 1 or more"),
    "no error": (lambda: analysis.required_iterations(np.eye(2), 0), ValueError, "error=0 must be above 0"),
    "never": (
        lambda: analysis.required_iterations(np.diag([1.0, 0.0]), 0.1),
        ValueError,
        r"error=0.1 isn't reached in 64 steps, which leave 0\.71: add eps",
    ),
    "never, for NaN": (lambda: analysis.required_iterations(np.full((2, 2), np.nan), 0.1), ValueError, "leave nan"),
    "no shape": (lambda: analysis.recommend((8,)), ValueError, r"axis=1 holds no channels in shape=\(8,\)"),
    "sample axis": (lambda: analysis.recommend((8, 4), axis=-2), ValueError, "axis=-2 holds no channels"),
    "no size": (lambda: analysis.recommend((8, 0)), ValueError, r"shape\[1\]=0 must be 1 or more"),
    "batch norm": (lambda: analysis.recommend((8, 4), "batch_norm"), ValueError, "kind='batch_norm' is unknown"),
    "one sample a channel": (lambda: analysis.recommend((1, 4)), ValueError, r"shape=\(1, 4\) gives 1 sample"),
    "one value a sample": (lambda: analysis.recommend((4, 1), "group_whitening"), ValueError, "gives 1 value a sample"),
    "another shape": (
        lambda: analysis.stochastic_normalization_disturbance(lambda x: x[:, :2], [[X, X]]),
        ValueError,
        r"normalize\(batch\) has shape \(6, 2\): it must have the batch's, \(6, 4\)",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---------------------------------------------------------------- convergence


def newton_errors(values, iterations):
    """Return the errors of the paper's recurrence, applied to each eigenvalue divided by the trace."""
    values = np.asarray(values) / np.sum(values)
    p, errors = np.ones_like(values), []
    for _ in range(iterations):
        p = (3 * p - p**3 * values) / 2
        errors.append(np.sqrt(np.mean((p * p * values - 1) ** 2)))
    return errors


def test_convergence_is_that_of_the_papers_recurrence(library):
    spectra = [[4.0, 1.0, 0.5, 0.01], [1.0, 1.0, 1.0, 1.0]]
    cov = library.array(np.stack([rotated(values) for values in spectra]))
    errors = library.numpy(analysis.convergence(cov, 9))
    np.testing.assert_allclose(errors, [newton_errors(values, 9) for values in spectra], atol=1e-9)


def test_convergence_is_what_the_layers_leave():
    x = np.random.default_rng(0).normal(size=(200, 5)) * [5, 2, 1, 1, 0.5]
    errors = analysis.convergence(analysis.covariance(x), 6)
    for iterations, error in enumerate(errors, start=1):
        y = pw.iter_norm(x, iterations=iterations, eps=0)
        np.testing.assert_allclose(analysis.whitening_error(analysis.covariance(y)), error, atol=1e-9)


def test_required_iterations_are_the_first_that_do(library):
    spectra = [[4.0, 1.0, 0.5, 0.01], [1.0, 1.0, 1.0, 1.0]]
    cov = library.array(np.stack([rotated(values) for values in spectra]))
    worst = np.max([newton_errors(values, 20) for values in spectra], axis=0)
    for wanted in (0.9, 0.5, 0.1, 1e-3, 1e-6):
        assert analysis.required_iterations(cov, wanted) == 1 + np.flatnonzero(worst <= wanted)[0]


# ---------------------------------------------------------------- recommendations

SHAPES = [(32, 256, 14, 14), (32, 256), (2, 64, 4, 4), (256, 67, 7, 7), (16, 97), (2, 2), (9, 1, 3), (64, 80, 28, 28)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_recommended_groups_are_feasible_and_fit_the_layers(shape):
    channels, samples, values = shape[1], math.prod(shape) // shape[1], math.prod(shape[1:])
    advice = analysis.recommend(shape)
    assert analysis.is_feasible("batch_whitening", channels, samples, group_size=advice.value)
    assert advice.value <= 64
    assert advice.value == 1 or samples >= 8 * advice.value
    assert advice.share == analysis.constraint_number("batch_whitening", channels, samples, group_size=advice.value) / (
        channels * samples
    )
    assert pw.iter_norm(np.random.default_rng(0).normal(size=shape), group_size=advice.value).shape == shape
    assert str(advice).startswith(f"group_size={advice.value}: ")
    if values > 1:
        advice = analysis.recommend(shape, "group_whitening")
        assert channels % advice.value == 0
        assert advice.value <= 32
        assert analysis.is_feasible("group_whitening", values, num_groups=advice.value)
        assert advice.share <= 0.5 or values < 4
        assert advice == analysis.recommend((*shape[:1], *shape[2:], channels), "group_whitening", axis=-1)


RECOMMENDED = {
    "the paper's": ((32, 256, 14, 14), "batch_whitening", 64, "the paper's size"),
    "all channels": ((32, 3, 14, 14), "batch_whitening", 3, "all channels"),
    "few samples": ((32, 256), "batch_whitening", 4, "an eighth of the 32 samples"),
    "too few samples": ((4, 256), "batch_whitening", 1, "only 4 samples.* batch normalization"),
    "a divisor": ((256, 80, 7, 7), "batch_whitening", 40, "largest divisor of 80 channels up to 64"),
    "no divisor": ((256, 67, 7, 7), "batch_whitening", 64, "power of two up to 64.* last group is smaller"),
    "the default": ((1, 256, 14, 14), "group_whitening", 32, "default"),
    "few values": ((1, 256), "group_whitening", 8, "up to 14, .* half of a sample's 256 values"),
    "too few values": ((1, 3), "group_whitening", 1, "only 3 values.* layer normalization"),
}


@pytest.mark.parametrize(("shape", "kind", "value", "reason"), RECOMMENDED.values(), ids=RECOMMENDED)
def test_recommendation_and_its_reason(shape, kind, value, reason):
    advice = analysis.recommend(shape, kind)
    assert advice.value == value
    assert re.search(reason, advice.reason)


# ---------------------------------------------------------------- warnings of the layers


def messages(caught):
    return [str(warning.message) for warning in caught if warning.category is analysis.InfeasibleWarning]


@pytest.fixture
def said():
    """Return a function that calls a layer and returns the messages of its warnings."""

    def run(layer, *args, **kwargs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layer(*args, **kwargs)
        return messages(caught)

    return run


def test_pytorch_layers_say_once_what_is_infeasible_and_what_is_not(said):
    torch = pytest.importorskip("torch")
    from polywhiten.torch import GroupWhitening, IterNorm

    layer = IterNorm(64, group_size=48)
    assert said(layer.eval(), torch.randn(20, 64)) == []
    (text,) = said(layer.train(), torch.randn(20, 64))
    assert text.startswith("IterNorm: group_size=48 is infeasible")
    assert "(d + 3) / 2 = 25.5 samples" in text
    assert "there are 20; use group_size=37 or less, or a larger batch" in text
    assert said(layer, torch.randn(20, 64)) == []
    assert said(IterNorm(64, group_size=37), torch.randn(20, 64)) == []
    assert len(said(IterNorm(64, group_size=38), torch.randn(20, 64))) == 1
    assert said(IterNorm(64), torch.randn(20, 64, 2)) == []  # positions count as samples
    assert said(IterNorm(8), torch.randn(6, 8)) == []  # a group is no larger than the number of channels

    layer = GroupWhitening(32, 64)
    (text,) = said(layer, torch.randn(3, 64))
    assert text.startswith("GroupWhitening: num_groups=32 is infeasible: samples of d = 64 values")
    assert "= 9.9 groups; use num_groups=8" in text
    assert said(layer, torch.randn(3, 64)) == []
    assert said(GroupWhitening(8, 64), torch.randn(3, 64)) == []
    assert said(GroupWhitening(32, 64), torch.randn(3, 64, 3, 3)) == []


def test_pytorch_compiles_layers_whole_without_a_word(said):
    torch = pytest.importorskip("torch")
    from polywhiten.torch import GroupWhitening, IterNorm

    for layer, x in ((IterNorm(16), torch.randn(5, 16)), (GroupWhitening(8, 16), torch.randn(5, 16))):
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
        assert said(compiled, x) == []
        assert len(said(layer, x)) == 1  # the layer itself, which isn't compiled, still warns


def test_keras_layers_say_once_what_is_infeasible_and_what_is_not(said):
    keras = pytest.importorskip("keras")
    from polywhiten.keras import GroupWhitening, IterNorm

    x = np.random.default_rng(0).normal(size=(20, 64)).astype("float32")
    layer = IterNorm(group_size=48, name="first")
    assert said(layer, x) == []
    (text,) = said(layer, x, training=True)
    assert text.startswith("first: group_size=48 is infeasible")
    assert "there are 20; use group_size=37 or less, or a larger batch" in text
    assert said(layer, x, training=True) == []
    assert said(IterNorm(group_size=37), x, training=True) == []
    assert said(IterNorm(), keras.Input((64,)), training=True) == []
    # With a mask, the number of samples isn't known.
    assert said(IterNorm(), x, training=True, mask=np.ones(20, dtype=bool)) == []

    layer = GroupWhitening(groups=32, axis=1, name="second")
    (text,) = said(layer, x)
    assert text.startswith("second: groups=32 is infeasible")
    assert "= 9.9 groups; use groups=8" in text
    assert said(layer, x) == []
    assert said(GroupWhitening(groups=8), x) == []
    assert said(GroupWhitening(), keras.Input((64,))) == []


@pytest.fixture
def caught():
    """All InfeasibleWarnings of a test."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", analysis.InfeasibleWarning)
        yield found


def pytorch_network():
    torch = pytest.importorskip("torch")
    from polywhiten.torch import GroupWhitening, IterNorm

    block = torch.nn.Sequential(IterNorm(64), torch.nn.ReLU(), IterNorm(64))
    return torch.nn.Sequential(IterNorm(64, group_size=8), block, GroupWhitening(32, 64), IterNorm(64))


def test_a_pytorch_network_says_once_how_many_layers_are_infeasible_and_which_is_the_first(caught):
    torch = pytest.importorskip("torch")
    for number in (1, 2):  # one warning for each network
        network = pytorch_network()
        for _ in range(3):
            network(torch.randn(20, 64))
        assert len(caught) == number
        text = str(caught[-1].message)
        assert text.startswith(
            "1.0 (IterNorm), the first of 4 infeasible layers of Sequential: group_size=64 is infeas"
        )
        names = ["1.0 (IterNorm)", "1.2 (IterNorm)", "2 (GroupWhitening)", "3 (IterNorm)"]
        assert list(caught[-1].message.layers) == names
        assert caught[-1].message.layers[names[2]].startswith("num_groups=32 is infeasible")
        assert caught[-1].filename == __file__, "where the network was called"


def test_a_warning_keeps_no_network_alive(caught):
    torch = pytest.importorskip("torch")
    network = pytorch_network()
    network(torch.randn(20, 64))
    alive = weakref.ref(network)
    del network
    gc.collect()
    assert alive() is None
    assert len(caught) == 1


def test_a_network_of_one_infeasible_layer_names_it(caught):
    torch = pytest.importorskip("torch")
    from polywhiten.torch import IterNorm

    network = torch.nn.Sequential(IterNorm(64, group_size=8), IterNorm(64))
    network(torch.randn(20, 64))
    assert str(caught[0].message).startswith("1 (IterNorm) of Sequential: group_size=64 is infeasible")


def test_layers_that_a_pass_leaves_out_are_waited_for_until_the_next_one(caught):
    torch = pytest.importorskip("torch")
    from polywhiten.torch import IterNorm

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Sequential(IterNorm(64), IterNorm(64)), IterNorm(64)

        def forward(self, x):
            return self.used(x)

    network = Network()
    network(torch.randn(20, 64))
    assert not caught
    for _ in range(2):
        network(torch.randn(20, 64))
    (text,) = messages(caught)
    assert text.startswith("used.0 (IterNorm), the first of 2 infeasible layers of Network: group_size=64")


def test_layers_in_evaluation_are_not_waited_for(caught):
    torch = pytest.importorskip("torch")
    network = pytorch_network()
    network[1][2].eval()
    network(torch.randn(20, 64))
    (text,) = messages(caught)
    assert "the first of 3 infeasible layers" in text


def test_pythons_filters_turn_the_warning_off_or_into_an_error():
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=analysis.InfeasibleWarning)
        pytorch_network()(torch.randn(20, 64))
        warnings.filterwarnings("error", category=analysis.InfeasibleWarning)
        with pytest.raises(analysis.InfeasibleWarning, match="the first of 4 infeasible layers"):
            pytorch_network()(torch.randn(20, 64))


@pytest.mark.parametrize("by", ["call", "fit"])
def test_a_keras_model_says_once_how_many_layers_are_infeasible_and_which_is_the_first(caught, by):
    """This also holds on backends whose `fit` begins with inference, in which only one layer is infeasible."""
    keras = pytest.importorskip("keras")
    from polywhiten.keras import GroupWhitening, IterNorm

    for number in (1, 2):
        block = keras.Sequential([IterNorm(group_size=8), IterNorm(name="first"), IterNorm()], name="block")
        layers = [keras.Input((64,), batch_size=20), block, GroupWhitening(32, name="groups"), IterNorm(group_size=8)]
        model = keras.Sequential(layers, name=f"network_{number}")
        x = np.random.default_rng(0).normal(size=(20, 64)).astype("float32")
        if by == "call":
            for _ in range(2):
                model(x, training=True)
        else:
            model.compile("sgd", "mse")
            model.fit(x, x, batch_size=20, epochs=2, verbose=0)
        (text,) = messages(caught)[number - 1 :]
        assert re.match(rf"\S*(first|groups), the first of 3 infeasible layers of network_{number}: group", text)
        assert len(caught[-1].message.layers) == 3
        assert caught[-1].filename == __file__
