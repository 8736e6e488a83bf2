"""A layer as one call in the graphs of torch.fx, which its tracers make of PyTorch's own layers alone."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy


class LeafModule(nn.Module):
    """A module that every tracer of torch.fx records as a `call_module`, and none looks into.

    Tracers ask for a module's leaf-ness by its class's place in `torch.nn`, or have lists of their own: nowhere can a
    class say it of itself. Here the call does, before any hook and any subclass' `forward` sees the tracer's proxy; the
    tracer still follows, in `Tracer.call_module`, which module is called.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, or record the call where an argument is a proxy."""
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, Proxy):
                return _record(argument.tracer, self, args, kwargs)
        return super().__call__(*args, **kwargs)


def _record(tracer: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def leaf(*args: Any, **kwargs: Any) -> Any:
        return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)

    return tracer.call_module(module, leaf, args, kwargs)
