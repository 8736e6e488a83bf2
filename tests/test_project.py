"""Versions and pins agree wherever they stand, and only a clean commit with a dated changelog can be released."""

import re
import runpy
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
if not (ROOT / ".github").is_dir():
    pytest.skip("the sdist has no workflows and no release script", allow_module_level=True)
RELEASE = runpy.run_path(str(ROOT / "tools" / "release.py"))


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def git(folder, *arguments):
    identity = "-c", "user.name=Test", "-c", "user.email=test@example.org"
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Return a repository that can be released."""
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "Test")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "test@example.org")
    (tmp_path / "polywhiten").mkdir()
    (tmp_path / "polywhiten" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [1.2.3] - 2026-12-01\n")
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.3\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--message", "Release")
    return tmp_path


def test_a_clean_commit_is_tagged_once(checkout, capsys):
    RELEASE["main"](["check"], checkout)
    assert RELEASE["git"](checkout, "tag") == ""
    RELEASE["main"](["tag"], checkout)
    assert RELEASE["git"](checkout, "tag") == "v1.2.3"
    with pytest.raises(SystemExit, match=r"tag v1\.2\.3 exists"):
        RELEASE["main"](["tag"], checkout)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("notes.txt", "", "not committed.*\n.*notes.txt"),
        ("CHANGELOG.md", "## [Unreleased]\n", 'no heading "## .1.2.3. - '),
        ("CHANGELOG.md", "## [1.2.3] - soon\n", "dates 1.2.3 'soon'"),
        ("CITATION.cff", "version: 1.2.2\n", 'the line "version: 1.2.3"'),
        ("polywhiten/__init__.py", '__version__ = "next"\n', "no version such as"),
    ],
    ids=["dirty tree", "no heading", "no date", "citation", "version"],
)
def test_what_stands_in_the_way_is_said_and_nothing_is_tagged(checkout, name, text, message):
    (checkout / name).write_text(text)
    with pytest.raises(SystemExit, match=message):
        RELEASE["main"](["tag"], checkout)
    assert RELEASE["git"](checkout, "tag") == ""


def test_an_unknown_command_is_refused(checkout):
    with pytest.raises(SystemExit, match="usage"):
        RELEASE["main"](["publish"], checkout)


def test_the_citation_has_the_version_of_the_package():
    assert f"\nversion: {RELEASE['version_of'](ROOT)}\n" in read("CITATION.cff")


def test_nox_is_pinned_alike_for_users_and_for_its_own_environment():
    block = re.search(r"^# /// script\n# (.*?)\n# ///$", read("noxfile.py"), re.M | re.S)[1]
    assert set(tomllib.loads(block)["dependencies"]) <= set(read("constraints.txt").splitlines())


def test_the_workflow_runs_every_session_of_nox():
    noxfile = read("noxfile.py")
    sessions = set(re.findall(r"^@nox.session(?:\(requires.*\))?\n(?:@.*\n)?def (\w+)\(", noxfile, re.M)) - {"tests"}
    sessions |= {f"tests({library})" for library in re.findall(r'^    "(\w+)": \("\[', noxfile, re.M)}
    assert sessions >= {"lint", "package", "tests(numpy)"}
    assert sessions <= set(re.findall(r"^          - ([\w()]+)$", read(".github/workflows/checks.yml"), re.M))


def test_the_workflow_runs_the_pythons_of_the_classifiers():
    classifiers = tomllib.loads(read("pyproject.toml"))["project"]["classifiers"]
    pythons = {c.removeprefix("Programming Language :: Python :: ") for c in classifiers if ":: 3." in c}
    assert pythons
    assert pythons <= set(re.findall(r'"(3\.\d+)"', read(".github/workflows/checks.yml")))


def test_the_hook_before_commits_runs_the_lint_of_nox():
    assert "entry: python -m nox -s lint\n" in read(".pre-commit-config.yaml")
