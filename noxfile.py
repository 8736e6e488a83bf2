"""All checks: `nox` runs every session, `nox -s "tests(torch)"` one of them, `nox -l` lists them."""

import shutil
import sys
from pathlib import Path

import nox

CONSTRAINTS, CONFIGURATION = (str(Path(__file__).with_name(name)) for name in ("constraints.txt", "pyproject.toml"))
# Extras that a library's tests need, and the rows of the conformance suite that they run.
LIBRARIES = {
    "numpy": ("", ["numpy", "strict"]),
    "torch": ("[demo,torch]", ["torch"]),
    "tensorflow": ("[tensorflow]", ["tensorflow"]),
    "jax": ("[jax]", ["jax"]),
    "dask": ("[dask]", ["dask"]),
    "cupy": ("[cupy13]", ["cupy"]),  # without a GPU: its kernels are compiled, and run on the CPU
    "keras-tensorflow": ("[demo,keras,tensorflow]", ["keras-tensorflow"]),
    "keras-jax": ("[demo,keras,jax]", ["keras-jax"]),
    "keras-torch": ("[demo,keras,torch]", ["keras-torch"]),
}

# Those whose tests mostly compile or build graphs, on one core: as many at a time as there are cores.
ON_ONE_CORE = {"tensorflow", "jax", "dask", "cupy", "keras-tensorflow", "keras-jax"}

nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True


def install(session: nox.Session, *packages: str) -> None:
    """Install with the pins that the checks are known to pass with."""
    session.install("-c", CONSTRAINTS, *packages)


@nox.session
def lint(session: nox.Session) -> None:
    install(session, "ruff")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def typing(session: nox.Session) -> None:
    install(session, ".[demo,torch,jax,dask]", "mypy", "nox")
    session.chdir(session.create_tmp())  # away from the sources: what is installed is what is checked
    session.run("mypy", "--strict", "--config-file", CONFIGURATION, "-p", "polywhiten")


@nox.session
@nox.parametrize("library", list(LIBRARIES), ids=list(LIBRARIES))
def tests(session: nox.Session, library: str) -> None:
    extras, rows = LIBRARIES[library]
    compiler = ["nvidia-cuda-nvrtc"] if library == "cupy" else []  # on a machine with a GPU it is part of CUDA
    install(session, f".{extras}", *compiler, "pytest", "pytest-xdist", "hypothesis", "array-api-strict")
    workers = ["--numprocesses=auto"] if library in ON_ONE_CORE else []
    session.run("pytest", *workers, *(f"--library={row}" for row in rows), *session.posargs)
    if library == "torch":  # the Triton kernels on the CPU; those runs above compiled them
        session.run("pytest", "--numprocesses=auto", "tests/test_fused.py", env={"TRITON_INTERPRET": "1"})
    environment = {"KERAS_BACKEND": library.removeprefix("keras-")} if library.startswith("keras-") else {}
    doctests = "--doctest-modules", "--doctest-ignore-import-errors", "--pyargs", "polywhiten"
    session.run("pytest", *doctests, env=environment)


@nox.session
def package(session: nox.Session) -> None:
    install(session, "build", "twine")
    place = Path(session.create_tmp()).resolve()
    dist, clean = place / "dist", place / "clean"
    shutil.rmtree(dist, ignore_errors=True)  # a former version's
    session.run("python", "-m", "build", "--outdir", str(dist), silent=True)
    files = sorted(map(str, dist.iterdir()))
    session.run("twine", "check", "--strict", *files)
    session.run("python", "-m", "venv", "--clear", str(clean))
    python = str(clean / ("Scripts" if sys.platform == "win32" else "bin") / "python")
    wheel = next(file for file in files if file.endswith(".whl"))
    session.run(python, "-m", "pip", "install", "-q", "-c", CONSTRAINTS, f"{wheel}[demo,torch,jax,dask]", external=True)
    every = (
        "import importlib, pkgutil, polywhiten; "
        "names = [m.name for m in pkgutil.walk_packages(polywhiten.__path__, 'polywhiten.', lambda name: None)]; "
        "names = [name for name in names if name.split('.')[1] not in ('cupy', 'keras', 'tensorflow')]; "
        "print(*[importlib.import_module(name).__name__ for name in names])"
    )
    session.chdir(str(clean))
    session.run(python, "-c", every, external=True)
    session.run(python, "-m", "polywhiten", "info", external=True)
