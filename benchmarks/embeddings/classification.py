"""Scores of classification: the nearest neighbour, and logistic regression (a linear probe)."""

import warnings
from collections.abc import Iterable

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from embeddings.pictures import Split
from embeddings.scores import CHUNK, Score, of_splits
from embeddings.settings import Setting

STRENGTHS = (0.01, 1.0, 100.0)  # C, the inverse of the probe's regularization
MAX_STEPS = 300
CHOSEN_ON = 0.2  # of the training vectors
PROBED = {  # others differ from these by no more than a rotation, or would take too long
    "raw",
    "centred",
    "standardized",
    "pca without whitening, d/4",
    "zca",
    "pca d/4",
    "newton, T=5",
    "zca, ledoit_wolf",
    "zca, eps=0.1",
    "zca, eps=1",
    "zca, groups of d/16",
    "raw, any length",
    "zca, any length",
    "pca d/4, any length",
}


def classification(setting: Setting, splits: Iterable[Split]) -> dict[str, Score]:
    """Return the accuracies; for the settings in PROBED also the steps of L-BFGS that the probe takes with C = 1."""
    found: dict[str, list[float]] = {}
    for split in splits:
        given = {"train": split.x_train, "test": split.x_test}
        x = setting.fit_transform(split.x_train, given)
        scores = {"1-NN accuracy": nearest_neighbour(x["train"], split.y_train, x["test"], split.y_test)}
        if setting.name in PROBED:
            scores |= probe(x["train"], split.y_train, x["test"], split.y_test)
        for name, value in scores.items():
            found.setdefault(name, []).append(value)
    return {name: of_splits(values) for name, values in found.items()}


def nearest_neighbour(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> float:
    """Return the share of test vectors whose nearest training vector, by distance, has their class."""
    lengths = np.square(x).sum(1)
    nearest = [(lengths - 2 * x_test[start : start + CHUNK] @ x.T).argmin(1) for start in range(0, len(x_test), CHUNK)]
    return float(np.mean(y[np.concatenate(nearest)] == y_test))


def probe(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> dict[str, float]:
    """Return the test accuracy with the C that is best on a part of the training vectors, and the steps with C = 1."""
    scale = np.sqrt(np.mean(np.square(x, dtype=np.float64)))  # else C would mean something else for each transform
    x, x_test = ((vectors / scale).astype(np.float64) for vectors in (x, x_test))
    places = np.random.default_rng(0).permutation(len(x))
    chosen_on, rest = np.split(places, [int(CHOSEN_ON * len(x))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # that it takes MAX_STEPS is a result too
        on_part = {c: _fitted(x[rest], y[rest], c).score(x[chosen_on], y[chosen_on]) for c in STRENGTHS}
        best = max(on_part, key=on_part.__getitem__)
        fitted = {c: _fitted(x, y, c) for c in {1.0, best}}
    return {"probe accuracy": fitted[best].score(x_test, y_test), "probe steps": float(fitted[1.0].n_iter_[0])}


def _fitted(x: np.ndarray, y: np.ndarray, c: float) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=MAX_STEPS).fit(x, y)
