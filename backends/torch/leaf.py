"""Let the tracers of torch.fx record a layer as one call, which they do for PyTorch's own layers alone."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy


class LeafModule(nn.Module):
    """A module that every tracer of torch.fx records as one `call_module` node, without tracing its `forward`.

    Tracers treat modules as leaves if their class is defined in `torch.nn`, or if it is in a list of the tracer's user;
    a class can't declare itself a leaf. So the call of the module records the node, before any hook or `forward` gets
    the tracer's proxy. It goes through `Tracer.call_module`, where tracers note which module is called.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, or record the call if an argument is a proxy."""
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, Proxy):
                return _record(argument.tracer, self, args, kwargs)
        return super().__call__(*args, **kwargs)


def _record(tracer: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the proxy of the module's result, after the tracer has recorded the call."""

    def leaf(*args: Any, **kwargs: Any) -> Any:
        return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)

    return tracer.call_module(module, leaf, args, kwargs)
