"""The rules of the source tree: which module may import which, and how long files and functions may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORE, BACKENDS = ROOT / "polywhiten", ROOT / "backends"
BACKEND_NAMES = {folder.name for folder in BACKENDS.iterdir() if (folder / "__init__.py").is_file()}
FRAMEWORKS = {"cupy", "dask", "faiss", "flax", "jax", "keras", "numba", "onnx", "tensorflow", "torch"}

# What a backend may import of others: compiled kernels for CPUs, and layers the frameworks that they run on.
SHARED_BACKENDS = {"cpu"}
USED_BY = {"flax": {"jax"}, "keras": {"jax", "tensorflow", "torch"}}

MAX_CORE_LINES = 8900  # more than a quarter of them docstrings
MAX_FUNCTION_LINES = 60  # without its docstring
MAX_FILE_LINES = 350  # without its docstrings


def module_name(path: Path) -> str:
    """Return the name under which a file of either folder is imported."""
    parts = path.relative_to(CORE if path.is_relative_to(CORE) else BACKENDS).with_suffix("").parts
    return ".".join(("polywhiten", *parts)).removesuffix(".__init__")


SOURCES = {
    module_name(path): (path, ast.parse(path.read_text(encoding="utf-8")))
    for folder in (CORE, BACKENDS)
    for path in sorted(folder.rglob("*.py"))
}


def imported_modules(tree: ast.Module) -> Iterator[str]:
    """Yield each of polywhiten's modules that a file imports, wherever in the file the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in SOURCES else node.module for name in submodules]
        else:
            continue
        yield from (name for name in names if name in SOURCES)


IMPORTS = {name: set(imported_modules(tree)) - {name} for name, (_, tree) in SOURCES.items()}


def backend_name(module: str) -> str | None:
    """Return the backend that a module belongs to, or None if it belongs to the core."""
    name = module.split(".")[1] if "." in module else ""
    return name if name in BACKEND_NAMES else None


def docstring_lines(tree: ast.AST) -> int:
    """Return how many lines the docstrings of a file take, or of a function with all that is defined in it."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [n.body[0] for n in ast.walk(tree) if isinstance(n, documented) and ast.get_docstring(n) is not None]
    return sum(docstring.end_lineno - docstring.lineno + 1 for docstring in docstrings)


def words(tree: ast.Module) -> Iterator[str]:
    """Yield the words of all identifiers and imports of a file, and its strings that are a name and no more."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from node.value.split(".") if node.value.replace(".", "_").isidentifier() else ()
            continue
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            value = getattr(node, field, None)
            yield from value.replace(".", "_").lower().split("_") if isinstance(value, str) else ()


def test_the_core_imports_backends_through_dispatch_alone():
    found = {
        (module, imported)
        for module, imports in IMPORTS.items()
        for imported in imports
        if backend_name(module) is None and backend_name(imported) and module != "polywhiten.dispatch"
    }
    assert not found


def test_backends_do_not_import_each_other():
    found = set()
    for module, imports in IMPORTS.items():
        importer = backend_name(module)
        allowed = {importer, None} | SHARED_BACKENDS | USED_BY.get(importer, set())
        found |= {(module, imported) for imported in imports if importer and backend_name(imported) not in allowed}
    assert not found


def reachable(module: str) -> set[str]:
    """Return all modules that importing this one imports, itself too if it is in a cycle."""
    found: set[str] = set()
    remaining = [module]
    while remaining:
        new = IMPORTS[remaining.pop()] - found
        found |= new
        remaining += new
    return found


def test_no_imports_form_a_cycle():
    assert not {module for module in SOURCES if module in reachable(module)}


def test_frameworks_are_named_in_dispatch_and_the_command_line_alone():
    named = {
        (module, word)
        for module, (_, tree) in SOURCES.items()
        if backend_name(module) is None and module != "polywhiten.dispatch" and ".cli" not in module
        for word in FRAMEWORKS.intersection(words(tree))
    }
    assert not named


def test_the_core_is_small():
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in CORE.rglob("*.py"))
    assert lines <= MAX_CORE_LINES


def test_functions_are_short():
    functions = {
        f"{module}.{node.name}": node.end_lineno - node.lineno + 1 - docstring_lines(node)
        for module, (_, tree) in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name for name, lines in functions.items() if lines > MAX_FUNCTION_LINES}


def test_files_are_short():
    files = {
        module: len(path.read_text(encoding="utf-8").splitlines()) - docstring_lines(tree)
        for module, (path, tree) in SOURCES.items()
    }
    assert not {name for name, lines in files.items() if lines > MAX_FILE_LINES}
