"""Scores of retrieval and of similarity, with bootstrap replicates that pair the transforms that are compared."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.stats import rankdata

RESAMPLES = 1000
CHUNK = 1024  # queries whose scores are in memory at a time


@dataclass(frozen=True)
class Score:
    """A score, and what it would be on other samples.

    Attributes
    ----------
    value : float
    replicates : float array
        The score on each resample of the queries or pairs, or on each split of the data. All transforms get the same
        resamples in the same order, so that differences of two scores' replicates are paired.
    interval : tuple of float
        The quantiles of the replicates that the reported range goes from and to.
    samples : int
        The queries, pairs or splits that the value is taken from.
    """

    value: float
    replicates: np.ndarray
    interval: tuple[float, float]
    samples: int


def of_queries(values: np.ndarray) -> Score:
    """Return the mean over queries, with resamples of the queries."""
    return Score(float(values.mean()), _counts(len(values)) @ values / len(values), (0.025, 0.975), len(values))


@lru_cache(maxsize=1)
def _counts(n: int) -> np.ndarray:
    """Return how often each of n queries is in each resample, as an array (RESAMPLES, n)."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float)


def of_splits(values: list[float]) -> Score:
    """Return the mean over splits of the data; the range is from the least to the largest."""
    return Score(float(np.mean(values)), np.array(values), (0, 1), len(values))


def retrieval(queries: np.ndarray, documents: np.ndarray) -> dict[str, Score]:
    """Rank all documents for each query by inner products; the answer of query i is document i, and others may follow.

    A document that is as close as the answer ranks before it, so that equal vectors for all texts score nothing.
    """
    ranks = np.concatenate(
        [
            _ranks(queries[start : start + CHUNK], documents, np.arange(start, min(start + CHUNK, len(queries))))
            for start in range(0, len(queries), CHUNK)
        ]
    )
    return {
        "recall@1": of_queries((ranks <= 1).astype(float)),
        "recall@10": of_queries((ranks <= 10).astype(float)),
        "MRR": of_queries(1 / ranks),
    }


def _ranks(queries: np.ndarray, documents: np.ndarray, answers: np.ndarray) -> np.ndarray:
    products = queries @ documents.T
    return (products >= products[np.arange(len(answers)), answers][:, None]).sum(1)


def similarity(first: np.ndarray, second: np.ndarray, ratings: np.ndarray) -> dict[str, Score]:
    """Return the correlations of inner products and ratings, with resamples of the pairs."""
    products = np.einsum("nd,nd->n", first, second)
    rng = np.random.default_rng(0)
    return _correlations(products, ratings, [rng.integers(len(ratings), size=len(ratings)) for _ in range(RESAMPLES)])


def document_similarity(vectors: np.ndarray, pairs: np.ndarray, ratings: np.ndarray) -> dict[str, Score]:
    """Return the correlations over all pairs of a few documents, with resamples of the documents.

    Pairs that share a document aren't independent, so that resamples of pairs would show too small a spread.
    """
    products = np.einsum("nd,nd->n", vectors[pairs[:, 0]], vectors[pairs[:, 1]])
    rng = np.random.default_rng(0)
    resamples = []
    for _ in range(RESAMPLES):
        counts = np.bincount(rng.integers(len(vectors), size=len(vectors)), minlength=len(vectors))
        resamples.append(np.repeat(np.arange(len(pairs)), counts[pairs[:, 0]] * counts[pairs[:, 1]]))
    return _correlations(products, ratings, resamples)


def _correlations(products: np.ndarray, ratings: np.ndarray, resamples: list[np.ndarray]) -> dict[str, Score]:
    """Return Spearman's correlation and Pearson's."""
    found = {}
    for name, prepared in (("Spearman", rankdata), ("Pearson", np.asarray)):
        replicates = [_correlation(prepared(products[kept]), prepared(ratings[kept])) for kept in resamples]
        value = _correlation(prepared(products), prepared(ratings))
        found[name] = Score(value, np.array(replicates), (0.025, 0.975), len(products))
    return found


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first, second)[0, 1])


def cosines(vectors: np.ndarray) -> dict[str, Score]:
    """Return the mean cosine of random pairs of vectors, which is near 1 if all point the same way."""
    rng = np.random.default_rng(0)
    first, second = (rng.permutation(len(vectors)) for _ in range(2))
    products = np.einsum("nd,nd->n", unit(vectors[first]), unit(vectors[second]))
    return {"mean cosine": of_queries(products[first != second])}


def unit(x: np.ndarray) -> np.ndarray:
    """Return the rows of x at unit length; rows of zeros stay."""
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(lengths > 0, lengths, 1)
