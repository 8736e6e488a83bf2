"""What normalization layers do to their inputs while a network is trained: rows of measures, and their plot.

Each framework finds the layers and their inputs in its own way; see `polywhiten.torch.track` and
`polywhiten.keras.WhiteningTracker`.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from polywhiten._types import Array
from polywhiten.analysis.conditioning import condition_number, mean_correlation, whitening_error
from polywhiten.blocks import Blocks, ChannelGroups, channel_parts, take_channels
from polywhiten.dispatch import backend_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Batch normalization has blocks of one channel, where there is nothing to measure: those of IterNorm's default instead.
BATCH_NORM_BLOCK = 64

_PLACES = "input", "output"
_MEASURES = {
    "condition_number": "condition number",
    "whitening_error": "whitening error",
    "correlation": "mean absolute correlation",
}
_LEGEND_SIZE = 12  # layers that a legend can tell apart


@dataclass(frozen=True)
class Row:
    """What one layer did in one step: the medians, over its blocks, of measures of their covariances.

    Attributes
    ----------
    step : int
        Training steps before this one.
    layer : str
        Its name in the model; for a layer that is called more than once in a step, with the number of the call.
    kind : str
        Name of its class.
    input_condition_number, output_condition_number : float
        Largest eigenvalue of the covariance over the smallest; infinite where that is 0.
    input_whitening_error, output_whitening_error : float
        Relative distance of the covariance from the identity, in the Frobenius norm.
    input_correlation, output_correlation : float
        Mean absolute correlation of a block's variables with each other; 0 where a block has but one.

    Notes
    -----
    Blocks are the layer's own: groups of channels over the batch for `IterNorm`, and in groups of 64 for batch
    normalization; groups of channels against each other within a sample for group whitening and group normalization.
    The output is what the layer gives to the next one, after its own scale and shift. Values that aren't finite make
    all measures NaN.
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
        `pandas.DataFrame(record.rows)` makes a table of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self._calls: Counter[tuple[int, str]] = Counter()

    def plot(self, path: str | os.PathLike[str] | None = None, title: str = "") -> Figure:
        """Draw every measure of inputs and outputs over the steps, a line a layer, with triangles for what is infinite.

        Parameters
        ----------
        path : path, optional
            A file to write the picture to.
        title : str
            Stands above the picture.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        ImportError
            matplotlib isn't installed.
        ValueError
            Nothing was measured yet.
        """
        figure = _curves(self.rows, title)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows as a table with a line of names.

        Parameters
        ----------
        path : path
            A file, overwritten.
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
        """A row, of the covariances of a layer's input and output."""
        self._calls[step, layer] += 1
        call = self._calls[step, layer]
        name = layer if call == 1 else f"{layer} ({call})"
        self.rows.append(Row(step, name, kind, *_measures(inputs), *_measures(outputs)))


def block_covariances(x: Array, blocks: Blocks) -> list[Array]:
    """Covariances of x's blocks, arrays (blocks, d, d): two where the last group of channels is smaller.

    The group size of `ChannelGroups` need not divide the number of channels.
    """
    backend = backend_of(x)
    kernels = backend.kernels_for(x)
    x, axis, _ = backend.in_memory_order(x, blocks.axis)
    parts: list[tuple[Array, Blocks]] = [(x, replace(blocks, axis=axis))]
    if isinstance(blocks, ChannelGroups):
        sizes = channel_parts(x.shape[axis], blocks.group_size)
        parts = [(take_channels(x, part, axis), ChannelGroups(axis, size)) for part, size in sizes]
    return [kernels.moments(kernels.split(own, part), own.block_axis)[1] for part, own in parts]


def _measures(covariances: Sequence[NDArray[np.floating]]) -> tuple[float, float, float]:
    """Condition number, whitening error and correlation."""
    if not all(np.all(np.isfinite(cov)) for cov in covariances):
        return np.nan, np.nan, np.nan
    double = [np.asarray(cov, np.float64) for cov in covariances]
    each = [[measure(cov) for cov in double] for measure in (condition_number, whitening_error, mean_correlation)]
    condition, error, mean = (float(np.median(np.concatenate(values))) for values in each)
    return condition, error, mean


def _curves(rows: Sequence[Row], title: str) -> Figure:
    if not rows:
        raise ValueError("rows is empty: nothing was measured yet, run the model for a step first")
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
    except ImportError as error:
        raise ImportError(f'a plot needs matplotlib ({error}): pip install "polywhiten[plot]"') from error
    lines = {layer: [row for row in rows if row.layer == layer] for layer in dict.fromkeys(row.layer for row in rows)}
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(lines)))  # from the first layer to the last
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, len(_MEASURES), sharex=True, sharey="col")
    for line_of_panels, place in zip(panels, _PLACES, strict=True):
        for panel, (measure, words) in zip(line_of_panels, _MEASURES.items(), strict=True):
            for colour, (layer, own) in zip(colours, lines.items(), strict=True):
                steps, values = [row.step for row in own], [getattr(row, f"{place}_{measure}") for row in own]
                drawn = np.where(np.isfinite(values), values, np.nan)
                panel.plot(steps, drawn, color=colour, marker=".", label=f"{layer}, {own[0].kind}")
                endless = [step for step, value in zip(steps, values, strict=True) if value == np.inf]
                top = panel.get_xaxis_transform()
                panel.plot(endless, [0.98] * len(endless), color=colour, marker="^", linestyle="", transform=top)
            panel.set_title(f"{place}: {words}")
            panel.grid(color="0.9")
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
    for panel, measure in zip(panels[0], _MEASURES, strict=True):  # which share their scales with those below
        if measure == "correlation":
            panel.set_ylim(0, 1)
        elif any(0 < getattr(row, f"{place}_{measure}") < np.inf for row in rows for place in _PLACES):
            panel.set_yscale("log")
            bottom, top = panel.get_ylim()
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top < 1000 * bottom else (1,)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
    for panel in panels[-1]:
        panel.set(xlabel="step")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.suptitle(title, parse_math=False)  # names may have dollars in them
    if len(lines) <= _LEGEND_SIZE:
        handles, labels = panels[0, 0].get_legend_handles_labels()
    else:
        handles, labels = ([some[0], some[-1]] for some in panels[0, 0].get_legend_handles_labels())
        labels = [f"first: {labels[0]}", f"last: {labels[1]}"]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure
