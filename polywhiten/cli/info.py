"""Report what is installed: each framework's version and devices, and the kernels that its arrays get."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module

import polywhiten
from polywhiten.cli.about import FOLDERS, about, is_installed
from polywhiten.cli.streams import reason
from polywhiten.dispatch import BACKENDS
from polywhiten.gpu_launches import CHOICES, DEFAULT, VARIABLE, gpu_launches

ANSWER = "\npolywhiten: "  # starts a line, to be told from what a framework prints
TIMEOUT = 120  # seconds; the first import of TensorFlow from a slow disk takes most of one minute


def report() -> Iterator[str]:
    """Yield a line about polywhiten, then one about every framework, as soon as each is known."""
    yield f"polywhiten {polywhiten.__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield ""
    yield _line("framework", ["version", "devices", "kernels"])
    for folder in FOLDERS:
        yield _line(about(folder).MODULE, _ask(folder))
    yield ""
    yield "An array gets the first of these kernels that support it. Those called array API are plain operations."
    yield _gpu_launches()


def probe(folder: str) -> list[str]:
    """Return a framework's version, devices and kernels, or the reason why it doesn't work."""
    backend = about(folder)
    try:
        version = str(import_module(backend.MODULE).__version__)
        devices = ", ".join(backend.devices()) or "none"
        module = BACKENDS.get(backend.MODULE)
        if module is None:  # it has no arrays of its own
            return [version, devices, devices]
        return [version, devices, ", ".join(each.name for each in import_module(module).BACKEND.implementations)]
    except BaseException as error:  # users need to see anything that a broken framework raises, even SystemExit
        return [f"installed but broken: {reason(error)}"]


def _ask(folder: str) -> list[str]:
    """Call `probe` in another process, because a broken framework may end it, and others print messages."""
    backend = about(folder)
    if not is_installed(backend.MODULE):
        return ["not installed: pip install " + " or ".join(f'"polywhiten[{extra}]"' for extra in backend.EXTRAS)]
    code = f"import json; from polywhiten.cli.info import ANSWER, probe; print(ANSWER + json.dumps(probe({folder!r})))"
    try:
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=False, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return [f"installed but broken: no answer in {TIMEOUT} s"]
    except OSError as error:  # no memory for a process, for example
        return [f"installed, but Python can't be started to ask it: {reason(error)}"]
    lines = done.stdout.decode("utf-8", "replace").splitlines()  # a framework may print bytes that are no text
    answers = [line.removeprefix(ANSWER.strip()) for line in lines if line.startswith(ANSWER.strip())]
    if done.returncode or not answers:
        return [f"installed but broken: its import ends the process with exit code {done.returncode}"]
    fields: list[str] = json.loads(answers[-1])
    return fields


def _gpu_launches() -> str:
    """Say how many launches the kernels of PyTorch and CuPy have on a GPU, and how to change that."""
    try:
        chosen = gpu_launches()
    except ValueError as error:
        return str(error)
    (other,) = set(CHOICES) - {chosen}
    is_default = " (the default)" if chosen == DEFAULT else ""
    return f"Kernels on a GPU have {chosen} launches{is_default}; {VARIABLE}={other} in the environment changes that."


def _line(name: str, fields: list[str]) -> str:
    widths = 15, 19, 0
    columns = fields if len(fields) == 1 else [f"{field:<{width}}" for field, width in zip(fields, widths, strict=True)]
    return f"{name:<11} {' '.join(columns)}"
