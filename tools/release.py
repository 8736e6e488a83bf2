"""Check that the commit that is checked out can be released, and tag it. `nox -s release` runs both."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent


def git(root: Path, *arguments: str) -> str:
    """Return what a command of git prints."""
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def version_of(root: Path) -> str:
    """Return the version that the package in a checkout has."""
    text = (root / "polywhiten" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(\d+\.\d+\.\d+(?:rc\d+)?)"$', text, re.M)
    if not found:
        raise SystemExit('polywhiten/__init__.py has no version such as __version__ = "1.2.3" or "1.2.3rc1"')
    return found[1]


def problems(root: Path) -> list[str]:
    """Return everything that stands in the way of a release, as sentences that say what would help."""
    version, found = version_of(root), []
    changed = git(root, "status", "--porcelain")
    if changed:
        found.append(f"These files are not committed; commit or remove them:\n{changed}")
    if git(root, "tag", "--list", f"v{version}"):
        found.append(f"The tag v{version} exists already; set a new version in polywhiten/__init__.py.")
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = re.search(rf"^## \[{re.escape(version)}\] - (\S+)$", changelog, re.M)
    if not heading:
        found.append(f'CHANGELOG.md has no heading "## [{version}] - {date.today()}"; turn "Unreleased" into it.')
    elif not _is_date(heading[1]):
        found.append(f"CHANGELOG.md dates {version} {heading[1]!r}; write it as {date.today()}.")
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    if f"\nversion: {version}\n" not in citation:
        found.append(f'CITATION.cff has another version; it needs the line "version: {version}".')
    return found


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


def main(arguments: list[str], root: Path = ROOT) -> None:
    """Run the command `check` or `tag`; `tag` checks again first."""
    if arguments not in (["check"], ["tag"]):
        raise SystemExit("usage: python tools/release.py check|tag")
    found = problems(root)
    if found:
        raise SystemExit("\n".join(["This commit can't be released.", *found]))
    tag = f"v{version_of(root)}"
    if arguments == ["tag"]:
        git(root, "tag", "--annotate", tag, "--message", f"polywhiten {version_of(root)}")
        print(f"{tag} is tagged. `git push origin {tag}` publishes the tag.")
    else:
        print(f"{tag} can be released.")


if __name__ == "__main__":
    main(sys.argv[1:])
