"""Takes pages that are kept beside the code that they describe into the site, with their links."""

import os
import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

DOCS = Path(__file__).parent.parent
ROOT = DOCS.parent
GENERATED = DOCS / "generated"
PAGES = {
    ROOT / "backends" / "README.md": "backends.md",
    ROOT / "benchmarks" / "README.md": "benchmarks.md",
    ROOT / "benchmarks" / "results" / "gpu-floors-h200.md": "gpu-floors-h200.md",
    ROOT / "benchmarks" / "results" / "gpu-log.md": "gpu-log.md",
    ROOT / "benchmarks" / "study" / "README.md": "study.md",
}
TITLES = {"gpu-floors-h200.md": "# The least times on an H200\n\n"}  # of files that a command writes without a title


def write_pages(app: Sphinx) -> None:
    GENERATED.mkdir(exist_ok=True)
    for source, name in PAGES.items():
        text = TITLES.get(name, "") + moved(source.read_text(encoding="utf-8"), source.parent, GENERATED)
        target = GENERATED / name
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")


def moved(text: str, old: Path, new: Path) -> str:
    """Return Markdown from one folder with its relative links changed so that they hold in another."""

    def link(found: re.Match[str]) -> str:
        path = Path(os.path.normpath(old / found[1]))
        path = GENERATED / PAGES[path] if path in PAGES else path
        return f"]({Path(os.path.relpath(path, new)).as_posix()}"

    return re.sub(r"\]\((?!\w+:|#)([^)#\s]+)", link, text)


def link_to_generated_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turn a page's links to `PAGES`, which also work in the repository, into links within the site."""
    folder = Path(app.env.doc2path(docname)).parent
    if not folder.is_relative_to(GENERATED):
        source[0] = moved(source[0], folder, folder)


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("builder-inited", write_pages)
    app.connect("source-read", link_to_generated_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
