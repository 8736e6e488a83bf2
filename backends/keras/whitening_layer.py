"""The base class of the Keras layers: the channel axis, the solver, gamma and beta."""

from __future__ import annotations

from typing import Any

import keras
from keras import KerasTensor, constraints, initializers, ops, regularizers

from polywhiten import checks
from polywhiten.backend import Backend
from polywhiten.dispatch import backend_of
from polywhiten.notices import Framework, Notice
from polywhiten.solvers import regularized_solver

Tensor = Any  # of the backend in use


class WhiteningLayer(keras.layers.Layer):  # type: ignore[misc]  # Keras has no types
    """A layer that whitens, and applies a learned scale and shift to every channel."""

    def __init__(
        self,
        *,
        axis: int,
        epsilon: float,
        center: bool,
        scale: bool,
        beta_initializer: Any,
        gamma_initializer: Any,
        beta_regularizer: Any,
        gamma_regularizer: Any,
        beta_constraint: Any,
        gamma_constraint: Any,
        method: str,
        iterations: int | None,
        relative_epsilon: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.axis = checks.check_integer("axis", axis)
        self._method, self._iterations, self._relative_epsilon = method, iterations, relative_epsilon
        self.epsilon = epsilon
        self.center = center
        self.scale = scale
        self.beta_initializer = initializers.get(beta_initializer)
        self.gamma_initializer = initializers.get(gamma_initializer)
        self.beta_regularizer = regularizers.get(beta_regularizer)
        self.gamma_regularizer = regularizers.get(gamma_regularizer)
        self.beta_constraint = constraints.get(beta_constraint)
        self.gamma_constraint = constraints.get(gamma_constraint)
        self.gamma = None
        self.beta = None
        self.supports_masking = True
        self._notice = Notice()  # that the layer is infeasible

    @property
    def epsilon(self) -> float:
        """What is added to the diagonals of covariances; if `relative_epsilon`, a fraction of their mean variance."""
        return self._epsilon

    @epsilon.setter
    def epsilon(self, epsilon: float) -> None:
        self._epsilon = checks.check_eps(epsilon, "epsilon")
        arguments = self._method, self._iterations, self._epsilon, self._relative_epsilon
        self._solver, self._shift = regularized_solver(*arguments)

    @property
    def method(self) -> str:
        """How whiteners are computed: "newton", "minimax" or "eigh"."""
        return self._method

    @property
    def iterations(self) -> int | None:
        """Steps of the iterative methods as they were given; None for the default, and for "eigh"."""
        return self._iterations

    @property
    def relative_epsilon(self) -> bool:
        """Whether `epsilon` is a fraction of the mean variance."""
        return self._relative_epsilon

    def _build_affine(self, input_shape: tuple[int | None, ...], first_axis: int) -> int:
        """Add gamma and beta, and return the number of channels."""
        axis = checks.check_channel_axis(KerasTensor(input_shape), self.axis, first_axis)
        channels = input_shape[axis]
        assert channels is not None  # as checked
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes={axis: channels})
        for name, wanted in (("gamma", self.scale), ("beta", self.center)):
            if wanted:
                weight = self.add_weight(
                    shape=(channels,),
                    name=name,
                    initializer=getattr(self, f"{name}_initializer"),
                    regularizer=getattr(self, f"{name}_regularizer"),
                    constraint=getattr(self, f"{name}_constraint"),
                    autocast=False,
                )
                setattr(self, name, weight)
        return channels

    def _prepared(self, inputs: Tensor) -> tuple[Backend, Tensor, int, Tensor | None, Tensor | None]:
        """Return the backend, the input in the compute dtype, its channel axis from the front, gamma and beta."""
        x = ops.cast(inputs, self.compute_dtype)
        backend = backend_of(x, "inputs")
        gamma, beta = (None if weight is None else backend.tensor(weight.value) for weight in (self.gamma, self.beta))
        return backend, x, self.axis % len(x.shape), gamma, beta

    @property
    def _may_be_infeasible(self) -> bool:
        """Whether the layer takes statistics of its input in training."""
        return True

    def _take_notice(self, objection: str | None) -> None:
        """Report a pass, and what is infeasible in it, but not in code that PyTorch compiles."""
        if not _torch_compiles():
            self._notice.run(_FRAMEWORK, self, objection)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        names = ("axis", "epsilon", "center", "scale", "method", "iterations", "relative_epsilon")
        config = {name: getattr(self, name) for name in names}
        for kind, api in (("initializer", initializers), ("regularizer", regularizers), ("constraint", constraints)):
            for name in ("beta", "gamma"):
                config[f"{name}_{kind}"] = api.serialize(getattr(self, f"{name}_{kind}"))
        return {**super().get_config(), **config}


def _layers_of(network: keras.layers.Layer) -> dict[str, WhiteningLayer]:
    """Return the layers that training may find infeasible; inference, which Keras begins with, has other batches."""
    return {
        layer.path: layer
        for layer in network._flatten_layers()
        if isinstance(layer, WhiteningLayer) and layer._may_be_infeasible
    }


_FRAMEWORK = Framework(keras.layers.Layer, lambda network: network.name, _layers_of)


def _torch_compiles() -> bool:
    if keras.backend.backend() != "torch":
        return False
    import torch

    return bool(torch.compiler.is_compiling())
