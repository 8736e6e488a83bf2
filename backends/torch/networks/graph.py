"""Which module's output goes to which module, as far as torch.fx can trace a network."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn
from torch.fx import Graph, Node, Tracer

from polywhiten.torch.networks.affine import LINEAR_LAYERS
from polywhiten.torch.networks.copies import copy_network

Neighbour = tuple[nn.Module | None, str]
"""The module called before or after a node, and what keeps the two from becoming one, often nothing ("")."""


class Trace:
    """The operations of one module's forward pass.

    Parameters
    ----------
    root : Module
    graph : torch.fx.Graph

    Attributes
    ----------
    calls : dict of Node to Module
        The nodes that call a module, in the order of calls.
    called_once : set of Module
        The modules that are called once, and whose parameters no operation reads directly.
    """

    def __init__(self, root: nn.Module, graph: Graph) -> None:
        targets = [(node, str(node.target)) for node in graph.nodes if node.op in ("call_module", "get_attr")]
        self.calls = {node: root.get_submodule(target) for node, target in targets if node.op == "call_module"}
        read = {root.get_submodule(target.rpartition(".")[0]) for node, target in targets if node.op == "get_attr"}
        self.called_once = {module for module, count in Counter(self.calls.values()).items() if count == 1} - read

    def before(self, node: Node, passes: Callable[[nn.Module], bool]) -> Neighbour:
        """Return the module whose output is the input of a node. Modules that pass their input on are skipped."""
        objection = ""
        while True:
            if len(node.all_input_nodes) != 1:
                return None, ""
            (node,) = node.all_input_nodes
            if len(node.users) > 1:
                objection = "has an output that is used elsewhere, too"
            module = self.calls.get(node)
            if module is None or not passes(module):
                return module, objection

    def after(self, node: Node, passes: Callable[[nn.Module], bool]) -> Neighbour:
        """Return the module that gets the output of a node. Modules that pass their input on are skipped.

        The node may become an identity only if no operation comes between, which could change its input in place.
        """
        objection = ""
        while True:
            if len(node.users) != 1:
                return None, ""
            (user,) = node.users
            if user is not node.next:
                objection = "does not follow at once"
            node = user
            module = self.calls.get(node)
            if module is None or not passes(module):
                return module, objection


def traces(network: nn.Module, layers: Collection[nn.Module]) -> Iterator[Trace]:
    """Yield traces of a network, and of its parts where it can't be traced as a whole, that have the calls of layers.

    A module that can't be traced is one call in the trace of its parent, and its children are traced one by one. What
    it calls itself is in no trace. A copy is traced, because code may store what isn't a tensor during a trace.

    Parameters
    ----------
    network : Module
    layers : collection of Module
        The layers to look for, which are recorded as one call.
    """
    names = {module: name for name, module in network.named_modules()}
    copied = copy_network(network, share_parameters=True)
    copied_layers = {copied.get_submodule(names[layer]) for layer in layers}
    for name, graph in _graphs(copied, "", copied_layers):
        yield Trace(network.get_submodule(name), graph)


def _graphs(root: nn.Module, name: str, layers: Collection[nn.Module]) -> Iterator[tuple[str, Graph]]:
    """Yield the graphs of a network's module of this name, or of its parts, with the names of these."""
    if root in layers or not _contains(root, layers):
        return
    tracer = _Tracer(layers)
    parameters = inspect.signature(root.forward).parameters.values()
    plain = type(None), bool, int, float, str
    defaults = {each.name: each.default for each in parameters if isinstance(each.default, plain)}
    try:
        graph = tracer.trace(root, defaults)  # a proxy in place of None would take the other branch of the code
        graph.lint()  # no module has stored a node that `call_module` has erased
    except Exception:  # whatever the network's code raises if it gets no tensors
        parts = [*root.children()]
    else:
        yield name, graph
        called = [root.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"]
        parts = [module for module in called if has_hooks(module)]  # which a trace of themselves doesn't call
        parts += [child for module in called if module in tracer.untraced for child in module.children()]
    names = {module: child_name for child_name, module in root.named_modules()}
    for part in dict.fromkeys(parts):
        yield from _graphs(part, f"{name}.{names[part]}" if name else names[part], layers)


class _Tracer(Tracer):
    """Record layers, convolutions, PyTorch's other modules, and modules that can't be traced, as one call each."""

    def __init__(self, layers: Collection[nn.Module]) -> None:
        super().__init__()
        self._layers = layers
        self.untraced: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self._layers or isinstance(m, LINEAR_LAYERS):
            return True
        if has_hooks(m):  # which must not get proxies
            return True
        return super().is_leaf_module(m, module_qualified_name) and not _contains(m, self._layers)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        before = len(self.graph.nodes)
        if m not in self.untraced:
            try:
                return super().call_module(m, forward, args, kwargs)
            except Exception:  # as above
                for node in reversed([*self.graph.nodes][before:]):
                    self.graph.erase_node(node)
                self.untraced.append(m)
        return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return super().getattr(attr, attr_val, {})  # a cache would have nodes that `call_module` has erased


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module calls hooks."""
    names = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(module, name) for name in names)


def _contains(module: nn.Module, layers: Collection[nn.Module]) -> bool:
    return any(child in layers for child in module.modules())
