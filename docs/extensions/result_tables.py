"""Writes the tables of speed from the kept measurements, by the functions that benchmarks/ has for this."""

from pathlib import Path

import gpu_report
import report
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

HERE = Path(__file__).parent
RESULTS = HERE.parent.parent / "benchmarks" / "results"
TABLES = HERE.parent / "generated" / "tables"


def write_tables(app: Sphinx) -> None:
    TABLES.mkdir(parents=True, exist_ok=True)
    records = [record for path in sorted(RESULTS.glob("speed-*.csv")) for record in report.read(path)]
    (TABLES / "speed.md").write_text(report.table(records) + "\n", encoding="utf-8")
    gpu = [gpu_report.table(gpu_report.read(path)) for path in sorted(RESULTS.glob("gpu-*.csv"))]
    (TABLES / "gpu.md").write_text("\n\n".join(gpu) + "\n", encoding="utf-8")


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("builder-inited", write_tables)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
