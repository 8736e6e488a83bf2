"""The picture of `polywhiten inspect`: the spectrum, and cosines before and after whitening."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from polywhiten.embeddings.files.errors import named
from polywhiten.embeddings.inspection import Inspection
from polywhiten.embeddings.replacement import replacing

SUFFIXES = ".png", ".svg", ".pdf"
BEFORE, AFTER = "#0072B2", "#D55E00"  # of Okabe and Ito's colours, which colour-blind readers can tell apart


def picture(found: Inspection, title: str) -> Figure:
    """Plot the eigenvalues of the covariance, and histograms of the cosine similarities of random pairs."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    spectrum, cosines = figure.subplots(1, 2)
    for values, colour in ((found.eigenvalues[: found.rank], BEFORE), (found.white_eigenvalues, AFTER)):
        positive = values[values > 0]
        spectrum.plot(np.arange(1, len(positive) + 1), positive, color=colour)
    spectrum.set(title="Variance of the principal components", yscale="log")
    spectrum.xaxis.set_major_locator(MaxNLocator(integer=True))
    spectrum.set_xlabel("component (dotted: how many have a share of the variance)")
    bottom = spectrum.get_ylim()[0]
    for share, k in found.components.items():
        spectrum.vlines(k, bottom, found.eigenvalues[k - 1], color="0.6", linewidth=1, linestyle="dotted")
        spectrum.annotate(
            f"{share:.0%}", (k, found.eigenvalues[k - 1]), (3, 5), textcoords="offset points", color="0.3", fontsize=9
        )
    spectrum.set_ylim(bottom=bottom)
    bins = np.linspace(-1, 1, 101)
    for values, mean, name, colour in (
        (found.cosines, found.mean_cosine, "embeddings", BEFORE),
        (found.white_cosines, found.white_mean_cosine, "white", AFTER),
    ):
        cosines.hist(values, bins, density=True, color=colour, alpha=0.6, label=f"{name}, mean {mean:z.2f}")
    cosines.set(title="Cosine similarity of random pairs", xlabel="cosine", yticks=[], xlim=(-1, 1))
    cosines.legend(frameon=False)
    for panel in (spectrum, cosines):
        panel.grid(color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, parse_math=False)  # a file's name may have dollars in it
    return figure


def save_picture(found: Inspection, title: str, path: Path) -> None:
    """Write the picture to a file; raise FileError if that is not possible."""
    with named(path, "written"), warnings.catch_warnings(), replacing(path) as part:
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the title may hold a file's name in any script
        picture(found, title).savefig(part, dpi=150)
