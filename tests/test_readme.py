"""The README's examples run as they stand there."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from polywhiten.cli.about import FOLDERS, about

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = {m[1]: m[2] for m in re.finditer(r"^### ([^\n]+)\n(?:(?!^#).)*?^```python\n(.*?)^```", TEXT, re.M | re.S)}


def skip_without_frameworks(example):
    if ".plot(" in example:
        pytest.importorskip("matplotlib")
    for folder in FOLDERS:
        framework = about(folder).MODULE
        if re.search(rf"^import {framework}|polywhiten\.{folder}", example, re.M):
            pytest.importorskip(framework)  # for Keras, its backend too
    if re.search(r"^import cupy", example, re.M) and not pytest.importorskip("cupy").cuda.is_available():
        pytest.skip("CuPy sees no CUDA device")


@pytest.mark.parametrize("title", EXAMPLES)
def test_example_runs(title, tmp_path, monkeypatch):
    skip_without_frameworks(EXAMPLES[title])
    monkeypatch.chdir(tmp_path)  # where it may leave files
    exec(compile(EXAMPLES[title], f"README, {title}", "exec"), {})


@pytest.mark.parametrize("title", EXAMPLES)
def test_example_runs_at_the_root_of_a_checkout(title, tmp_path):
    """There the folder `polywhiten` is found before the installed package."""
    skip_without_frameworks(EXAMPLES[title])
    example = EXAMPLES[title].replace("whitening.png", (tmp_path / "whitening.png").as_posix())
    # by plain kernels: compiling those of the checkout would take half a minute
    code = f"import sys; sys.modules['numba'] = None; sys.path[0] == '' or sys.exit('not at the root')\n{example}"
    code += "\nimport polywhiten; print(polywhiten.__file__)"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]).parent == ROOT / "polywhiten"


def test_there_are_examples():
    assert set(EXAMPLES) >= {"PyTorch", "Keras", "TensorFlow", "JAX", "CuPy", "NumPy, and every other array library"}


def test_the_table_of_frameworks_is_what_backends_say_of_themselves():
    rows = dict(re.findall(r'^\| ([\w ]+) \| `pip install "polywhiten(.*)` \|$', TEXT, re.M))
    backends = [about(folder) for folder in FOLDERS]
    assert set(rows) == {backend.TITLE for backend in backends}
    for folder, backend in zip(FOLDERS, backends, strict=True):
        extras, _, module = rows[backend.TITLE].rpartition(" | `")
        assert all(re.search(rf"\b{extra}\b", extras) for extra in backend.EXTRAS)
        assert module == ("polywhiten" if backend.MODULE == "numpy" else f"polywhiten.{folder}")


def test_the_extras_of_backends_are_those_of_the_package():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {extra for folder in FOLDERS for extra in about(folder).EXTRAS} <= set(extras)
