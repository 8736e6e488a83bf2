"""Decide into which layers the normalization layers of a network can be folded, and compute these layers' weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.fx import Node
from torch.nn.utils import parametrize

from polywhiten.torch.networks.affine import LINEAR_LAYERS, TRANSPOSED, AffineMap, LinearWeights
from polywhiten.torch.networks.copies import modules_in_containers
from polywhiten.torch.networks.graph import Trace, has_hooks

_METHODS = "forward", "_conv_forward"


class Foldable(NamedTuple):
    """A normalization layer that is an affine map in evaluation.

    Attributes
    ----------
    map : AffineMap
    activates : bool
        Whether the layer applies an activation after the map.
    """

    map: AffineMap
    activates: bool


def peculiarity(module: nn.Module) -> str:
    """Return what a module does beside the `forward` of its class, such as "has hooks"; "" for most."""
    if has_hooks(module):
        return "has hooks"
    if parametrize.is_parametrized(module):
        return "has parametrizations"
    return "has a forward of its own" if "forward" in vars(module) else ""


class FoldPlan:
    """What to fold into which layers. A plan changes nothing of the network.

    Parameters
    ----------
    model : Module
    layers : mapping
        The layers to fold.

    Attributes
    ----------
    hosts : dict of Module to Module
        The convolution or linear layer that each of these layers is folded into.
    weights : dict of Module to LinearWeights
        The new weights of those layers.
    objections : dict of Module to str
        Why the other layers that traces have can't be folded.
    """

    def __init__(self, model: nn.Module, layers: Mapping[nn.Module, Foldable]) -> None:
        self.layers = layers
        self._in_containers = modules_in_containers(model)
        self._names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._names.setdefault(module, []).append(name)
        self.hosts: dict[nn.Module, nn.Module] = {}
        self.weights: dict[nn.Module, LinearWeights] = {}
        self.objections: dict[nn.Module, str] = {}

    def name(self, module: nn.Module) -> str:
        """Return the first name that a module has in the network."""
        return self._names[module][0]

    def add(self, trace: Trace) -> None:
        """Fold the layers that a trace calls, as far as possible."""
        for node, layer in trace.calls.items():
            if layer in self.layers and layer not in self.hosts:
                objections = self._fold(trace, node, layer)
                if layer not in self.hosts:
                    found = [objection for objection in objections if objection]
                    self.objections[layer] = "; ".join(found) or "no convolution or linear layer is next to it"

    def _fold(self, trace: Trace, node: Node, layer: nn.Module) -> list[str]:
        """Fold a layer into the one before it or else the one after it, and return what forbids it."""
        if objection := self._use_objection(trace, layer):
            return [f"it {objection}"]
        if len(node.args) + len(node.kwargs) > 1:  # the identity in its place would take no mask
            return ["it is called with a mask"]

        def passes(module: nn.Module) -> bool:
            if module in self.hosts:
                return not self.layers[module].activates
            return type(module) is nn.Identity and not (self._use_objection(trace, module) or peculiarity(module))

        host, objection = trace.before(node, passes)
        objections = [self._fold_into(trace, layer, host, objection, is_before=True)]
        if layer not in self.hosts and not self.layers[layer].activates:
            host, objection = trace.after(node, passes)
            objections.append(self._fold_into(trace, layer, host, objection, is_before=False))
        return objections

    def _fold_into(
        self, trace: Trace, layer: nn.Module, host: nn.Module | None, objection: str, *, is_before: bool
    ) -> str:
        """Fold a layer into a host, which may be no suitable one, and return what forbids it."""
        if host is None or not isinstance(host, LINEAR_LAYERS):
            return ""
        described = f"{self.name(host)} {'before' if is_before else 'after'} it "
        objection = objection or self._use_objection(trace, host) or _class_objection(host)
        if objection:
            return described + objection
        affine, weights = self.layers[layer].map, self.weights.get(host) or LinearWeights.of(host)
        channels = weights.outputs if is_before else weights.inputs
        if channels != affine.channels:
            return described + f"has {channels} channels"
        size = channels // weights.groups
        if not affine.stays_within(size):
            return described + f"has groups of {size} channel{'s' * (size > 1)}, of which this layer mixes several"
        if not is_before and affine.offset.any() and _adds_zeros(host):
            return described + "pads its input with zeros, which would have to change"
        weights = weights.then(affine) if is_before else weights.after(affine)
        if not weights.fits(host.weight.dtype):
            return described + f"would get weights that are not finite in {host.weight.dtype}"
        self.hosts[layer], self.weights[host] = host, weights
        return ""

    def _use_objection(self, trace: Trace, module: nn.Module) -> str:
        if len(self._names[module]) > 1:
            return f"has several names, {' and '.join(self._names[module][:2])}"
        if module in self._in_containers:
            return f"is also in the attribute {self._in_containers[module]}"
        return "" if module in trace.called_once else "is used more than once"


def _class_objection(host: nn.Module) -> str:
    """Return why a layer may compute something else than its class in `torch.nn`; "" if it doesn't."""
    base: Any = next(cls for cls in LINEAR_LAYERS if isinstance(host, cls))
    overridden = any(getattr(type(host), method, None) is not getattr(base, method, None) for method in _METHODS)
    return f"has a class, {type(host).__name__}, with a forward of its own" if overridden else peculiarity(host)


def _adds_zeros(host: Any) -> bool:
    """Return whether some outputs of a layer don't get each of its weights times an input, but zeros for some."""
    if isinstance(host, nn.Linear):
        return False
    is_pointwise = all(size == 1 for size in host.kernel_size)
    if isinstance(host, TRANSPOSED):
        return not is_pointwise or any(step != 1 for step in host.stride) or any(host.output_padding)
    if host.padding_mode != "zeros" or host.padding == "valid":
        return False
    return not is_pointwise if host.padding == "same" else any(host.padding)
