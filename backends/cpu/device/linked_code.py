"""Compile functions that only other compiled functions call, as far as linking needs it and no further.

Numba optimizes every function and makes machine code of it, although its callers link it in and are optimized as a
whole. A kernel that consists of thirty functions takes about twice as long to compile like that.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cfunc, njit, types
from numba.core.compiler import Compiler


class _Linked:
    """What differs in a library of Numba's, which holds the code of one function: it stays as Numba has written it."""

    _codegen: Any

    @property
    def codegen(self) -> _WithoutEnvironment:
        return _WithoutEnvironment()

    def _optimize_functions(self, module: Any) -> None:
        module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        """Leave that to the kernel."""

    def _finalize_final_module(self) -> None:
        self._finalized = True


class _WithoutEnvironment:
    """Leaves out what only functions with an address have: a pointer to Python's objects that they use."""

    def set_env(self, env_name: str, env: Any) -> None:
        """Do nothing."""


@cache
def _linked_library(library: type) -> Any:
    return type("LinkedLibrary", (_Linked, library), {})


class _AlwaysLinked(Compiler):  # type: ignore[misc]
    def compile_extra(self, func: Any) -> Any:
        codegen = self.state.targetctx.codegen()
        self.state.library = _linked_library(codegen._library_class)(codegen, func.__qualname__)
        return super().compile_extra(func)


class LinkedCompiler(_AlwaysLinked):
    """Numba's compiler, which writes a function for linking alone if this version of Numba allows that."""

    def compile_extra(self, func: Any) -> Any:
        """Compile a function."""
        return super().compile_extra(func) if can_link() else Compiler.compile_extra(self, func)


@cache
def can_link() -> bool:
    """Return whether this works: it is no public part of Numba, and another version may do it differently."""
    double = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, pipeline_class=_AlwaysLinked)(_double)

    def quadruple(x: int) -> Any:
        return double(double(x))

    try:
        return bool(cfunc(types.int64(types.int64))(quadruple).ctypes(3) == 12)
    except Exception:  # whatever is raised, Numba's own way remains
        return False


def _double(x: int) -> int:
    return 2 * x
