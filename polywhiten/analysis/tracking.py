"""Measures of what normalization layers do to their inputs while a network is trained, and their plot.

The backends find the layers and their inputs, each in its framework's way.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from polywhiten.analysis.conditioning import condition_number, mean_correlation, whitening_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Batch normalization has blocks of one channel, which leave nothing to measure: IterNorm's default is used instead.
BATCH_NORM_BLOCK = 64

_SIDES = "input", "output"
_MEASURES = {
    "condition_number": "condition number",
    "whitening_error": "whitening error",
    "correlation": "mean absolute correlation",
}
_LEGEND_SIZE = 12  # layers that a legend can tell apart


@dataclass(frozen=True)
class Row:
    """Measures of one layer's input and output in one step: medians over the covariances of its blocks.

    Attributes
    ----------
    step : int
        Number of training steps before this one.
    layer : str
        The layer's name in the model, with the number of the call if it is called more than once in a step.
    kind : str
        Name of the layer's class.
    input_condition_number, output_condition_number : float
        Largest eigenvalue of the covariance divided by the smallest; infinite if that is 0.
    input_whitening_error, output_whitening_error : float
        Relative distance of the covariance from the identity, in the Frobenius norm.
    input_correlation, output_correlation : float
        Mean absolute correlation of a block's variables with each other; 0 if a block has only one.

    Notes
    -----
    Blocks are what the layer normalizes together: groups of channels over the batch for `IterNorm`, with 64 channels
    for batch normalization; a sample's groups of channels for group whitening and group normalization. The output is
    what the next layer receives, after scale and shift. Values that aren't finite make all measures NaN.
    """

    step: int
    layer: str
    kind: str
    input_condition_number: float
    input_whitening_error: float
    input_correlation: float
    output_condition_number: float
    output_whitening_error: float
    output_correlation: float


class Record:
    """Rows of measures, in the order in which they were taken.

    Attributes
    ----------
    rows : list of Row
        `pandas.DataFrame(record.rows)` turns them into a table.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self._calls: Counter[tuple[int, str]] = Counter()

    def plot(self, path: str | os.PathLike[str] | None = None, title: str = "") -> Figure:
        """Draw every measure over the steps, with a line for each layer and triangles for infinite values.

        Parameters
        ----------
        path : path, optional
            A file to write the picture to.
        title : str
            The picture's title.

        Raises
        ------
        ImportError
            matplotlib isn't installed.
        ValueError
            Nothing was measured yet.
        """
        figure = _draw(self.rows, title)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows to a CSV file, after a line with their names.

        Parameters
        ----------
        path : path
            An existing file is overwritten.
        """
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow([field.name for field in fields(Row)])
            table.writerows(astuple(row) for row in self.rows)

    def _add(
        self,
        step: int,
        layer: str,
        kind: str,
        inputs: Sequence[NDArray[np.floating]],
        outputs: Sequence[NDArray[np.floating]],
    ) -> None:
        """Append a row for the covariances of a layer's input and output."""
        self._calls[step, layer] += 1
        call = self._calls[step, layer]
        name = layer if call == 1 else f"{layer} ({call})"
        self.rows.append(Row(step, name, kind, *_measures(inputs), *_measures(outputs)))


def _measures(covariances: Sequence[NDArray[np.floating]]) -> tuple[float, float, float]:
    """Return the condition number, the whitening error and the correlation, each the median over all blocks."""
    if not all(np.all(np.isfinite(cov)) for cov in covariances):
        return np.nan, np.nan, np.nan
    double = [np.asarray(cov, np.float64) for cov in covariances]
    values = [[measure(cov) for cov in double] for measure in (condition_number, whitening_error, mean_correlation)]
    condition, error, correlation = (float(np.median(np.concatenate(parts))) for parts in values)
    return condition, error, correlation


def _draw(rows: Sequence[Row], title: str) -> Figure:
    if not rows:
        raise ValueError("rows is empty: nothing was measured yet, run the model for a step first")
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'a plot needs matplotlib ({error}): pip install "polywhiten[plot]"') from error
    layers = {name: [row for row in rows if row.layer == name] for name in dict.fromkeys(row.layer for row in rows)}
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))  # from the first layer to the last
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(len(_SIDES), len(_MEASURES), sharex=True, sharey="col")
    for (side, (measure, words)), panel in zip(product(_SIDES, _MEASURES.items()), panels.flat, strict=True):
        for colour, (layer, layer_rows) in zip(colours, layers.items(), strict=True):
            steps = np.array([row.step for row in layer_rows])
            values = np.array([getattr(row, f"{side}_{measure}") for row in layer_rows])
            finite = np.where(np.isfinite(values), values, np.nan)
            panel.plot(steps, finite, color=colour, marker=".", label=f"{layer}, {layer_rows[0].kind}")
            infinite, top = steps[values == np.inf], panel.get_xaxis_transform()
            panel.plot(infinite, np.full(len(infinite), 0.98), color=colour, marker="^", linestyle="", transform=top)
        panel.set_title(f"{side}: {words}")
        panel.grid(color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    _set_scales(panels, rows)
    figure.suptitle(title, parse_math=False)  # names may contain dollars
    handles, labels = panels[0, 0].get_legend_handles_labels()
    if len(layers) > _LEGEND_SIZE:
        handles, labels = [handles[0], handles[-1]], [f"first: {labels[0]}", f"last: {labels[-1]}"]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _set_scales(panels: Any, rows: Sequence[Row]) -> None:
    """Set the scales of all axes. The panels of a measure share one, which is logarithmic if it has values to show."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    for panel, measure in zip(panels[0], _MEASURES, strict=True):
        if measure == "correlation":
            panel.set_ylim(0, 1)
        elif any(0 < getattr(row, f"{side}_{measure}") < np.inf for row in rows for side in _SIDES):
            panel.set_yscale("log")
            bottom, top = panel.get_ylim()
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top < 1000 * bottom else (1,)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
    for panel in panels[-1]:
        panel.set(xlabel="step")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
