"""What is installed: each framework's version and devices, and the kernels that its arrays get."""

from __future__ import annotations

import inspect
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import polywhiten
from polywhiten.cli.streams import reason
from polywhiten.dispatch import BACKENDS, backend_of
from polywhiten.gpu_launches import CHOICES, DEFAULT, VARIABLE, gpu_launches
from polywhiten.kernels import Kernels

FRAMEWORKS = ("numpy", "torch", "jax", "tensorflow", "keras", "cupy", "dask")
ARRAY_API = ("numpy",)  # served without a backend too
KERNELS = ("moments", "inverse_sqrt", "inverse_sqrt_adjoint", "affine_map", "cross_moments")

ANSWER = "\npolywhiten: "  # begins a line of its own, among all that a framework prints
TIMEOUT = 120  # seconds; a first import of TensorFlow from a slow disk takes most of one minute


def report() -> Iterator[str]:
    """A line on polywhiten, then one on every framework, each as soon as it is known."""
    yield f"polywhiten {polywhiten.__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield ""
    yield _line("framework", "version", "devices", "kernels")
    for name in FRAMEWORKS:
        yield _line(name, *(_ask(name) if is_installed(name) else ["not installed"]))
    yield ""
    yield "Kernels in brackets are the backend's own; all others are plain array API calls."
    yield _gpu_launches()


def probe(name: str) -> list[str]:
    """Version, devices and kernels of a framework; or the one reason why it doesn't work."""
    try:
        module = import_module(name)
        return [str(module.__version__), _devices(name, module), _kernels(name, module)]
    except BaseException as error:  # whatever it raises, SystemExit too, is what users need to see
        return [f"installed but broken: {reason(error)}"]


def _ask(name: str) -> list[str]:
    """`probe` in a process of its own: a broken framework can end its process, and others fill it with messages."""
    code = f"import json; from polywhiten.cli.info import ANSWER, probe; print(ANSWER + json.dumps(probe({name!r})))"
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


def is_installed(name: str) -> bool:
    spec = find_spec(name)
    return spec is not None and spec.origin is not None  # any folder of that name has a spec


def _devices(name: str, module: Any) -> str:
    if name == "numpy":
        return "cpu"
    if name == "torch":
        kind = str(module.accelerator.current_accelerator()) if module.accelerator.is_available() else None
        return _joined(["cpu", *(f"{kind}:{i}" for i in range(module.accelerator.device_count() if kind else 0))])
    if name == "jax":
        return _joined([f"{device.platform}:{device.id}" for device in module.devices()])
    if name == "tensorflow":
        found = module.config.list_physical_devices()  # unlike the logical ones, these need not be taken hold of
        return _joined([device.name.removeprefix("/physical_device:").lower() for device in found])
    if name == "cupy":
        try:
            return _joined([f"cuda:{i}" for i in range(module.cuda.runtime.getDeviceCount())])
        except module.cuda.runtime.CUDARuntimeError as error:  # no driver, or none that fits
            return f"none: {str(error).partition(':')[0]}"
    return f"those of {module.backend.backend()}" if name == "keras" else "those of its chunks"


def _kernels(name: str, module: Any) -> str:
    backend = BACKENDS.get(name)
    if backend is None:
        if name == "keras":
            return f"those of {module.backend.backend()}"
        if name not in ARRAY_API:
            return "none: polywhiten has no backend for it"
        own = _own_kernels(backend_of(module.empty(0)).kernels)
        return f"polywhiten.cpu ({own})" if own else "array API"
    own = _own_kernels(import_module(backend).BACKEND.kernels)
    return f"{backend} ({own})" if own else f"array API, as {backend} calls it"


def _gpu_launches() -> str:
    """Which structure the kernels of PyTorch and CuPy have on a GPU, and how to choose the other."""
    try:
        chosen = gpu_launches()
    except ValueError as error:
        return str(error)
    (other,) = set(CHOICES) - {chosen}
    is_default = " (the default)" if chosen == DEFAULT else ""
    return f"Kernels on a GPU have {chosen} launches{is_default}; {VARIABLE}={other} in the environment changes that."


def _own_kernels(kernels: Kernels) -> str:
    """Those that aren't the array API's, or these in a wrapper that sets a precision, say."""
    found = (name for name in KERNELS if inspect.unwrap(getattr(type(kernels), name)) is not getattr(Kernels, name))
    return ", ".join(found)


def _joined(devices: list[str]) -> str:
    return ", ".join(devices) or "none"


def _line(name: str, *fields: str) -> str:
    if len(fields) == 1:
        return f"{name:<11} {fields[0]}"
    version, devices, kernels = fields
    return f"{name:<11} {version:<15} {devices:<19} {kernels}"
