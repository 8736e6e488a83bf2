"""Gives every framework's layers one interface: PyTorch's arguments, inputs (N, C, ...), and NumPy arrays."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

Gradients = tuple[np.ndarray, np.ndarray, np.ndarray]


class TorchLayers:
    """The layers of `polywhiten.torch` on a device."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device

    def iter_norm(self, channels: int, dtype: str = "float64", **arguments: Any) -> Any:
        import torch

        from polywhiten.torch import IterNorm

        return IterNorm(channels, device=self._device, dtype=getattr(torch, dtype), **arguments)

    def group_whitening(self, num_groups: int, channels: int, dtype: str = "float64", **arguments: Any) -> Any:
        import torch

        from polywhiten.torch import GroupWhitening

        return GroupWhitening(num_groups, channels, device=self._device, dtype=getattr(torch, dtype), **arguments)

    def train(self, layer: Any, x: np.ndarray) -> np.ndarray:
        return layer.train()(self._tensor(x)).detach().cpu().numpy()

    def evaluate(self, layer: Any, x: np.ndarray) -> np.ndarray:
        return layer.eval()(self._tensor(x)).detach().cpu().numpy()

    def gradients(self, layer: Any, x: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, Gradients]:
        """Return the output of a training step, and the gradients of x, weight and bias."""
        import torch

        leaf = self._tensor(x).requires_grad_()
        y = layer.train()(leaf)
        gradients = torch.autograd.grad(y, [leaf, layer.weight, layer.bias], self._tensor(dy))
        return y.detach().cpu().numpy(), tuple(g.cpu().numpy() for g in gradients)

    def running(self, layer: Any) -> dict[str, np.ndarray]:
        return {k.removeprefix("running_"): v.cpu().numpy().copy() for k, v in layer.named_buffers() if "running" in k}

    def _tensor(self, x: np.ndarray) -> Any:
        import torch

        return torch.from_numpy(x).to(self._device)


class KerasLayers:
    """The layers of `polywhiten.keras` on Keras' current backend."""

    def iter_norm(
        self, channels: int, dtype: str = "float64", momentum: float = 0.1, affine: bool = True, **arguments: Any
    ) -> Any:
        from polywhiten.keras import IterNorm

        del channels  # Keras layers find the number of channels in their first input
        renamed = _by_keras_names(arguments)
        return IterNorm(axis=1, momentum=1 - momentum, center=affine, scale=affine, dtype=dtype, **renamed)

    def group_whitening(self, num_groups: int, channels: int, dtype: str = "float64", **arguments: Any) -> Any:
        from polywhiten.keras import GroupWhitening

        del channels
        return GroupWhitening(num_groups, axis=1, dtype=dtype, **_by_keras_names(arguments))

    def train(self, layer: Any, x: np.ndarray) -> np.ndarray:
        return self._numpy(layer(self._tensor(x), training=True))

    def evaluate(self, layer: Any, x: np.ndarray) -> np.ndarray:
        return self._numpy(layer(self._tensor(x), training=False))

    def gradients(
        self, layer: Any, x: np.ndarray, dy: np.ndarray, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, Gradients]:
        """Return the output of a training step, and the gradients of x, gamma and beta."""
        import keras

        given = self._tensor(x), self._tensor(dy)
        layer.build(x.shape)
        options = {} if mask is None else {"mask": self._tensor(mask)}
        if layer.non_trainable_variables:  # IterNorm has averages; GroupWhitening takes no argument `training`
            options["training"] = True
        y, gradients = getattr(self, f"_by_{keras.backend.backend()}")(layer, *given, options)
        return self._numpy(y), tuple(self._numpy(g) for g in gradients)

    def running(self, layer: Any) -> dict[str, np.ndarray]:
        moving = [w for w in layer.weights if w.name.startswith("moving_")]
        return {w.name.removeprefix("moving_"): self._numpy(w).copy() for w in moving}

    def _by_tensorflow(self, layer: Any, x: Any, dy: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, **options)
        return y, tape.gradient(y, [x, layer.gamma.value, layer.beta.value], dy)

    def _by_jax(self, layer: Any, x: Any, dy: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        import jax

        frozen = [w.value for w in layer.non_trainable_variables]

        def call(x: Any, gamma: Any, beta: Any) -> Any:
            return layer.stateless_call([gamma, beta], frozen, x, **options)[0]

        y, pullback = jax.vjp(jax.jit(call), x, layer.gamma.value, layer.beta.value)
        return y, pullback(dy)

    def _by_torch(self, layer: Any, x: Any, dy: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        import torch

        x = x.requires_grad_()
        y = layer(x, **options)
        return y, torch.autograd.grad(y, [x, layer.gamma.value, layer.beta.value], dy)

    def _tensor(self, x: np.ndarray) -> Any:
        import keras

        if keras.backend.backend() == "jax":
            importlib.import_module("jax").config.update("jax_enable_x64", True)
        return keras.ops.convert_to_tensor(x)

    def _numpy(self, tensor: Any) -> np.ndarray:
        import keras

        return np.asarray(keras.ops.convert_to_numpy(tensor))


class FlaxLayers:
    """The layers of `polywhiten.flax`."""

    def iter_norm(
        self, channels: int, dtype: str = "float64", momentum: float = 0.1, affine: bool = True, **arguments: Any
    ) -> Any:
        from polywhiten.flax import IterNorm

        options = {"axis": 1, "momentum": 1 - momentum, "use_bias": affine, "use_scale": affine}
        return self._made(IterNorm, dtype, channels, **options, **_by_keras_names(arguments))

    def group_whitening(self, num_groups: int, channels: int, dtype: str = "float64", **arguments: Any) -> Any:
        from polywhiten.flax import GroupWhitening

        return self._made(GroupWhitening, dtype, channels, num_groups, **_by_keras_names(arguments))

    def train(self, layer: Any, x: np.ndarray) -> np.ndarray:
        layer.train()
        return self._compiled(layer, x)

    def evaluate(self, layer: Any, x: np.ndarray) -> np.ndarray:
        layer.eval()
        return self._compiled(layer, x)

    def gradients(self, layer: Any, x: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, Gradients]:
        """Return the output of a training step, and the gradients of x, scale and bias."""
        import jax
        from flax import nnx

        layer.train()
        graph, parameters, averages = nnx.split(layer, nnx.Param, ...)

        @jax.jit
        def step(parameters: Any, averages: Any, x: Any, dy: Any) -> Any:
            call = lambda parameters, x: self._called(nnx.merge(graph, parameters, averages, copy=True), x)
            y, pullback = jax.vjp(call, parameters, x)
            return y, *pullback(dy)

        y, given, dx = step(parameters, averages, x, dy)
        return np.asarray(y), tuple(np.asarray(g) for g in (dx, given["scale"][...], given["bias"][...]))

    def running(self, layer: Any) -> dict[str, np.ndarray]:
        from flax import nnx

        return {name: np.array(average[...]) for name, average in nnx.state(layer, nnx.BatchStat).items()}

    def _made(self, kind: Any, dtype: str, *sizes: int, **arguments: Any) -> Any:
        import jax
        from flax import nnx

        jax.config.update("jax_enable_x64", True)
        return kind(*sizes, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0), **arguments)

    def _compiled(self, layer: Any, x: np.ndarray) -> np.ndarray:
        from flax import nnx

        return np.asarray(nnx.jit(self._called)(layer, x))

    def _called(self, layer: Any, x: Any) -> Any:
        """Call a layer; group whitening has the channels at the last axis, as all of Flax."""
        if hasattr(layer, "axis"):
            return layer(x)
        return layer(x.swapaxes(1, -1)).swapaxes(1, -1)


def _by_keras_names(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments by the names that Keras gives them, and we in Flax."""
    return {name.replace("eps", "epsilon"): value for name, value in arguments.items()}
