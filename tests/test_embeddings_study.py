"""Tests of the measurements on embeddings: scores, transforms, resumed runs, and the page's tables."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

for _module in ("click", "rich", "scipy", "sklearn", "matplotlib"):
    pytest.importorskip(_module)

from rich.console import Console  # noqa: E402

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"  # a folder of scripts that isn't installed


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return lambda name: import_module(f"embeddings.{name}")


@pytest.fixture
def vectors():
    """Return queries and documents of 6 dimensions, of which one is large in all, and says nothing."""
    rng = np.random.default_rng(0)
    documents = rng.normal(size=(200, 6)) * [1, 1, 1, 1, 1, 20]
    noise = rng.normal(size=(200, 6)) * [0.5, 0.5, 0.5, 0.5, 0.5, 20]
    return {"queries": documents + noise, "documents": documents}


def test_the_rank_of_an_answer_counts_all_that_are_as_close(study):
    retrieval = study("scores").retrieval
    queries = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    documents = np.array([[1.0, 0.0], [0.5, 0.0], [0.0, 1.0]])
    found = retrieval(queries, documents)
    assert found["MRR"].value == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert found["recall@1"].value == pytest.approx(2 / 3)
    assert retrieval(np.ones((20, 2)), np.ones((20, 2)))["recall@10"].value == 0


def test_similarity_is_a_correlation(study):
    scores = study("scores")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 3))
    first, second = np.triu_indices(30, 1)
    pairs, products = np.stack([first, second], 1), (x[first] * x[second]).sum(1)
    found = [
        scores.similarity(x[first], x[second], products**3)["Spearman"],  # a monotonic function of the products
        scores.document_similarity(x, pairs, products**3)["Spearman"],
    ]
    for score in found:
        assert score.value == pytest.approx(1)
        np.testing.assert_allclose(score.replicates, 1)
    reversed_ratings = scores.similarity(x[first], x[second], -products)["Spearman"]
    assert reversed_ratings.value == pytest.approx(-1)


def test_gains_are_paired(study, vectors):
    settings, scores, measuring = (study(name) for name in ("settings", "scores", "measuring"))
    raw, zca, _, again = (
        scores.retrieval(**setting.fit_transform(vectors["documents"], given))["MRR"]
        for setting, given in (
            (settings.BASELINES[0], vectors),
            (settings.ZCA, vectors),
            (settings.ZCA, {name: x[:100] for name, x in vectors.items()}),  # resamples of another size in between
            (settings.BASELINES[0], vectors),
        )
    )
    task = _task(study, [settings.ZCA], [])
    same, gained = (measuring.row(task, "zca", "MRR", score, raw, 0.0) for score in (again, zca))
    assert (same.gain, same.gain_low, same.gain_high) == (0, 0, 0)
    assert 0 < gained.gain_low < gained.gain < gained.gain_high
    assert 0 < gained.low < gained.value < gained.high


def test_matrices_that_differ_by_a_rotation_find_the_same(study, vectors):
    settings, retrieval = study("settings"), study("scores").retrieval
    ranks = [
        retrieval(**setting.fit_transform(vectors["documents"], vectors))["MRR"].value
        for setting in (settings.ZCA, *settings.FULL)
    ]
    assert ranks == pytest.approx([ranks[0]] * 4, abs=1e-3)


def test_simple_transforms(study):
    settings = study("settings")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 4)) @ np.triu(np.ones((4, 4))) + 5
    x[:, 0] = 3
    standardized = settings.Standardized().fit(x).transform(x)
    np.testing.assert_array_equal(standardized[:, 0], 0)
    np.testing.assert_allclose(standardized[:, 1:].std(0), 1)
    variances = [settings.Projected(*kept).fit(x).transform(x).var(0) for kept in ((0, 2), (1, None))]
    largest = np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1]
    np.testing.assert_allclose(variances[0], largest[:2])
    np.testing.assert_allclose(variances[1], largest[1:], atol=1e-12)
    np.testing.assert_array_equal(study("scores").unit(np.zeros((1, 2))), 0)


def test_a_score_is_measured_once(study, tmp_path):
    settings, measuring = study("settings"), study("measuring")
    path, calls = tmp_path / "scores.csv", []
    task = _task(study, settings.BASELINES[:3], calls)
    measuring.measure([task], path, Console(quiet=True))
    assert calls == ["raw", "centred", "standardized"]
    with path.open("a") as file:
        file.write("task,vec")  # the row that was being written when a run was killed
    calls.clear()
    measuring.measure([_task(study, settings.BASELINES[:4], calls)], path, Console(quiet=True))
    assert calls == ["raw", "all but the top"]
    assert [row.setting for row in measuring.read_rows(path)] == [s.name for s in settings.BASELINES[:4]]


def test_a_docstring_is_split_after_its_first_sentence(study):
    split = study("texts").split
    assert split("Return a\n    value. It is new.\n\n    Notes\n    -----") == (
        "Return a value.",
        "It is new. Notes -----",
    )
    assert split("One line") == ("One line", "")


def test_a_nearest_neighbour_and_a_probe_find_separate_classes(study):
    classification, pictures = study("classification"), study("pictures")
    rng = np.random.default_rng(0)
    y = np.arange(100) % 2
    x = rng.normal(size=(100, 3)) + 20 * y[:, None]
    found = classification.classification(study("settings").BASELINES[1], [*pictures.splits_of(x, y)])
    assert found["1-NN accuracy"].value == found["probe accuracy"].value == 1
    assert found["probe steps"].samples == pictures.SPLITS


def test_the_page_has_the_kept_scores(study):
    report, rows = study("report"), study("measuring").read_rows(FOLDER / "results" / "embeddings.csv")
    page = (ROOT / "docs" / "embeddings-results.md").read_text(encoding="utf-8")
    for name, columns in report.TABLES.items():
        assert "\n".join(report.table(rows, columns)) in page, f"{name}: run `benchmarks/embeddings/run.py report`"


def _task(study, settings, calls):
    scores = study("scores")

    def score(setting):
        calls.append(setting.name)
        return {"MRR": scores.of_queries(np.linspace(0, 1, 10))}

    return study("task").Task("a task", "vectors", "documents", 10, 4, settings, score)
