"""The README's examples run as they stand there."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = {m[1]: m[2] for m in re.finditer(r"^### ([^\n]+)\n(?:(?!^#).)*?^```python\n(.*?)^```", TEXT, re.M | re.S)}


@pytest.mark.parametrize("title", EXAMPLES)
def test_example_runs(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where it may leave files
    if ".plot(" in EXAMPLES[title]:
        pytest.importorskip("matplotlib")
    for framework in ("torch", "tensorflow", "jax", "keras"):
        if re.search(rf"^import {framework}|polywhiten\.{framework}", EXAMPLES[title], re.M):
            pytest.importorskip(framework)  # for Keras, its backend too
    if re.search(r"^import cupy", EXAMPLES[title], re.M) and not pytest.importorskip("cupy").cuda.is_available():
        pytest.skip("CuPy sees no CUDA device")
    exec(compile(EXAMPLES[title], f"README, {title}", "exec"), {})


def test_there_are_examples():
    assert set(EXAMPLES) >= {"PyTorch", "Keras", "TensorFlow", "JAX", "CuPy", "NumPy, and every other array library"}
