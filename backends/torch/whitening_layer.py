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
    """A layer that whitens tensors (N, channels, ...) and applies a learned affine map to every channel.

    Attributes
    ----------
    channels_argument : str
        Name of the subclass' argument, and attribute, with the number of channels.
    """

    channels_argument: ClassVar[str]

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        *,
        eps: float,
        affine: bool,
        bias: bool,
        method: str,
        iterations: int | None,
        relative_eps: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self._notice = Notice()  # whether the layer is infeasible
        self.eps = checks.check_eps(eps)
        self.relative_eps = relative_eps
        self.affine = affine
        self.method = method
        self._solver, self._shift = regularized_solver(method, iterations, self.eps, relative_eps)
        for name, wanted in (("weight", affine), ("bias", affine and bias)):
            values = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(name, values)

    @property
    def iterations(self) -> int | None:
        """Steps of the iterative methods; None for "eigh"."""
        return getattr(self._solver, "iterations", None)

    def reset_parameters(self) -> None:
        """Set the weight to 1 and the bias to 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
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
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        try:
            converted = {prefix + name: value for name, value in self._from_checkpoint(own).items()}
        except ValueError as error:
            error_msgs.append(f"layer {prefix[:-1]!r}: {error}" if prefix else str(error))
            return
        super()._load_from_state_dict(
            converted, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _from_checkpoint(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Return a checkpoint's entries for this layer, by their names in it, as the layer's own state."""
        return flatten_affine(entries)

    def _check_input(self, x: Tensor) -> None:
        """Raise an error if x is no floating-point tensor with this layer's number of channels."""
        if not isinstance(x, Tensor):
            if isinstance(x, Proxy):
                raise TypeError(
                    "x is a torch.fx.Proxy: torch.fx records a whitening layer as one call by the module that has it; "
                    "trace that module, or torch.nn.Sequential(layer)"
                )
            raise checks.wrong_type(x, "x", "a tensor, as torch.as_tensor(x)")
        checks.check_channels(x, getattr(self, self.channels_argument), self.channels_argument)
        checks.check_array(BACKEND.kernels.xp, x)

    def _whiten_nothing(self, x: Tensor) -> Tensor:
        """Return a tensor without elements as it is, with gradients of 0 for weight and bias."""
        y: Tensor = whiten_nothing(BACKEND, x, self.weight, self.bias, 1)
        return y

    def _take_notice(self, objection: Callable[..., str | None], *sizes: Any) -> None:
        """Note a training pass, and what makes whitening infeasible in it: the objection to inputs of these sizes.

        Compiled code can't warn, and neither can tracers whose sizes are symbols.
        """
        if self.training and not torch.compiler.is_compiling() and type(sizes[-1]) is int:
            self._notice.run(_FRAMEWORK, self, objection(*sizes))

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
