"""The array libraries that the conformance suite runs on, one row for each; a new backend adds one."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from layers import FlaxLayers, KerasLayers, TorchLayers

import polywhiten as pw

Gradients = tuple[Any, Any, Any]

_HAS_ML_DTYPES = importlib.util.find_spec("ml_dtypes") is not None


def _by_pullback(name: str, arguments: dict[str, Any], dy: Any) -> tuple[Any, Gradients]:
    """Return value and gradients of a function of `polywhiten`, for libraries without automatic differentiation."""
    y, pullback = getattr(pw, f"{name}_vjp")(**arguments)
    return y, pullback(dy)


def _by_torch(name: str, arguments: dict[str, Any], dy: Any) -> tuple[Any, Gradients]:
    import torch

    given = {k: arguments[k] for k in ("x", "weight", "bias") if arguments.get(k) is not None}
    leaves = {k: v.detach().requires_grad_() for k, v in given.items()}  # which keep the strides
    y = getattr(pw, name)(**{**arguments, **leaves})
    gradients = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    return y.detach(), (gradients["x"], gradients.get("weight"), gradients.get("bias"))


def _by_tensorflow(name: str, arguments: dict[str, Any], dy: Any) -> tuple[Any, Gradients]:
    import tensorflow as tf

    leaves = {k: arguments[k] for k in ("x", "weight", "bias") if arguments.get(k) is not None}
    with tf.GradientTape() as tape:
        tape.watch(list(leaves.values()))
        y = getattr(pw, name)(**arguments)
    given = tape.gradient(y, leaves, dy)
    return y, (given["x"], given.get("weight"), given.get("bias"))


def _tensorflow_array(a: np.ndarray) -> Any:
    import tensorflow as tf

    return tf.convert_to_tensor(a)


def _by_jax(name: str, arguments: dict[str, Any], dy: Any) -> tuple[Any, Gradients]:
    import jax

    leaves = {k: arguments[k] for k in ("x", "weight", "bias") if arguments.get(k) is not None}
    y, pullback = jax.vjp(lambda leaves: getattr(pw, name)(**{**arguments, **leaves}), leaves)
    (given,) = pullback(dy)
    return y, (given["x"], given.get("weight"), given.get("bias"))


def _torch_array(a: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(a)  # which keeps the strides


def _jax_array(a: np.ndarray) -> Any:
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax.numpy.asarray(a)


def _cupy_array(a: np.ndarray) -> Any:
    import cupy

    return cupy.asarray(a)


def _numpy_of_cupy(a: Any) -> np.ndarray:
    return a.get()


def _no_cupy_device() -> str | None:
    import cupy

    return None if cupy.cuda.is_available() else "CuPy sees no CUDA device"


def _torch_cuda_array(a: np.ndarray) -> Any:
    import torch

    if _HAS_ML_DTYPES:
        importlib.import_module("ml_dtypes")  # importing it registers bfloat16 with NumPy
    if a.dtype.name != "bfloat16":
        return torch.from_numpy(a).cuda()
    return torch.from_numpy(a.view("int16")).cuda().view(torch.bfloat16)


def _numpy_of_torch(a: Any) -> np.ndarray:
    import torch

    a = a.cpu()
    return a.numpy() if a.dtype is not torch.bfloat16 else a.view(torch.int16).numpy().view("bfloat16")


def _no_torch_device() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "PyTorch sees no CUDA device"


def _jax_cuda_array(a: np.ndarray) -> Any:
    import jax

    return jax.device_put(_jax_array(a), jax.devices("cuda")[0])


def _no_jax_device() -> str | None:
    import jax

    try:
        jax.devices("cuda")
    except RuntimeError as error:
        return f"JAX sees no CUDA device: {error}"
    return None


def _dask_array(a: np.ndarray) -> Any:
    """Return an array in chunks along every axis of more than one element."""
    import dask.array as da

    return da.from_array(a, chunks=tuple(max(1, n // 2) for n in a.shape))


@dataclass(frozen=True)
class Row:
    """How the suite uses a library: its arrays, its layers, or both."""

    module: str
    array: Callable[[np.ndarray], Any] | None = None
    gradients: Callable[[str, dict[str, Any], Any], tuple[Any, Gradients]] = _by_pullback
    numpy: Callable[[Any], np.ndarray] = np.asarray
    dtypes: tuple[str, ...] = ("float16", "float32", "float64")
    layers: TorchLayers | KerasLayers | FlaxLayers | None = None
    keras_backend: str | None = None  # the backend that Keras has to use
    takes_numpy: bool = False  # whether the library's own functions convert NumPy's arrays
    given_to_numpy: bool = False  # whether NumPy's functions convert the library's arrays
    no_device: Callable[[], str | None] | None = None  # for rows that need a GPU: returns why there is none, or None

    @property
    def missing(self) -> str | None:
        """The reason why the row can't run, or None if it can."""
        if self.keras_backend not in (None, os.environ.get("KERAS_BACKEND", "tensorflow")):
            return f"KERAS_BACKEND isn't {self.keras_backend}"
        for module in (self.keras_backend, self.module):
            try:
                importlib.import_module(module or "numpy")
            except ModuleNotFoundError:
                return f"{module} is not installed"
        return None


def _strict_array(a: np.ndarray) -> Any:
    import array_api_strict

    return array_api_strict.asarray(a)


class Library(Enum):
    """The rows; `pytest --library NAME` selects one by its name."""

    NUMPY = Row("numpy", np.asarray, takes_numpy=True, given_to_numpy=True)
    STRICT = Row("array_api_strict", _strict_array, dtypes=("float32", "float64"), given_to_numpy=True)
    TORCH = Row("torch", _torch_array, _by_torch, layers=TorchLayers())
    TENSORFLOW = Row(
        "tensorflow",
        _tensorflow_array,
        _by_tensorflow,
        dtypes=("bfloat16", "float16", "float32", "float64"),
        takes_numpy=True,
        given_to_numpy=True,
    )
    JAX = Row(
        "jax",
        _jax_array,
        _by_jax,
        dtypes=("bfloat16", "float16", "float32", "float64"),
        takes_numpy=True,
        given_to_numpy=True,
    )
    DASK = Row("dask.array", _dask_array, takes_numpy=True)
    CUPY = Row("cupy", _cupy_array, numpy=_numpy_of_cupy, no_device=_no_cupy_device)
    TORCH_CUDA = Row(
        "torch",
        _torch_cuda_array,
        _by_torch,
        _numpy_of_torch,
        ("bfloat16", *Row.dtypes) if _HAS_ML_DTYPES else Row.dtypes,
        layers=TorchLayers("cuda"),
        no_device=_no_torch_device,
    )
    JAX_CUDA = Row(
        "jax",
        _jax_cuda_array,
        _by_jax,
        dtypes=("bfloat16", "float16", "float32", "float64"),
        takes_numpy=True,
        given_to_numpy=True,
        no_device=_no_jax_device,
    )
    FLAX = Row("flax", layers=FlaxLayers())
    KERAS_TENSORFLOW = Row("keras", layers=KerasLayers(), keras_backend="tensorflow")
    KERAS_JAX = Row("keras", layers=KerasLayers(), keras_backend="jax")
    KERAS_TORCH = Row("keras", layers=KerasLayers(), keras_backend="torch")

    @property
    def option(self) -> str:
        return self.name.lower().replace("_", "-")

    def array(self, a: np.ndarray | None) -> Any:
        """Return an array of the library with the values of a, or None for None."""
        return None if a is None else self.value.array(a)

    def numpy(self, a: Any) -> np.ndarray:
        """Return the library's array a as a NumPy array."""
        return self.value.numpy(a)

    def call(self, name: str, **arguments: Any) -> np.ndarray:
        """Call a function of `polywhiten` on this library's arrays, and return the result as a NumPy array."""
        result = getattr(pw, name)(**self._converted(arguments))
        assert type(result) is type(self.array(np.zeros(1))), "a function returns the library's own arrays"
        return self.numpy(result)

    def vjp(self, name: str, dy: np.ndarray, **arguments: Any) -> tuple[np.ndarray, list[np.ndarray | None]]:
        """Return value and gradients (x, weight, bias), as users of the library compute them, as NumPy arrays."""
        y, gradients = self.value.gradients(name, self._converted(arguments), self.array(dy))
        return self.numpy(y), [None if g is None else self.numpy(g) for g in gradients]

    def _converted(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {k: self.array(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
