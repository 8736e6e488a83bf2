"""The examples in README.md run unchanged."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = {m[1]: m[2] for m in re.finditer(r"^### ([^\n]+)\n(?:(?!^#).)*?^```python\n(.*?)^```", TEXT, re.M | re.S)}


def skip_without_frameworks(example):
    if ".plot(" in example:
        pytest.importorskip("matplotlib")
    for framework in ("torch", "tensorflow", "jax", "keras"):
        if re.search(rf"^import {framework}|polywhiten\.{framework}", example, re.M):
            pytest.importorskip(framework)  # importing Keras also fails without its backend
    if re.search(r"^import cupy", example, re.M) and not pytest.importorskip("cupy").cuda.is_available():
        pytest.skip("CuPy sees no CUDA device")


@pytest.mark.parametrize("title", EXAMPLES)
def test_example_runs(title, tmp_path, monkeypatch):
    skip_without_frameworks(EXAMPLES[title])
    monkeypatch.chdir(tmp_path)  # a folder in which the example may write files
    exec(compile(EXAMPLES[title], f"README, {title}", "exec"), {})


@pytest.mark.parametrize("title", EXAMPLES)
def test_example_runs_at_the_root_of_a_checkout(title, tmp_path):
    """At the root, Python finds the folder `polywhiten` before the installed package."""
    skip_without_frameworks(EXAMPLES[title])
    example = EXAMPLES[title].replace("whitening.png", (tmp_path / "whitening.png").as_posix())
    # Without Numba, because compiling the checkout's kernels would take half a minute.
    code = f"import sys; sys.modules['numba'] = None; sys.path[0] == '' or sys.exit('not at the root')\n{example}"
    code += "\nimport polywhiten; print(polywhiten.__file__)"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]).parent == ROOT / "polywhiten"


def test_there_are_examples():
    assert set(EXAMPLES) >= {"PyTorch", "Keras", "TensorFlow", "JAX", "CuPy", "NumPy, and every other array library"}
