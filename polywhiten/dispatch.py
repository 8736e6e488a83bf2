"""The backend of an array: found from the array's type, imported when its arrays first arrive."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from array_api_compat import array_namespace, is_numpy_namespace

from polywhiten._types import Array, Namespace
from polywhiten.compiled import is_available
from polywhiten.kernels import Kernels
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

    def tensor(self, x: Array) -> Array:
        """X itself, or the tensor that a framework's variable holds."""
        return x

    def snapshot(self, state: Array, *given: Array | None) -> Array:
        """A layer's state, or a copy where it may change in place while the gradient of `given` still needs it."""
        return state

    def in_memory_order(self, x: Array, axis: int) -> tuple[Array, int, Callable[[Array], Array]]:
        """A view of x with its axes as they lie in memory, its channel axis, and what puts a result's axes back.

        For frameworks whose tensors can be channels-last in memory alone.
        """
        return x, axis, lambda y: y


def backend_of(x: Array, name: str = "x") -> Backend:
    """The backend that serves x; TypeError, with the argument's name, where x is no array."""
    module = framework_module(type(x))
    if module is not None:
        backend: Backend = sys.modules[module].BACKEND
        return backend
    try:
        return Backend(_kernels(array_namespace(x)))
    except TypeError:
        raise TypeError(
            f"{name} is a {type(x).__module__}.{type(x).__qualname__}: pass an array, for example numpy.asarray({name})"
        ) from None


@cache
def _kernels(xp: Namespace) -> Kernels:
    """Compiled ones for NumPy, where that is possible; the array API's for all others."""
    if not (is_numpy_namespace(xp) and is_available()):
        return Kernels(xp)
    from polywhiten.compiled.kernels import NumPyKernels

    return NumPyKernels(xp)


def framework_module(cls: type) -> str | None:
    """Name of the module, by now imported, that serves arrays of `cls`; None where no framework of `BACKENDS` does."""
    for base in cls.__mro__:
        module = BACKENDS.get(base.__module__.partition(".")[0])
        if module is not None:
            return importlib.import_module(module).__name__
    return None
