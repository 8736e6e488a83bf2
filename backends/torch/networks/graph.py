"""Which module's output goes to which module, as far as torch.fx can trace a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn
from torch.fx import Graph, Node, Tracer

from polywhiten.torch.networks.affine import LINEAR_LAYERS

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


def traces(root: nn.Module, layers: Collection[nn.Module]) -> Iterator[Trace]:
    """Yield traces of a network, and of its parts where it can't be traced as a whole, that have the calls of layers.

    A module that can't be traced is one call in the trace of its parent, and its children are traced one by one. What
    it calls itself is in no trace.

    Parameters
    ----------
    root : Module
    layers : collection of Module
        The layers to look for, which are recorded as one call.
    """
    if root in layers or not _contains(root, layers):
        return
    tracer = _Tracer(layers)
    states = [(module, dict(vars(module))) for module in root.modules()]
    try:
        graph = tracer.trace(root)
        graph.lint()  # no module has stored a node that `call_module` has erased
    except Exception:  # whatever the network's code raises if it gets no tensors
        untraced = [root]
    else:
        trace = Trace(root, graph)
        yield trace
        untraced = [module for module in tracer.untraced if module in trace.calls.values()]
    finally:  # forward may have stored what isn't a tensor
        for module, state in states:
            vars(module).clear()
            vars(module).update(state)
    for parent in untraced:
        for child in parent.children():
            yield from traces(child, layers)


class _Tracer(Tracer):
    """Record layers, convolutions, PyTorch's other modules, and modules that can't be traced, as one call each."""

    def __init__(self, layers: Collection[nn.Module]) -> None:
        super().__init__()
        self._layers = layers
        self.untraced: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self._layers or isinstance(m, LINEAR_LAYERS):
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


def _contains(module: nn.Module, layers: Collection[nn.Module]) -> bool:
    return any(child in layers for child in module.modules())
