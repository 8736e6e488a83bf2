"""Draws what each transform gains, and how the gain depends on the number of rows that it is fitted on."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from embeddings.measuring import Row

# Okabe and Ito's colours
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
PANELS = (  # task, score, what the transform is fitted on
    ("first sentence finds docstring", "MRR", "docstrings"),
    ("verse finds old translation", "MRR", "old verses"),
    ("similarity of news", "Spearman", "background news"),
)
SHOWN = (
    "centred",
    "standardized",
    "all but the top",
    "pca without whitening, d/4",
    "zca",
    "zca, ledoit_wolf",
    "zca, eps=0.1",
    "zca, eps=1",
    "pca d/2",
    "pca d/4",
    "pca d/8",
    "newton, T=3",
    "newton, T=5",
    "zca, groups of d/16",
)
OF_FEW = ("centred", "zca", "zca, ledoit_wolf", "zca, eps=0.1", "zca, eps=1", "pca d/8")


def drawn(rows: Sequence[Row]) -> dict[str, Figure]:
    return {"gains": gains(rows), "rows": few_rows(rows)}


def gains(rows: Sequence[Row]) -> Figure:
    """Draw the gains with their ranges, a panel for each task and a colour for each kind of vectors."""
    figure = Figure(figsize=(12, 5.8), layout="constrained")
    figure.suptitle("What a transform gains over the vectors as they are")
    views = ("sentence", "layer 3", "words")
    for axes, (task, metric, fitted_on) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS, strict=True):
        mine = [row for row in rows if (row.task, row.metric, row.fitted_on) == (task, metric, fitted_on)]
        for number, view in enumerate(views):
            of_view = [row for row in mine if row.vectors == view]
            most = max((row.rows for row in of_view), default=0)
            found = {row.setting: row for row in of_view if row.rows == most}
            places = [SHOWN.index(name) + 0.22 * (number - 1) for name in SHOWN if name in found]
            kept = [found[name] for name in SHOWN if name in found]
            values = [row.gain for row in kept]
            ranges = [[r.gain - r.gain_low for r in kept], [r.gain_high - r.gain for r in kept]]
            axes.errorbar(values, places, xerr=ranges, fmt="o", markersize=4, color=COLOURS[number], label=view)
        axes.axvline(0, color="0.4", linewidth=1)
        axes.set(title=task, xlabel=f"gain in {metric}", yticks=range(len(SHOWN)), yticklabels=SHOWN)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), title="vectors", loc="outside lower center", ncols=3)
    return figure


def few_rows(rows: Sequence[Row]) -> Figure:
    """Draw the gain against the number of documents that the transform is fitted on."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    task, metric, fitted_on = PANELS[0]
    figure.suptitle("A first sentence finds its docstring: gain by the number of documents fitted on")
    for axes, view in zip(figure.subplots(1, 2), ("sentence", "words"), strict=True):
        mine = [r for r in rows if (r.task, r.metric, r.fitted_on, r.vectors) == (task, metric, fitted_on, view)]
        for colour, setting in zip(COLOURS, OF_FEW, strict=False):
            line = sorted((row for row in mine if row.setting == setting), key=lambda row: row.rows)
            x = [row.rows for row in line]
            axes.plot(x, [row.gain for row in line], "o-", markersize=4, color=colour, label=setting)
            axes.fill_between(
                x, [r.gain_low for r in line], [r.gain_high for r in line], color=colour, alpha=0.15, linewidth=0
            )
        axes.axhline(0, color="0.4", linewidth=1)
        for d in {row.dimensions for row in mine}:
            axes.axvline(d, color="0.6", linestyle=":", label=f"as many as dimensions ({d})")
        axes.set(title=f"vectors: {view}", xlabel="documents", ylabel=f"gain in {metric}", xscale="log")
        axes.grid(color="0.9")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure
