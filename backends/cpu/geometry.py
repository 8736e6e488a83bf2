"""How compiled kernels divide arrays and memory, computed in Python for the host.

A call from Python would compile these small functions in every process, which takes longer than all that they do.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

from numba.core.dispatcher import Dispatcher

from polywhiten.cpu.device import newton, panels, prefetch
from polywhiten.cpu.device.panels import Layout


@cache
def in_python(function: Dispatcher) -> Callable[..., Any]:
    """Return a compiled function as Python's own, and so those that it calls."""
    code, names = function.py_func.__code__, function.py_func.__globals__
    called = {name: names[name] for name in code.co_names if name in names}
    called = {name: in_python(value) if isinstance(value, Dispatcher) else value for name, value in called.items()}
    return FunctionType(code, called | {"__builtins__": builtins})


padded: Callable[[int], int] = in_python(panels.padded)
is_interleaved: Callable[[Layout], bool] = in_python(panels.is_interleaved)
num_newton_phases: Callable[[int, bool], int] = in_python(newton.num_phases)
newton_workspace_size: Callable[[int, bool], int] = in_python(newton.workspace_size)
newton_iterates_size: Callable[[int, int], int] = in_python(newton.iterates_size)
_panel_width_for_runs: Callable[[Layout], int] = in_python(panels.panel_width_for_runs)
_panel_workspace_size: Callable[[int], int] = in_python(panels.panel_workspace_size)
prefetch_list_size: Callable[[int], int] = in_python(prefetch.prefetch_list_size)


def num_panels(layout: Layout) -> int:
    """Return how many panels a block has."""
    return -(-layout.outer * layout.inner // _panel_width_for_runs(layout))


def panel_workspace_size(d: int) -> int:
    """Return how many elements a worker's panels take, and its list of what to prefetch."""
    return _panel_workspace_size(d) + prefetch_list_size(d)
