"""Writes the tables of docs/embeddings-results.md and draws its figures from the CSV file of the scores."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from marked import inserted

from embeddings import figures
from embeddings.measuring import Row
from embeddings.settings import RAW


@dataclass(frozen=True)
class Column:
    """A column of a table: one score on one task."""

    title: str
    task: str
    vectors: str
    metric: str
    fitted_on: str | None = None

    def cell(self, rows: Sequence[Row], setting: str) -> Row | None:
        return next((row for row in self.rows(rows) if row.setting == setting), None)

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        mine = [r for r in rows if (r.task, r.vectors, r.metric) == (self.task, self.vectors, self.metric)]
        mine = [row for row in mine if self.fitted_on in (None, row.fitted_on)]
        return [row for row in mine if row.rows == max(r.rows for r in mine)]  # not those of fits on a few rows


def searches(vectors: str) -> list[Column]:
    return [
        Column("first sentence", "first sentence finds docstring", vectors, "MRR", "docstrings"),
        Column("name", "name finds docstring", vectors, "MRR", "docstrings"),
        Column("verse", "verse finds old translation", vectors, "MRR", "old verses"),
        *(Column(f"news, {metric}", "similarity of news", vectors, metric) for metric in ("Spearman", "Pearson")),
    ]


def classified(task: str, vectors: str) -> list[Column]:
    return [
        Column(f"{task}: 1-NN", task, vectors, "1-NN accuracy"),
        Column(f"{task}: probe", task, vectors, "probe accuracy"),
        Column(f"{task}: steps", task, vectors, "probe steps"),
    ]


TABLES = {
    "random-pairs": [
        Column(f"{documents}, {vectors}", "random pairs", vectors, "mean cosine", documents)
        for documents in ("docstrings", "old verses")
        for vectors in ("sentence", "layer 3", "words")
    ],
    "sentence": [*searches("sentence"), *classified("package of a docstring", "sentence")[:2]],
    "layer-3": searches("layer 3"),
    "words": [
        *searches("words"),
        *(Column(name, name, "words", "Spearman") for name in ("WordSim-353", "SimLex-999")),
    ],
    "pictures": [*classified("digits", "pixels"), *classified("CIFAR-10", "pixels")],
    "other-texts": [
        Column(f"{title}, {vectors}", task, vectors, "MRR", fitted_on)
        for vectors in ("sentence", "words")
        for title, task, fitted_on in (
            ("first sentence", "first sentence finds docstring", "old verses"),
            ("verse", "verse finds old translation", "docstrings"),
        )
    ],
    "queries-known": [
        Column(title, task, "sentence", "MRR", fitted_on)
        for title, task, fitted_on in (
            ("first sentence", "first sentence finds docstring", "docstrings and other first sentences"),
            ("name", "name finds docstring", "docstrings and other names"),
            ("verse", "verse finds old translation", "old verses and other new verses"),
        )
    ],
    "recall": [
        Column(f"{title}: {metric}", task, "sentence", metric, fitted_on)
        for title, task, fitted_on in (
            ("first sentence", "first sentence finds docstring", "docstrings"),
            ("name", "name finds docstring", "docstrings"),
            ("verse", "verse finds old translation", "old verses"),
        )
        for metric in ("recall@1", "recall@10")
    ],
}


def write(rows: Sequence[Row], folder: Path, page: Path) -> Iterator[Path]:
    """Draw the figures into a folder, write the page's tables, and yield each path written."""
    if not rows:
        raise ValueError("there are no scores yet: run the command `measure` before")
    for name, figure in figures.drawn(rows).items():
        path = folder / f"embeddings-{name}.png"
        figure.savefig(path, dpi=110)
        yield path
    text = page.read_text(encoding="utf-8")
    for name, columns in TABLES.items():
        text = inserted(text, name, "\n".join(table(rows, columns)))
    page.write_text(text, encoding="utf-8")
    yield page


def table(rows: Sequence[Row], columns: Sequence[Column]) -> Iterator[str]:
    """Yield the lines of a table, with one line for each setting that the first column has."""
    measured = [column for column in columns if column.rows(rows)]
    yield f"| | {' | '.join(column.title for column in measured)} |"
    yield "| --- " * (1 + len(measured)) + "|"
    for setting in (row.setting for row in measured[0].rows(rows)):
        cells = (column.cell(rows, setting) for column in measured)
        yield f"| {setting} | {' | '.join(shown(cell) if cell else '' for cell in cells)} |"


def shown(row: Row) -> str:
    """Return a score and its gain, which is bold if its range is on one side of 0."""
    digits = 0 if row.metric == "probe steps" else 3
    if row.setting == RAW:
        return f"{row.value:.{digits}f}"
    gain = f"{row.gain:+.{digits}f}"
    certain = row.gain_low > 0 or row.gain_high < 0
    return f"{row.value:.{digits}f}, " + (f"**{gain}**" if certain else gain)
