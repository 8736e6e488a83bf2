"""The command `polywhiten`; its dependencies are optional, so they are looked for before they are imported."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line and exit: 0 done, 2 wrong use, 130 stopped by Ctrl-C."""
    missing = [name for name in ("click", "rich") if find_spec(name) is None]
    if missing:
        needed = " and ".join(missing)
        print(f'polywhiten: the command line needs {needed}: pip install "polywhiten[cli]"', file=sys.stderr)
        sys.exit(2)
    from polywhiten.cli import run

    sys.exit(run())


if __name__ == "__main__":
    main()
