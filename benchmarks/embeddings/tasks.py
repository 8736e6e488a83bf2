"""The tasks: which vectors a transform is fitted on, and what is scored with it."""

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from embeddings import texts
from embeddings.classification import classification
from embeddings.pictures import Split, cifar, digits, splits_of
from embeddings.scores import Score, cosines, document_similarity, retrieval, similarity
from embeddings.settings import BASELINES, COMPARED, FULL, LEDOIT_WOLF, REDUCED, SOFT, ZCA, Setting
from embeddings.task import Task
from embeddings.vectors import SENTENCE, VIEWS, WORDS, Cache

SUMMARIES, NAMES, VERSES = "first sentence finds docstring", "name finds docstring", "verse finds old translation"
PACKAGES, NEWS, DIGITS, CIFAR = "package of a docstring", "similarity of news", "digits", "CIFAR-10"
RANDOM_PAIRS = "random pairs"
RATED_WORDS = {"WordSim-353": "wordsim353.tsv", "SimLex-999": "simlex999.txt"}
PIXELS = "pixels"

FEW = (50, 200, 400, 800, 3200)  # documents that a transform is fitted on
OF_FEW = [*BASELINES[:2], ZCA, LEDOIT_WOLF, SOFT[0.1], SOFT[1.0], *REDUCED[1:]]


class Texts:
    """The collections, and their vectors by name and view."""

    def __init__(self, folder: Path) -> None:
        self.cache = Cache(folder)

    @cached_property
    def docstrings(self) -> texts.Docstrings:
        return texts.docstrings()

    @cached_property
    def verses(self) -> texts.Verses:
        return texts.verses()

    @cached_property
    def news(self) -> texts.News:
        return texts.news()

    @cached_property
    def vectors(self) -> dict[str, dict[str, np.ndarray]]:
        """Arrays by the name of the list of texts, and by view."""
        lists = {
            "docstrings": self.docstrings.bodies,
            "first sentences": self.docstrings.summaries,
            "names": [name.replace(".", " ").replace("_", " ") for name in self.docstrings.names],
            "old verses": self.verses.king_james,
            "new verses": self.verses.worldwide,
            "background news": self.news.background,
            "rated news": self.news.rated,
        }
        return {name: self.cache.embed(name.replace(" ", "-"), found) for name, found in lists.items()}


def tasks(found: Texts, pictures: Path | None) -> Iterator[Task]:
    """Yield all tasks; those on CIFAR-10 only if its file is given."""
    yield of_pictures(DIGITS, [*digits()])
    if pictures is not None:
        yield of_pictures(CIFAR, [*cifar(pictures)])
    for view in VIEWS:
        yield of_random_pairs(found, view, "docstrings")
        yield of_random_pairs(found, view, "old verses")
        # The methods in FULL differ from ZCA by a rotation: one view shows that they find the same.
        settings = [setting for setting in COMPARED if view == SENTENCE or setting not in FULL]
        yield search(found, SUMMARIES, view, "first sentences", "docstrings", settings=settings)
        yield search(found, NAMES, view, "names", "docstrings", settings=settings)
        yield search(found, VERSES, view, "new verses", "old verses", settings=settings)
        yield of_news(found, view)
    yield from of_words(found)
    for view in (SENTENCE, WORDS):
        for count in FEW:
            yield search(found, SUMMARIES, view, "first sentences", "docstrings", count=count, settings=OF_FEW)
        yield search(found, SUMMARIES, view, "first sentences", "docstrings", fitted_on="old verses", settings=OF_FEW)
        yield search(found, VERSES, view, "new verses", "old verses", fitted_on="docstrings", settings=OF_FEW)
    yield search_with_log(found, SUMMARIES, "first sentences", "docstrings")
    yield search_with_log(found, NAMES, "names", "docstrings")
    yield search_with_log(found, VERSES, "new verses", "old verses")
    yield of_packages(found)


def search(
    found: Texts,
    name: str,
    view: str,
    queries: str,
    documents: str,
    *,
    fitted_on: str | None = None,
    count: int | None = None,
    settings: list[Setting] = COMPARED,
) -> Task:
    """Return a task of retrieval, fitted on the documents, on a random part of them, or on other documents."""
    fitted_on = fitted_on or documents
    x = found.vectors[fitted_on][view]
    if count is not None:
        x = x[np.random.default_rng(0).permutation(len(x))[:count]]
    given = {"queries": found.vectors[queries][view], "documents": found.vectors[documents][view]}

    def score(setting: Setting) -> dict[str, Score]:
        return retrieval(**setting.fit_transform(x, given))

    return Task(name, view, fitted_on, *x.shape, settings, score)


def search_with_log(found: Texts, name: str, queries: str, documents: str) -> Task:
    """Return a task of retrieval with every second query, fitted on the documents and on the other queries."""
    asked, x = found.vectors[queries][SENTENCE], found.vectors[documents][SENTENCE]
    fitted_on = np.concatenate([x, asked[1::2]])
    given = {"queries": asked[::2], "documents": np.concatenate([x[::2], x[1::2]])}  # the answers come first

    def score(setting: Setting) -> dict[str, Score]:
        return retrieval(**setting.fit_transform(fitted_on, given))

    return Task(name, SENTENCE, f"{documents} and other {queries}", *fitted_on.shape, OF_FEW, score)


def of_random_pairs(found: Texts, view: str, documents: str) -> Task:
    """Return the task that shows how much all vectors point the same way."""
    x = found.vectors[documents][view]

    def score(setting: Setting) -> dict[str, Score]:
        return cosines(setting.fit_transform(x, {"documents": x})["documents"])

    return Task(RANDOM_PAIRS, view, documents, *x.shape, [*BASELINES[:4], ZCA, SOFT[0.1], SOFT[1.0]], score)


def of_news(found: Texts, view: str) -> Task:
    """Return the task of the pairs of news that people rated, fitted on other news."""
    x, given = found.vectors["background news"][view], {"rated": found.vectors["rated news"][view]}

    def score(setting: Setting) -> dict[str, Score]:
        return document_similarity(setting.fit_transform(x, given)["rated"], found.news.pairs, found.news.ratings)

    return Task(NEWS, view, "background news", *x.shape, COMPARED, score)


def of_words(found: Texts) -> Iterator[Task]:
    """Yield the tasks of rated pairs of words, fitted on the embeddings of all words that are one token."""
    words, x = found.cache.model.vocabulary()
    places = {word: place for place, word in enumerate(words)}
    for name, file in RATED_WORDS.items():
        rated = texts.rated_words(file)
        known = [first in places and second in places for first, second in rated.pairs]
        pairs = np.array(
            [[places[word] for word in pair] for pair, is_known in zip(rated.pairs, known, strict=True) if is_known]
        )
        given = {"first": x[pairs[:, 0]], "second": x[pairs[:, 1]]}
        score = partial(_word_scores, x, given, rated.ratings[known])
        yield Task(name, WORDS, "vocabulary", *x.shape, COMPARED, score)


def _word_scores(
    x: np.ndarray, given: Mapping[str, np.ndarray], ratings: np.ndarray, setting: Setting
) -> dict[str, Score]:
    return similarity(**setting.fit_transform(x, given), ratings=ratings)


def of_packages(found: Texts) -> Task:
    """Return the task to tell from a docstring's vector whether its package is NumPy, SciPy, another, or Python."""
    packages = [name.split(".")[0] for name in found.docstrings.names]
    labels = np.array([texts.PACKAGES.index(name) if name in texts.PACKAGES else -1 for name in packages])
    x = found.vectors["docstrings"][SENTENCE]
    return of_pictures(PACKAGES, [*splits_of(x, labels)], SENTENCE)


def of_pictures(name: str, splits: list[Split], vectors: str = PIXELS) -> Task:
    """Return a task of classification, fitted on the training vectors of each split."""
    score = partial(classification, splits=splits)
    return Task(name, vectors, "training vectors", *splits[0].x_train.shape, COMPARED, score)
