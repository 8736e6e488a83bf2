"""The page docs/add-a-backend.md, followed step by step in a copy of the sources."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "add-a-backend.md").read_text(encoding="utf-8")
NEW_FILES = re.findall(r"^New file `([^`]+)`:\n\n```\w+\n(.*?)^```", PAGE, re.M | re.S)
INSERTIONS = re.findall(r"^In `([^`]+)`, below the line `([^`]+)`:\n\n```\w+\n(.*?)^```", PAGE, re.M | re.S)

array_api_strict = pytest.importorskip("array_api_strict")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """Return a copy of the sources, changed as the page says."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("polywhiten", "backends", "tests", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "noxfile.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name, line, block in INSERTIONS:
        before, after = re.fullmatch(
            rf"(.*^ *{re.escape(line)}[^\n]*\n)(.*)", read(folder / name), re.M | re.S
        ).groups()
        indented = textwrap.indent(block, re.match(r"\n*( *)", after)[1])
        (folder / name).write_text(before + indented + after, encoding="utf-8")
    for name, block in NEW_FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(block, encoding="utf-8")
    library = folder / "library" / "beads"
    library.mkdir(parents=True)
    for path in Path(array_api_strict.__file__).parent.glob("*.py"):
        (library / path.name).write_text(read(path).replace("array_api_strict", "beads"), encoding="utf-8")
    # kernels for NumPy's arrays aren't the subject, and compiling them would take a minute
    (folder / "library" / "numba.py").write_text("raise ImportError")
    return folder


def read(path):
    return path.read_text(encoding="utf-8")


def python(folder, *args):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, *args]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment | {"PYTHONPATH": os.pathsep.join([str(folder), str(folder / "library")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_all_steps():
    assert {name for name, _, _ in INSERTIONS} == {
        "polywhiten/dispatch.py",
        "pyproject.toml",
        "tests/rows.py",
        "noxfile.py",
        "docs/start.md",
    }
    assert {name for name, _ in NEW_FILES} >= {"backends/beads/__init__.py", "backends/beads/about.py"}


def test_the_new_backend_passes_the_tests(checkout):
    files = "tests/conformance", "tests/test_beads.py", "tests/test_dispatch.py", "tests/test_architecture.py"
    table = "tests/test_pages.py::test_the_table_of_frameworks_is_what_backends_say_of_themselves"
    extras = "tests/test_pages.py::test_the_extras_of_backends_are_those_of_the_package"
    output = python(checkout, "-m", "pytest", "-q", "--library=beads", *files, table, extras)
    assert int(re.search(r"(\d+) passed", output)[1]) > 200


def test_the_command_line_reports_the_new_backend(checkout):
    code = "from polywhiten.cli.info import FOLDERS, probe; print('beads' in FOLDERS, probe('beads'))"
    expected = [array_api_strict.__version__, "cpu", "float64 sums, array API"]
    assert python(checkout, "-c", code).strip() == f"True {expected}"


def test_a_session_of_nox_tests_the_new_backend(checkout):
    assert '"beads": ("[beads]", ["beads"])' in read(checkout / "noxfile.py").partition("LIBRARIES = {")[2]
