"""The array libraries that the conformance suite runs on, a row each: a new backend joins by adding one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

import polywhiten as pw

Gradients = tuple[Any, Any, Any]


def _by_pullback(name: str, arguments: dict[str, Any], dy: Any) -> tuple[Any, Gradients]:
    """The value and gradients of a function of `polywhiten` for libraries without automatic differentiation."""
    y, pullback = getattr(pw, f"{name}_vjp")(**arguments)
    return y, pullback(dy)


def _by_torch(name: str, arguments: dict[str, Any], dy: Any) -> tuple[Any, Gradients]:
    import torch

    leaves = {k: arguments[k].clone().requires_grad_() for k in ("x", "weight", "bias") if arguments.get(k) is not None}
    y = getattr(pw, name)(**{**arguments, **leaves})
    given = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    return y.detach(), (given["x"], given.get("weight"), given.get("bias"))


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

    return torch.from_numpy(a)  # with its strides


def _jax_array(a: np.ndarray) -> Any:
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax.numpy.asarray(a)


def _dask_array(a: np.ndarray) -> Any:
    """Chunked along every axis that has more than one element."""
    import dask.array as da

    return da.from_array(a, chunks=tuple(max(1, n // 2) for n in a.shape))


class _TorchLayers:
    """The layers of `polywhiten.torch`, driven as every framework's layers are driven here."""

    def iter_norm(self, channels: int, dtype: str = "float64", **arguments: Any) -> Any:
        import torch

        from polywhiten.torch import IterNorm

        return IterNorm(channels, dtype=getattr(torch, dtype), **arguments)

    def train(self, layer: Any, x: np.ndarray) -> np.ndarray:
        return layer.train()(_torch_array(x)).detach().numpy()

    def evaluate(self, layer: Any, x: np.ndarray) -> np.ndarray:
        return layer.eval()(_torch_array(x)).detach().numpy()

    def running(self, layer: Any) -> dict[str, np.ndarray]:
        return {k.removeprefix("running_"): v.numpy().copy() for k, v in layer.named_buffers() if "running" in k}


@dataclass(frozen=True)
class Row:
    """How the suite talks to a library."""

    module: str
    array: Callable[[np.ndarray], Any]
    gradients: Callable[[str, dict[str, Any], Any], tuple[Any, Gradients]] = _by_pullback
    dtypes: tuple[str, ...] = ("float16", "float32", "float64")
    layers: Any = field(default=None)

    @property
    def installed(self) -> bool:
        try:
            importlib.import_module(self.module)
        except ModuleNotFoundError:
            return False
        return True


def _strict_array(a: np.ndarray) -> Any:
    import array_api_strict

    return array_api_strict.asarray(a)


class Library(Enum):
    """The rows by the name that `pytest --library NAME` takes."""

    NUMPY = Row("numpy", np.asarray)
    STRICT = Row("array_api_strict", _strict_array, dtypes=("float32", "float64"))
    TORCH = Row("torch", _torch_array, _by_torch, layers=_TorchLayers())
    TENSORFLOW = Row(
        "tensorflow", _tensorflow_array, _by_tensorflow, dtypes=("bfloat16", "float16", "float32", "float64")
    )
    JAX = Row("jax", _jax_array, _by_jax, dtypes=("bfloat16", "float16", "float32", "float64"))
    DASK = Row("dask.array", _dask_array)

    def array(self, a: np.ndarray | None) -> Any:
        """The library's array of a's values; None of None."""
        return None if a is None else self.value.array(a)

    def call(self, name: str, **arguments: Any) -> np.ndarray:
        """A function of `polywhiten` on this library's arrays, its result as a NumPy array."""
        result = getattr(pw, name)(**self._converted(arguments))
        assert type(result) is type(self.array(np.zeros(1))), "a function returns the library's own arrays"
        return np.asarray(result)

    def vjp(self, name: str, dy: np.ndarray, **arguments: Any) -> tuple[np.ndarray, list[np.ndarray | None]]:
        """Value and gradients (x, weight, bias), the library's own way, as NumPy arrays."""
        y, gradients = self.value.gradients(name, self._converted(arguments), self.array(dy))
        return np.asarray(y), [None if g is None else np.asarray(g) for g in gradients]

    def _converted(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {k: self.array(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
