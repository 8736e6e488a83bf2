"""The base class of PyTorch's layers: weight and bias, the solver, checks of the input, and warnings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from polywhiten import checks
from polywhiten.layer_entry import whiten_nothing
from polywhiten.notices import Framework, Notice
from polywhiten.solvers import regularized_solver
from polywhiten.torch.backend import BACKEND
from polywhiten.torch.checkpoints import flatten_affine
from polywhiten.torch.leaf import LeafModule


class WhiteningLayer(LeafModule):
    """A layer that whitens tensors, (N, channels, ...) by default, and applies a learned affine map to every channel.

    Attributes
    ----------
    channels_argument : str
        Name of the subclass' argument, and attribute, with the number of channels.
    first_axis : int
        The first axis of an input that may hold channels.
    """

    channels_argument: ClassVar[str]
    first_axis: ClassVar[int] = 0

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        *,
        eps: float,
        affine: bool | str,
        bias: bool,
        method: str,
        iterations: int | None,
        relative_eps: bool,
        axis: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        weight_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self._notice = Notice()  # whether the layer is infeasible
        self._method, self._iterations, self._relative_eps = method, iterations, relative_eps
        self.eps = eps
        self.affine = affine
        self.axis = checks.check_integer("axis", axis)
        for name, shape in (("weight", weight_shape or (channels,)), ("bias", (channels,))):
            wanted = affine and (bias or name == "weight")
            values = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(name, values)

    @property
    def eps(self) -> float:
        """What is added to the diagonals of covariances; if `relative_eps`, as a fraction of their mean variance."""
        return self._eps

    @eps.setter
    def eps(self, eps: float) -> None:
        self._eps = checks.check_eps(eps)
        self._solver, self._shift = regularized_solver(self._method, self._iterations, self._eps, self._relative_eps)

    @property
    def method(self) -> str:
        """How whiteners are computed: "newton", "minimax" or "eigh"."""
        return self._method

    @property
    def relative_eps(self) -> bool:
        """Whether `eps` is a fraction of the mean variance."""
        return self._relative_eps

    @property
    def iterations(self) -> int | None:
        """Steps of the iterative methods; None for "eigh"."""
        return getattr(self._solver, "iterations", None)

    def reset_parameters(self) -> None:
        """Set the weight to 1, or its matrices to the identity, and the bias to 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
            if self.weight.ndim == 3:
                with torch.no_grad():
                    self.weight.copy_(torch.eye(self.weight.shape[-1], device=self.weight.device))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: MutableMapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the layer's entries of a checkpoint, or of one by another layer that computes the same in evaluation."""
        hooks = self._load_state_dict_pre_hooks  # which may rename entries, so they run before these are converted
        for hook in hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        try:
            converted = {prefix + name: value for name, value in self._from_checkpoint(own).items()}
        except ValueError as error:
            error_msgs.append(f"layer {prefix[:-1]!r}: {error}" if prefix else str(error))
            return
        self._load_state_dict_pre_hooks = type(hooks)()
        try:
            super()._load_from_state_dict(
                converted, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._load_state_dict_pre_hooks = hooks

    def _from_checkpoint(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Return a checkpoint's entries for this layer, by their names in it, as the layer's own state."""
        return flatten_affine(entries)

    def _check_input(self, x: Tensor) -> int:
        """Return the channel axis of x, counted from the front.

        Raise an error if x is no floating-point tensor with this layer's number of channels.
        """
        if not isinstance(x, Tensor):
            if isinstance(x, Proxy):
                raise TypeError(
                    "x is a torch.fx.Proxy: torch.fx records a whitening layer as one call by the module that has it; "
                    "trace that module, or torch.nn.Sequential(layer)"
                )
            raise checks.wrong_type(x, "x", "a tensor, as torch.as_tensor(x)")
        channels = getattr(self, self.channels_argument)
        axis = checks.check_channels(x, channels, self.channels_argument, self.axis, self.first_axis)
        checks.check_array(BACKEND.kernels.xp, x)
        return axis

    def _whiten_nothing(self, x: Tensor, axis: int) -> Tensor:
        """Return a tensor without elements as it is, with gradients of 0 for weight and bias."""
        weight: Tensor | None = self.weight
        if weight is not None and weight.ndim == 3:  # matrices, whose gradient is 0 as well
            weight = weight.sum().expand(x.shape[axis])
        y: Tensor = whiten_nothing(BACKEND, x, weight, self.bias, axis)
        return y

    def _take_notice(self, objection: Callable[..., str | None], *sizes: Any) -> None:
        """Note a training pass, and what makes whitening infeasible in it: the objection to inputs of these sizes.

        Compiled code can't warn, and neither can tracers whose sizes are symbols. A size is None if only the device
        knows it; then nothing is infeasible.
        """
        if not self.training or torch.compiler.is_compiling():
            return
        if sizes[-1] is None or type(sizes[-1]) is int:
            self._notice.run(_FRAMEWORK, self, None if sizes[-1] is None else objection(*sizes))

    def _described(self, *sizes: int, names: Sequence[str]) -> str:
        """Return the sizes and the arguments of these names, as `repr` shows them."""
        values = {name: self.bias is not None if name == "bias" else getattr(self, name) for name in names}
        return ", ".join([*map(str, sizes), *(f"{name}={value!r}" for name, value in values.items())])


def _layers_in_training(network: nn.Module) -> dict[str, nn.Module]:
    """Return the whitening layers of a network that are in training mode, by the names that warnings use."""
    return {
        f"{name} ({type(module).__name__})" if name else type(module).__name__: module
        for name, module in network.named_modules()
        if isinstance(module, WhiteningLayer) and module.training
    }


_FRAMEWORK = Framework(nn.Module, lambda network: type(network).__name__, _layers_in_training)
