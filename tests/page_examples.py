"""The examples of a page of documentation, which tests run as they stand there."""

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def run_example(page, title):
    """Run the first Python code below a heading of a page in docs/, in the current folder; return what it defines."""
    text = (DOCS / page).read_text(encoding="utf-8")
    section = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##+ |\Z)", text, re.M | re.S)
    assert section, f"{page} has no heading {title!r}"
    code = re.search(r"^```python\n(.*?)^```", section[1], re.M | re.S)[1]
    names = {}
    exec(compile(code, f"{page}, {title}", "exec"), names)
    return names
