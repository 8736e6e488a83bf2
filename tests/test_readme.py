"""The README's examples run as they stand there."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = {m[1]: m[2] for m in re.finditer(r"^### ([^\n]+)\n(?:(?!^#).)*?^```python\n(.*?)^```", TEXT, re.M | re.S)}


@pytest.mark.parametrize("title", EXAMPLES)
def test_example_runs(title):
    if "torch" in EXAMPLES[title]:
        pytest.importorskip("torch")
    exec(compile(EXAMPLES[title], f"README, {title}", "exec"), {})


def test_there_are_examples():
    assert set(EXAMPLES) >= {"PyTorch", "NumPy, and every other array library"}
