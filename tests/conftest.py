"""Select the libraries that tests run on, and how many examples property tests draw."""

import os

import pytest
from hypothesis import HealthCheck, settings
from rows import Library

# Every run draws the same examples, so that anybody can repeat a failure.
_COMMON = {"derandomize": True, "deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
settings.register_profile("default", max_examples=50, **_COMMON)
settings.register_profile(
    "slow-library", max_examples=10, **_COMMON
)  # which compiles for every new shape, or builds graphs

# Convolutions with channels first need oneDNN on CPUs. TensorFlow uses it by itself on newer processors only.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker has one core; torch.compile would start a process for every core
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# The frameworks of the rows, such as "keras" for "keras-jax".
NAMES = {library.option.partition("-")[0] for library in Library}
# test_NAME.py and test_NAME_*.py are for the framework NAME alone. One framework is enough for these other files too:
# some need it, as test_cli.py needs PyTorch, in which the demo trains; others use NumPy, or read files of the checkout.
OWNED = {
    "torch": ("benchmarks", "cli", "forked", "study", "tracking", "triton"),
    "numpy": (
        "add_a_backend",
        "architecture",
        "cli_compile",
        "cpu",
        "embeddings",
        "first_use",
        "kernel_cache",
        "project",
        "solvers",
    ),
}
OWNERS = {part: framework for framework, parts in OWNED.items() for part in parts} | {name: name for name in NAMES}


def pytest_addoption(parser):
    names = [library.option for library in Library]
    parser.addoption("--library", action="append", choices=names, help="run what concerns these libraries alone")


def pytest_configure(config):
    chosen = config.getoption("library") or []
    slow = {"jax", "jax-cuda", "dask"} & set(chosen) or config.getoption("markexpr") == "gpu"
    settings.load_profile("slow-library" if slow else "default")
    for library in Library:
        if library.option in chosen and library.value.keras_backend:
            os.environ["KERAS_BACKEND"] = library.value.keras_backend  # Keras reads it once, when it is imported


def pytest_ignore_collect(collection_path, config):
    chosen, name = config.getoption("library"), collection_path.name
    parts = [part for part in OWNERS if name.startswith((f"test_{part}.", f"test_{part}_"))]
    owner = OWNERS[max(parts, key=len)] if parts else None
    frameworks = {name.partition("-")[0] for name in chosen or [] if not name.endswith("-cuda")}
    return True if chosen and owner and owner not in frameworks else None


def pytest_generate_tests(metafunc):
    for name, kind in (("library", "array"), ("layers", "layers")):
        if name in metafunc.fixturenames:
            chosen = metafunc.config.getoption("library")
            libraries = [b for b in Library if getattr(b.value, kind) and (not chosen or b.option in chosen)]
            metafunc.parametrize(name, [_param(b, chosen) for b in libraries], ids=lambda b: b.option)


def _param(library, chosen):
    needs_gpu = library.value.no_device is not None
    # a library that was chosen has to run, unless it needs a GPU
    missing = library.value.missing if needs_gpu or not chosen else None
    marks = [pytest.mark.gpu] * needs_gpu + [pytest.mark.skip(reason=missing)] * bool(missing)
    return pytest.param(library, marks=marks)


def pytest_terminal_summary(terminalreporter):
    """Show the resources that GPU kernels use, as their compilers report them."""
    reports = [report for report in terminalreporter.getreports("passed") if report.when == "call"]
    resources = [value for report in reports for name, value in report.user_properties if name == "resources"]
    if resources:
        terminalreporter.section("resources of GPU kernels")
    for line in resources:
        terminalreporter.line(line)


def pytest_runtest_setup(item):
    """Skip tests without their device; looking for it earlier would fix JAX's configuration."""
    for value in item.callspec.params.values() if hasattr(item, "callspec") else ():
        if isinstance(value, Library) and value.value.no_device:
            reason = value.value.no_device()
            if reason:
                pytest.skip(reason)
