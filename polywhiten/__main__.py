"""The command `polywhiten`. Its dependencies are optional, so it checks for them before it imports them."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from polywhiten.cli.streams import complain, usable_streams


def main() -> None:
    """Run the command line and exit.

    The exit code is 0 for success, 2 for wrong arguments and for files that can't be written, 130 after Ctrl-C, and 1
    if a reader of the output, such as `head`, has closed it.
    """
    with usable_streams():
        try:
            code = _run()
        except KeyboardInterrupt:  # while the command line itself is imported
            complain("stopped")
            code = 130
    sys.exit(code)


def _run() -> int:
    missing = [name for name in ("click", "rich") if find_spec(name) is None]
    if missing:
        complain(f'the command line needs {" and ".join(missing)}: pip install "polywhiten[cli]"')
        return 2
    from polywhiten.cli.commands import run

    return run()


if __name__ == "__main__":
    main()
