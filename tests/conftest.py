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

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker has one core; torch.compile would start a process for every core
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# The frameworks of the rows, such as "keras" for "keras-jax".
NAMES = {library.option.partition("-")[0] for library in Library}
# test_NAME.py and test_NAME_*.py are for the framework NAME alone. These other files need one framework too, such as
# test_cli.py, because the demo trains in PyTorch, and those of embeddings, which are NumPy's.
OWNERS = {f"test_{name}.py": "torch" for name in ("cli", "forked", "study", "tracking", "triton", "triton_joined")}
OWNERS |= {f"test_{name}.py": "numpy" for name in ("add_a_backend", "cli_compile", "cpu", "kernel_cache")}

OWNERS["test_project.py"] = "numpy"  # reads files of the checkout alone, so one session is enough


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
    owner = (
        "numpy"
        if name.startswith("test_embeddings_")
        else OWNERS.get(name) or next((n for n in NAMES if name.startswith((f"test_{n}.", f"test_{n}_"))), None)
    )
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
