"""The decorator of the functions that kernels call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from numba import types
from numba.core.registry import CPUDispatcher

from polywhiten.cpu.device.linked_code import LinkedCompiler


class _DeviceFunction(CPUDispatcher):  # type: ignore[misc]
    """A function that is compiled once for all arguments of the same types.

    Numba would compile it for the literal 0 too, which has a type of its own, where a variable begins with it.
    """

    def get_call_template(self, args: Any, kws: Any) -> Any:
        args = tuple(map(types.unliteral, args))
        return super().get_call_template(args, {name: types.unliteral(kind) for name, kind in kws.items()})


def device_function(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Let kernels call a function; decorate it with this, or with this and options of `numba.njit`.

    Numba adds two functions to each compiled one, for callers in Python and in C, and compiles them too: a tenth of the
    time that the first use takes. Kernels don't need them. Python would crash if it called such a function: `geometry`
    has those that it needs.
    """
    if function is None:
        return partial(device_function, **options)
    options |= {"nopython": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return _DeviceFunction(function, targetoptions=options, pipeline_class=LinkedCompiler)
