"""All checks. `nox` runs every session, `nox -s "tests(torch)"` runs one of them, and `nox -l` lists them."""

import shutil
from pathlib import Path

import nox

CONSTRAINTS, CONFIGURATION = (str(Path(__file__).with_name(name)) for name in ("constraints.txt", "pyproject.toml"))
# The extras that a library's tests need, and the rows of the conformance suite, in lists that share a run of pytest:
# Keras uses one backend in a process.
LIBRARIES = {
    "numpy": ("[embeddings,faiss,onnx]", [["numpy", "strict"]]),
    "torch": ("[demo,keras,torch]", [["torch"], ["keras-torch"]]),
    "tensorflow": ("[demo,keras,tensorflow]", [["tensorflow"], ["keras-tensorflow"]]),
    "jax": ("[demo,flax,keras,jax]", [["jax", "flax"], ["keras-jax"]]),
    "dask": ("[distributed,embeddings,jax]", [["dask"]]),  # tests combine arrays of JAX and Dask
    "cupy": ("[cupy13]", [["cupy"]]),
}
# Packages that their tests also need, to compile GPU kernels without a GPU and to run exported models.
COMPANIONS = {
    "numpy": ["onnxruntime"],
    "torch": ["triton", "onnx", "onnxruntime", "onnxscript", "pillow", "pyyaml", "torchinfo"],
    "cupy": ["nvidia-cuda-nvrtc"],
}
# Packages of networks, which tests put the layers into; installed without dependencies, which include another PyTorch.
NETWORKS = {"torch": ["timm", "torchvision"]}
# Imports all modules but those of frameworks that aren't installed.
IMPORT_EVERYTHING = """
import importlib, pkgutil, polywhiten
from polywhiten.cli.about import FOLDERS, about, is_installed

absent = [f"polywhiten.{folder}" for folder in FOLDERS if not is_installed(about(folder).MODULE)]
absent += [] if is_installed("triton") else ["polywhiten.torch.triton"]
for module in pkgutil.walk_packages(polywhiten.__path__, "polywhiten.", lambda name: None):
    if not module.name.startswith(tuple(absent)):
        print(importlib.import_module(module.name).__name__)
"""

nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True


def install(session: nox.Session, *packages: str) -> None:
    """Install packages, in the versions that the checks are known to pass with."""
    session.install("-c", CONSTRAINTS, *packages)


@nox.session
def lint(session: nox.Session) -> None:
    install(session, "ruff")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
@nox.parametrize("library", list(LIBRARIES), ids=list(LIBRARIES))
def tests(session: nox.Session, library: str) -> None:
    extras, runs = LIBRARIES[library]
    companions = COMPANIONS.get(library, [])
    install(session, f".{extras}", *companions, "pytest", "pytest-xdist", "hypothesis", "array-api-strict")
    if library in NETWORKS:
        install(session, "--no-deps", *NETWORKS[library])
    # tests mostly compile or build graphs on one core, so they run on all cores at once, and compile quickly
    workers, one_core = ["--numprocesses=auto"], {"OMP_NUM_THREADS": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    for rows in runs:
        session.run("pytest", *workers, *(f"--library={row}" for row in rows), *session.posargs, env=one_core)
    if library == "torch":  # its kernels in Triton run in Triton's interpreter
        session.run(
            "pytest",
            *workers,
            "tests/test_triton.py",
            "tests/test_triton_joined.py",
            env=one_core | {"TRITON_INTERPRET": "1"},
        )
    doctests = "--doctest-modules", "--doctest-ignore-import-errors", "--pyargs", "polywhiten"
    session.run("pytest", *doctests, env={"KERAS_BACKEND": library} if "keras" in extras else {})


@nox.session
def package(session: nox.Session) -> None:
    """Build the wheel and the sdist, install the wheel, import and run what it installs, and check the types."""
    install(session, "build", "twine")
    folder = Path(session.create_tmp()).resolve()
    dist = folder / "dist"
    shutil.rmtree(dist, ignore_errors=True)  # an earlier version may have left files
    session.run("python", "-m", "build", "--outdir", str(dist), silent=True)
    files = sorted(map(str, dist.iterdir()))
    session.run("twine", "check", "--strict", *files)
    wheel = next(file for file in files if file.endswith(".whl"))
    install(session, "--force-reinstall", "--no-deps", wheel)
    install(session, f"{wheel}[demo,distributed,embeddings,jax,torch]", "mypy", "nox")
    session.chdir(folder)  # the sources aren't here, so the installed package is checked
    session.run("python", "-c", IMPORT_EVERYTHING)
    session.run("python", "-m", "polywhiten", "info")
    session.run("mypy", "--strict", "--config-file", CONFIGURATION, "-p", "polywhiten")


@nox.session(default=False)  # it takes some minutes; `tests` run the pages' code without it
def docs(session: nox.Session) -> None:
    """Build the documentation in docs/_build/html and run its notebooks; warnings are errors."""
    install(session, ".[benchmarks,demo,distributed,embeddings,faiss,flax,keras,onnx,torch]")
    install(session, "sphinx", "furo", "myst-nb", "sphinx-copybutton")
    session.run("python", "-m", "sphinx", "-W", "--keep-going", "docs", "docs/_build/html", *session.posargs)


@nox.session(default=False)
def speed(session: nox.Session) -> None:
    """Fail if polywhiten is slower than benchmarks/bars.py allows; `nox -s speed -- torch jax` names the frameworks."""
    backends = session.posargs or ["torch"]
    extras = ",".join(["benchmarks", *("numba" if name == "numpy" else name for name in backends)])
    install(session, f".[{extras}]")
    session.run("python", "benchmarks/speed.py", "--guard", *(f"--backend={name}" for name in backends))
