"""The Python code of the README and of the pages in docs/, which tests run as it stands there."""

import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from polywhiten.cli.about import FOLDERS, about

ROOT = Path(__file__).parent.parent
# test_add_a_backend.py follows this page: its code goes into files
ELSEWHERE = {ROOT / "docs" / "add-a-backend.md"}
PAGES = [
    ROOT / "README.md",
    *sorted({*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "notebooks").glob("*.md")} - ELSEWHERE),
]
# In whose tests an example is run: the first of these that it imports, and else NumPy's.
OWNERS = ("keras", "cupy", "tensorflow", "torch", "flax", "jax", "dask")


@dataclass(frozen=True)
class Example:
    """A block of Python code below a heading of a page, or all cells of a notebook."""

    page: Path
    heading: str
    number: int  # among the blocks below this heading
    code: str

    def __str__(self) -> str:
        """Return the name of the example in reports of tests."""
        number = f", {self.number}" if self.number else ""
        return f"{self.page.name}: {self.heading}{number}"

    @cached_property
    def modules(self) -> set[str]:
        """The modules that the example needs beside polywhiten."""
        found = set(re.findall(r"^(?:import|from) (\w+)", self.code, re.M)) - {"polywhiten"}
        folders = set(re.findall(r"\bpolywhiten\.(\w+)", self.code)) & set(FOLDERS)
        plots = {"matplotlib"} if ".plot(" in self.code else set()
        return found | {about(folder).MODULE for folder in folders} | plots

    @property
    def library(self) -> str:
        """The library whose tests run the example."""
        return next((name for name in OWNERS if name in self.modules), "numpy")

    def run(self) -> dict[str, object]:
        """Run the example in the current folder, and return what it defines, or nothing if it has to be a program."""
        names: dict[str, object] = {}
        if "__main__" in self.code:
            Path("example.py").write_text(self.code, encoding="utf-8")
            subprocess.run([sys.executable, "example.py"], check=True)
            return names
        exec(compile(self.code, str(self), "exec"), names)
        return names


def examples_of(page: Path) -> list[Example]:
    """Return the examples of a page in their order."""
    text = page.read_text(encoding="utf-8")
    title = re.search(r"^# (.+)$", text, re.M)[1]
    cells = re.findall(r"^```\{code-cell\}\n(.*?)^```", text, re.M | re.S)
    if cells:
        return [Example(page, title, 0, "\n".join(cells))]
    found, heading, number = [], title, 0
    for part in re.finditer(r"^#+ ([^\n]+)$|^```(\w*)\n(.*?)^```", text, re.M | re.S):
        if part[1]:
            heading, number = part[1], 0
        elif part[2] == "python":
            found.append(Example(page, heading, number, part[3]))
            number += 1
    return found


def example(page: str, heading: str) -> Example:
    """Return the first example below a heading of a page in docs/."""
    return next(e for e in examples_of(ROOT / "docs" / page) if e.heading == heading)
