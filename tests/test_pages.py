"""The code of the README and of the documentation runs as it stands there, and their links and tables are right."""

import logging
import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from pages import OWNERS, PAGES, ROOT, example, examples_of

from polywhiten.cli.about import FOLDERS, about

# test_embeddings_onnx.py makes the files that this example reads
PREPARED = {example("embeddings-deploy.md", "ONNX, after a model")}
EXAMPLES = [found for page in PAGES for found in examples_of(page) if found not in PREPARED]
# The first example of each page of a framework
FRAMEWORKS = ("cupy", "dask", "jax", "keras", "numpy", "pytorch", "tensorflow")
FIRST = [examples_of(ROOT / "docs" / f"{page}.md")[0] for page in FRAMEWORKS]
START = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")


def pytest_generate_tests(metafunc):
    """Run those examples that belong to the chosen libraries, or else all whose packages are installed."""
    for name, found in (("shown", EXAMPLES), ("first", FIRST)):
        if name in metafunc.fixturenames:
            chosen = {row.partition("-")[0] for row in metafunc.config.getoption("library") or []}
            kept = [e for e in found if not chosen or e.library in chosen]
            metafunc.parametrize(name, [pytest.param(e, marks=_marks(e, chosen)) for e in kept], ids=str)


def _marks(shown, chosen):
    # what belongs to a chosen library has to run
    missing = sorted(name for name in shown.modules if not chosen and find_spec(name) is None)
    return [pytest.mark.skip(reason=f"{', '.join(missing)} not installed")] if missing else []


def skip_without_device(shown):
    if shown.library == "cupy" and not pytest.importorskip("cupy").cuda.is_available():
        pytest.skip("CuPy sees no CUDA device")


def test_example_runs(shown, tmp_path, monkeypatch):
    skip_without_device(shown)
    monkeypatch.setenv("MPLBACKEND", "agg")  # figures are drawn, but no window is opened
    monkeypatch.chdir(tmp_path)  # where it may leave files
    try:
        shown.run()
    finally:
        logging.getLogger("polywhiten").setLevel(logging.NOTSET)  # which an example changes


def test_example_runs_at_the_root_of_a_checkout(first):
    """There the folder `polywhiten` is found before the installed package."""
    skip_without_device(first)
    # by plain kernels: compiling those of the checkout would take ten seconds
    code = f"import sys; sys.modules['numba'] = None; sys.path[0] == '' or sys.exit('not at the root')\n{first.code}"
    code += "\nimport polywhiten; print(polywhiten.__file__)"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]).parent == ROOT / "polywhiten"


def test_every_library_has_an_example():
    assert {found.library for found in EXAMPLES} == {*OWNERS, "numpy"}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "add-a-backend.md"], ids=lambda page: page.name)
def test_links_lead_to_files(page):
    """Those to pages that are generated, and to headings, are checked by `nox -s docs`."""
    targets = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "generated/" not in target and not (page.parent / target).exists()]
    assert not missing


def test_the_table_of_frameworks_is_what_backends_say_of_themselves():
    rows = dict(re.findall(r'^\| ([\w ]+) \| `pip install "\.(.*)` \|$', START, re.M))
    backends = [about(folder) for folder in FOLDERS]
    assert set(rows) == {backend.TITLE for backend in backends}
    for folder, backend in zip(FOLDERS, backends, strict=True):
        extras, _, module = rows[backend.TITLE].rpartition(" | `")
        assert all(re.search(rf"\b{extra}\b", extras) for extra in backend.EXTRAS)
        assert module == ("polywhiten" if backend.MODULE == "numpy" else f"polywhiten.{folder}")


def test_the_extras_of_backends_are_those_of_the_package():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {extra for folder in FOLDERS for extra in about(folder).EXTRAS} <= set(extras)
