"""A framework's backend is imported when the first of its arrays is passed, and not before."""

import subprocess
import sys

import numpy as np
import pytest

import polywhiten as pw
from polywhiten._checkout import backends_beside
from polywhiten.dispatch import BACKENDS, backend_of


def test_import_brings_no_framework():
    others = {*BACKENDS, "keras", "click"} - {"numpy"}
    code = (
        "import sys, polywhiten, numpy; polywhiten.iter_norm(numpy.eye(4)[:, :2] * 1.0);"
        f"print(sorted({others} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_import_brings_no_compiler_of_pytorch():
    """It takes longer to import than all else, and whoever doesn't compile models doesn't need it."""
    torch = pytest.importorskip("torch")
    from polywhiten.torch._internals import assume_constant_result

    code = "import polywhiten.torch, sys; print('torch._dynamo' in sys.modules)"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
    marked = [vars(mark(lambda: 0)) for mark in (assume_constant_result, torch.compiler.assume_constant_result)]
    assert marked[0] == marked[1]


def test_subclasses_are_served_by_their_framework():
    torch = pytest.importorskip("torch")
    import polywhiten.torch

    class Mine(torch.Tensor):
        pass

    x = torch.randn(8, 4)
    for tensor in (x, torch.nn.Parameter(x), x.as_subclass(Mine)):
        assert backend_of(tensor) is polywhiten.torch.BACKEND


def test_a_subclass_of_ndarray_is_a_numpy_array():
    class Mine(np.ndarray):
        pass

    x = np.random.default_rng(0).normal(size=(8, 4))
    np.testing.assert_allclose(pw.iter_norm(x.view(Mine)), pw.iter_norm(x), rtol=1e-12)


def test_backends_beside_the_package_are_those_of_its_own_checkout_alone(tmp_path):
    package, backends, project = tmp_path / "polywhiten", tmp_path / "backends", tmp_path / "pyproject.toml"
    package.mkdir()
    assert backends_beside(package) == []  # the package is installed
    backends.mkdir()
    assert backends_beside(package) == []  # with an unrelated package called `backends`
    project.write_text('[project]\nname = "others"\n', encoding="utf-8")
    assert backends_beside(package) == []
    project.write_text('[project]\nname = "polywhiten"\n', encoding="utf-8")
    assert backends_beside(package) == [str(backends)]


def test_every_implementation_has_a_name(library):
    """`polywhiten info` shows the names; an implementation without one would inherit that of the plain kernels."""
    implementations = backend_of(library.array(np.ones((4, 2), "float32"))).implementations
    assert len({implementation.name for implementation in implementations}) == len(implementations)
