"""Writes equations as MathML, which browsers draw without a script and so without a connection."""

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.typing import ExtensionMetadata
from sphinx.writers.html5 import HTML5Translator


def inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="equation">{mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def mathml(tex: str, as_block: bool) -> str:
    """Return an equation in MathML. Raise an error that shows the equation if it has a command that isn't known."""
    try:
        found = "".join(latex2mathml.tex2mathml(tex, as_block=as_block))
    except Exception as error:
        raise ExtensionError(f"the equation {tex!r} can't be written as MathML: {error}") from error
    found = found.replace('<mo stretchy="false">/</mo>', '<mo stretchy="false" lspace="0" rspace="0">/</mo>')
    return found.replace("<mo>'</mo>", '<mo lspace="0" rspace="0">&#x2032;</mo>')  # a prime


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
