"""The backend of an array: found from the array's type, imported when its arrays first arrive."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_numpy_namespace

from polywhiten import checks
from polywhiten._types import Array, Namespace
from polywhiten.kernels import Kernels
from polywhiten.solvers import Solver
from polywhiten.whitening import Plan, Statistics, forward

# Top-level module of the array's class: the subpackage whose BACKEND serves it. The array API alone serves all others.
BACKENDS = {
    "torch": "polywhiten.torch",
    "cupy": "polywhiten.cupy",
    "tensorflow": "polywhiten.tensorflow",
    "dask": "polywhiten.dask",
    "jax": "polywhiten.jax",  # tracers
    "jaxlib": "polywhiten.jax",  # arrays
}


@dataclass(frozen=True)
class Backend:
    """What the core asks of a framework; as it stands, for one that has kernels but no gradients to register.

    Attributes
    ----------
    kernels : Kernels
        The five kernels, with the framework's array namespace.
    """

    kernels: Kernels

    def whiten(self, plan: Plan, x: Array, weight: Array | None, bias: Array | None) -> tuple[Array, Statistics]:
        """`polywhiten.whitening.forward`, with `backward` as its gradient where the framework differentiates."""
        return forward(self.kernels, plan, x, weight, bias)

    def whiten_groups(
        self,
        of_samples: bool,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        groups: int,
        axis: int,
        solver: Solver,
        eps: float,
        averages: Any = None,
    ) -> Array | None:
        """All of IterNorm, or of group whitening, at once, with a step of a layer's averages; None where that isn't."""
        return None

    def apply_frozen(
        self, x: Array, mean: Array, whitener: Array, weight: Array | None, bias: Array | None, axis: int
    ) -> Array | None:
        """All of `polywhiten.functional.apply_frozen` at once; None where a backend doesn't do that."""
        return None

    def tensor(self, x: Array, name: str = "x") -> Array:
        """X itself, or the tensor that a framework's variable holds; else an error, with the argument's name."""
        return x

    def snapshot(self, state: Array, *given: Array | None) -> Array:
        """A layer's state, or a copy where it may change in place while the gradient of `given` still needs it."""
        return state

    def converted(self, values: Any, name: str, x: Array) -> Array:
        """What came beside x as an array of its library, where the library's own functions take it; else TypeError."""
        if namespace_of(values) is not self.kernels.xp:
            raise checks.wrong_type(values, name, "an array of the library that x is of")
        return values

    def in_memory_order(self, x: Array, axis: int) -> tuple[Array, int, Callable[[Array], Array]]:
        """A view of x with its axes as they lie in memory, its channel axis, and what puts a result's axes back.

        For frameworks whose tensors can be channels-last in memory alone.
        """
        return x, axis, lambda y: y


class NumPyBackend(Backend):
    """NumPy's arrays, with the compiled kernels where there are some."""

    def converted(self, values: Any, name: str, x: Array) -> Array:
        """As NumPy's functions convert it; not arrays that these would give a result in their own class for."""
        if isinstance(values, np.ndarray):
            return values
        wanted = "a NumPy array, as x is one, or both of one library"
        if hasattr(values, "__array_ufunc__") or hasattr(values, "__array_wrap__"):
            raise checks.wrong_type(values, name, wanted)
        try:
            return np.asarray(values)
        except (TypeError, ValueError) as error:  # JAX's tracers, say
            raise checks.wrong_type(values, name, wanted) from error


def backend_of(x: Array, name: str = "x") -> Backend:
    """The backend that serves x; TypeError, with the argument's name, where x is no array."""
    module = framework_module(type(x))
    if module is not None:
        backend: Backend = sys.modules[module].BACKEND
        return backend
    xp = namespace_of(x)
    if xp is None:
        raise checks.wrong_type(x, name, f"an array, for example numpy.asarray({name})")
    return _backend(xp)


def namespace_of(x: Any) -> Namespace | None:
    """The array API namespace that serves x; None where x is no array."""
    try:
        return array_namespace(x)
    except TypeError:
        return None


@cache
def _backend(xp: Namespace) -> Backend:
    """The array API's kernels alone, but for NumPy, which has compiled ones where that is possible."""
    if not is_numpy_namespace(xp):
        return Backend(Kernels(xp))
    from polywhiten.cpu import is_available

    if not is_available():
        return NumPyBackend(Kernels(xp))
    from polywhiten.cpu.numpy_kernels import NumPyKernels

    return NumPyBackend(NumPyKernels(xp))


def framework_module(cls: type) -> str | None:
    """Name of the module, by now imported, that serves arrays of `cls`; None where no framework of `BACKENDS` does."""
    for base in cls.__mro__:
        module = BACKENDS.get(base.__module__.partition(".")[0])
        if module is not None:
            return importlib.import_module(module).__name__
    return None
