"""Which libraries the conformance suite runs on, and how many examples property tests draw."""

import pytest
from hypothesis import HealthCheck, settings
from rows import Library

# Examples are the same in every run: a failure in CI is one that anybody can repeat.
_COMMON = {"derandomize": True, "deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
settings.register_profile("default", max_examples=60, **_COMMON)
settings.register_profile(
    "slow-library", max_examples=12, **_COMMON
)  # it compiles for every new shape, or builds graphs


def pytest_addoption(parser):
    names = [library.name.lower() for library in Library]
    parser.addoption("--library", action="append", choices=names, help="run the conformance suite on these alone")


def pytest_configure(config):
    chosen = config.getoption("library") or []
    settings.load_profile("slow-library" if {"jax", "dask"} & set(chosen) else "default")


def pytest_generate_tests(metafunc):
    for name, libraries in (("library", list(Library)), ("layers", [b for b in Library if b.value.layers])):
        if name in metafunc.fixturenames:
            chosen = metafunc.config.getoption("library")
            params = [_param(b, chosen) for b in libraries if not chosen or b.name.lower() in chosen]
            metafunc.parametrize(name, params, ids=lambda b: b.name.lower())


def _param(library, chosen):
    missing = not chosen and not library.value.installed
    reason = f"{library.value.module} is not installed"
    return pytest.param(library, marks=pytest.mark.skip(reason=reason) if missing else ())
