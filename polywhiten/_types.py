"""Types that say what is meant where Python's type system cannot."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias

# Array libraries share no base class, so any checkable type would shut some of them out.
Array: TypeAlias = Any
Namespace: TypeAlias = ModuleType
# Integers; a framework's own scalars for what is unknown while it traces.
Shape: TypeAlias = tuple[Any, ...]
AllReduce: TypeAlias = Callable[[Array], Array]
