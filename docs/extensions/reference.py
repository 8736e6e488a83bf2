"""Writes the pages of the API reference: one for each backend, and one for the command line."""

import inspect
import re
from pathlib import Path
from typing import Any

import click
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.roles import XRefRole
from sphinx.util.typing import ExtensionMetadata

import polywhiten
from polywhiten.cli.about import FOLDERS, about
from polywhiten.cli.commands import commands

PAGES = Path(__file__).parent.parent / "generated" / "reference"


def write_pages(app: Sphinx) -> None:
    """Write a page for each folder of `backends/` that is imported by users, so that new ones have theirs too."""
    PAGES.mkdir(parents=True, exist_ok=True)
    for folder in FOLDERS:
        if folder != "cpu":  # kernels for NumPy, which have no functions of their own
            write_if_changed(PAGES / f"{folder}.md", backend_page(folder))
    write_if_changed(PAGES / "command-line.md", "\n".join(["# The command line", *help_of(commands, "polywhiten")]))


def write_if_changed(path: Path, text: str) -> None:
    """Write a page, but leave it alone if it is up to date, so that Sphinx doesn't read it again."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def backend_page(folder: str) -> str:
    extras = " or ".join(f'`pip install ".[{extra}]"`' for extra in about(folder).EXTRAS)
    title = about(folder).TITLE
    module = f"polywhiten.{folder}"
    lines = [f"# {module}", "", f"In a checkout, {extras} installs polywhiten with {title}.", ""]
    lines += ["```{eval-rst}", f".. automodule:: {module}", "   :members:", "```"]
    if folder == "torch":
        lines += ["", "## polywhiten.torch.norm_layers", "", "```{eval-rst}"]
        lines += [".. automodule:: polywhiten.torch.norm_layers", "   :members:", "```"]
    return "\n".join([*lines, ""])


def help_of(command: click.Command, name: str) -> list[str]:
    """Return what a command prints for --help, and below it the same of its subcommands, as Markdown."""
    context = click.Context(command, info_name=name, max_content_width=80, terminal_width=80)
    lines = ["", "```text", command.get_help(context), "```", ""]
    for sub in command.list_commands(context) if isinstance(command, click.Group) else ():
        lines += [f"## {name} {sub}", *help_of(command.get_command(context, sub), f"{name} {sub}")]
    return lines


def skip_what_is_documented_elsewhere(
    app: Sphinx, kind: str, name: str, member: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out functions that a backend only passes on, the object BACKEND, and methods of scikit-learn's metadata."""
    if kind == "class":
        return True if name.startswith("set_") and name.endswith("_request") else None
    module = app.env.current_document.get("autodoc:module")
    is_passed_on = module != "polywhiten" and getattr(polywhiten, name, None) is member
    return True if kind == "module" and (name == "BACKEND" or is_passed_on) else None


def show_arguments_of_layers(
    app: Sphinx, kind: str, name: str, member: Any, options: Any, arguments: str | None, returned: str | None
) -> tuple[str, None] | None:
    """Give a class the arguments of its `__init__`, where a base class such as Keras' hides them by `__new__`."""
    if kind != "class" or arguments != "(*args, **kwargs)":
        return None
    _, *parameters = inspect.signature(member.__init__).parameters.values()  # without self
    empty = inspect.Parameter.empty
    return str(inspect.Signature([parameter.replace(annotation=empty) for parameter in parameters])), None


def link_as_in_markdown(app: Sphinx, kind: str, name: str, member: Any, options: Any, lines: list[str]) -> None:
    """Turn links in Markdown, which Keras' form of docstrings has, into those of reStructuredText."""
    lines[:] = [re.sub(r"\[([^]]+)\]\((https?://[^)]+)\)", r"`\1 <\2>`__", line) for line in lines]


class NameRole(XRefRole):
    """A name between single backticks in a docstring: code, and a link if it is in the reference."""

    def __init__(self) -> None:
        super().__init__(innernodeclass=nodes.literal)

    def process_link(
        self, env: Any, refnode: nodes.Element, has_explicit_title: bool, title: str, target: str
    ) -> tuple[str, str]:
        refnode["refdomain"], refnode["reftype"] = "py", "obj"
        refnode["py:module"] = env.ref_context.get("py:module")
        refnode["py:class"] = env.ref_context.get("py:class")
        return title, target


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_role("name", NameRole())
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-skip-member", skip_what_is_documented_elsewhere)
    app.connect("autodoc-process-signature", show_arguments_of_layers)
    app.connect("autodoc-process-docstring", link_as_in_markdown)
    # most names in docstrings are arguments or of other libraries, and types are prose
    app.config.nitpick_ignore_regex += [(f"py:{kind}", r"(?!polywhiten\.).*") for kind in ("obj", "class", "exc")]
    return {"parallel_read_safe": True, "parallel_write_safe": True}
