# /// script
# dependencies = ["nox==2026.10.20", "uv==0.13.9"]
# ///
"""All checks. `nox` runs those of style, types, packaging and tests, and `nox -l` lists all, with those left out.

nox installs the packages above in `.nox/` before it reads the rest. uv then installs all others in less time than pip.
"""

import configparser
import os
import shutil
from pathlib import Path

import nox

ROOT = Path(__file__).parent
DIST, KERNELS = ROOT / ".nox" / "dist", ROOT / ".nox" / "kernels"  # what the session `build` builds, compiled once
CONSTRAINTS, CONFIGURATION = str(ROOT / "constraints.txt"), str(ROOT / "pyproject.toml")
# The extras that a library's tests need, and the rows of the conformance suite.
LIBRARIES = {
    "numpy": ("[embeddings,faiss,onnx]", ["numpy", "strict"]),
    "torch": ("[demo,keras,torch]", ["torch", "keras-torch"]),
    "tensorflow": ("[demo,keras,tensorflow]", ["tensorflow", "keras-tensorflow"]),
    "jax": ("[demo,flax,keras,jax]", ["jax", "flax", "keras-jax"]),
    "dask": ("[distributed,embeddings,jax]", ["dask"]),  # tests combine arrays of JAX and Dask
    "cupy": ("[cupy13]", ["cupy"]),
}
# Packages that their tests also need, to compile GPU kernels without a GPU and to run exported models.
COMPANIONS = {
    "numpy": ["onnxruntime"],
    "torch": ["triton", "onnx", "onnxruntime", "onnxscript", "pillow", "pyyaml", "torchinfo"],
    "cupy": ["nvidia-cuda-nvrtc"],
}
# Packages of networks, which tests put the layers into; installed without dependencies, which include another PyTorch.
NETWORKS = {"torch": ["timm", "torchvision"]}
# Tests compile much and compute little. JAX keeps all that it compiles, for other processes and for the next run, and
# XLA generates code for CPUs in its older and quicker way.
COMPILE_QUICKLY = {
    "OMP_NUM_THREADS": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".nox" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",
}
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
# The project's files that have a schema, and its name in check-jsonschema.
SCHEMAS = {
    "CITATION.cff": "citation-file-format",
    ".github/workflows/*.yml": "github-workflows",
    ".github/ISSUE_TEMPLATE/config.yml": "github-issue-config",
    ".github/ISSUE_TEMPLATE/form-*.yml": "github-issue-forms",
}

# Without bytecode files, each of the many processes that tests start would compile the packages that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

nox.options.default_venv_backend = "uv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True


def folders_of_wheels() -> list[str]:
    """Return pip's setting `find-links`, by which a machine offers wheels of its own; uv reads no settings of pip."""
    settings, home = configparser.ConfigParser(), Path.home()
    settings.read(["/etc/xdg/pip/pip.conf", "/etc/pip.conf", home / ".pip/pip.conf", home / ".config/pip/pip.conf"])
    return os.environ.get("PIP_FIND_LINKS", settings.get("global", "find-links", fallback="")).split()


if folders_of_wheels():
    os.environ.setdefault("UV_FIND_LINKS", ",".join(folders_of_wheels()))


def install(session: nox.Session, *packages: str) -> None:
    """Install packages, in the versions that the checks are known to pass with."""
    session.install("-c", CONSTRAINTS, *packages)


def install_polywhiten(session: nox.Session, extras: str, *packages: str) -> None:
    """Install the wheel that the session `build` has built, with extras, and other packages."""
    (wheel,) = DIST.glob("polywhiten-*.whl")
    install(session, f"{wheel}{extras}", *packages)


def compile_kernels(session: nox.Session) -> None:
    """Compile the kernels for CPUs, or copy those that a session before this one has compiled.

    Otherwise each of pytest's processes would compile them all. Numba takes a kept kernel only if the source file has
    the time of change that it had. uv gives a file the same time in every environment, so one compilation serves all of
    them. If a time differs, `polywhiten compile` compiles again.
    """
    folder = session.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", silent=True)
    packages = Path(folder.strip())
    if KERNELS.exists():
        shutil.copytree(KERNELS, packages, dirs_exist_ok=True)
    session.run("polywhiten", "compile")
    for file in packages.glob("polywhiten/cpu/**/*.nb[ci]"):
        kept = KERNELS / file.relative_to(packages)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, kept)


def announce(session: nox.Session) -> None:
    """Say how many sessions are left; nox itself says only which one runs."""
    manifest = session._runner.manifest
    left = sum(waiting for _, waiting in manifest.list_all_sessions())
    session.log(f"This is session {len(manifest) - left} of {len(manifest)}, and {left} are left.")


@nox.session
def lint(session: nox.Session) -> None:
    """Check the style, and the files of the project that a program can check."""
    announce(session)
    install(session, "ruff", "check-jsonschema", "zizmor")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    for pattern, schema in SCHEMAS.items():
        files = [str(file.relative_to(ROOT)) for file in sorted(ROOT.glob(pattern))]
        session.run("check-jsonschema", "--builtin-schema", f"vendor.{schema}", *files)
    session.run("zizmor", "--offline", "--quiet", ".github/workflows")


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """Build the sdist, and from it the wheel, which other sessions install; check what they say of themselves."""
    announce(session)
    install(session, "twine")
    shutil.rmtree(KERNELS, ignore_errors=True)  # which belong to an earlier wheel
    session.run("uv", "build", "--quiet", "--clear", "--out-dir", str(DIST))
    session.run("twine", "check", "--strict", *map(str, DIST.glob("polywhiten-*")))


@nox.session(requires=["build"])
@nox.parametrize("library", list(LIBRARIES), ids=list(LIBRARIES))
def tests(session: nox.Session, library: str) -> None:
    """Run the tests and the docstrings' examples that concern one library; the options after `--` are pytest's."""
    announce(session)
    extras, rows = LIBRARIES[library]
    companions = COMPANIONS.get(library, [])
    install_polywhiten(session, extras, *companions, "pytest", "pytest-xdist", "hypothesis", "array-api-strict")
    if library in NETWORKS:
        install(session, "--no-deps", *NETWORKS[library])
    if "embeddings" in extras or "torch" in extras:  # which include Numba
        compile_kernels(session)
    # tests mostly compile or build graphs on one core, so they run on all cores at once
    workers = "--numprocesses=auto", "--dist=worksteal"
    session.run("pytest", *workers, *(f"--library={row}" for row in rows), *session.posargs, env=COMPILE_QUICKLY)
    if library == "torch":  # its kernels in Triton run in Triton's interpreter
        session.run(
            "pytest",
            *workers,
            "tests/test_triton.py",
            "tests/test_triton_joined.py",
            env=COMPILE_QUICKLY | {"TRITON_INTERPRET": "1"},
        )
    doctests = "--doctest-modules", "--doctest-ignore-import-errors", "--pyargs", "polywhiten"
    session.run("pytest", *doctests, env={"KERAS_BACKEND": library} if "keras" in extras else {})


@nox.session(requires=["build"])
def package(session: nox.Session) -> None:
    """Import and run what the wheel installs, and check the types."""
    announce(session)
    install_polywhiten(session, "[demo,distributed,embeddings,jax,torch]", "mypy", "nox")
    session.chdir(Path(session.create_tmp()).resolve())  # the sources aren't here, so the installed package is checked
    session.run("python", "-c", IMPORT_EVERYTHING)
    session.run("python", "-m", "polywhiten", "info")
    session.run("mypy", "--strict", "--config-file", CONFIGURATION, "-p", "polywhiten")


@nox.session(default=False, requires=["build"])  # it takes some minutes; `tests` run the pages' code without it
def docs(session: nox.Session) -> None:
    """Build the documentation in docs/_build/html and run its notebooks; warnings are errors."""
    announce(session)
    install_polywhiten(session, "[benchmarks,demo,distributed,embeddings,faiss,flax,keras,onnx,torch]")
    install(session, "sphinx", "furo", "myst-nb", "sphinx-copybutton")
    session.run("python", "-m", "sphinx", "-W", "--keep-going", "docs", "docs/_build/html", *session.posargs)


@nox.session(default=False, requires=["build"])
def release(session: nox.Session) -> None:
    """Check that this commit can be released, and tag it; `-- --dry-run` adds no tag."""
    announce(session)
    session.run("python", "tools/release.py", "check" if "--dry-run" in session.posargs else "tag")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)  # which may hold an earlier version
    shutil.copytree(DIST, ROOT / "dist")
    session.log(f"Nothing was uploaded. The wheel and the sdist are in {ROOT / 'dist'}.")


@nox.session(default=False, requires=["build"])
def speed(session: nox.Session) -> None:
    """Fail if polywhiten is slower than benchmarks/bars.py allows; `nox -s speed -- torch jax` names the frameworks."""
    backends = session.posargs or ["torch"]
    extras = ",".join(["benchmarks", *("numba" if name == "numpy" else name for name in backends)])
    install_polywhiten(session, f"[{extras}]")
    session.run("python", "benchmarks/speed.py", "--guard", *(f"--backend={name}" for name in backends))
