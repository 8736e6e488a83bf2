"""Builds the documentation: `nox -s docs`, or `python -m sphinx -W -n docs docs/_build/html` from the root."""

import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "extensions"), str(HERE.parent / "benchmarks")]
# The notebooks' kernels import polywhiten from the checkout too, if it isn't installed.
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
sys.path.insert(0, str(HERE.parent))
# Keras is imported on the framework that the notebooks use.
os.environ.setdefault("KERAS_BACKEND", "torch")

import polywhiten  # noqa: E402
from polywhiten.cli.about import FOLDERS, about, is_installed  # noqa: E402

project = "polywhiten"
author = copyright = "The polywhiten developers"
release = version = polywhiten.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "mathml",
    "pages_beside_code",
    "pictures",
    "reference",
    "result_tables",
]
exclude_patterns = ["_build", "extensions"]
nitpicky = True

# Pages
myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
myst_fence_as_directive = ["math"]  # as GitHub writes equations
myst_heading_anchors = 4
myst_links_external_new_tab = False
suppress_warnings = ["myst.header"]  # sections that are included from another page begin below its title

# Notebooks: Markdown without outputs, which every build runs
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

# Reference: frameworks that aren't installed are replaced by empty modules.
autodoc_mock_imports = [about(folder).MODULE for folder in FOLDERS if not is_installed(about(folder).MODULE)]
if importlib.util.find_spec("triton") is None:
    autodoc_mock_imports.append("triton")
autodoc_inherit_docstrings = False  # a method of a framework is described by the framework
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings describe the types, with shapes
napoleon_use_rtype = False
napoleon_use_param = False  # one list of parameters, whose types are prose
napoleon_use_ivar = True
napoleon_custom_sections = [("Attributes", "params_style")]  # which may be several of one type
napoleon_custom_sections += [("Call arguments", "params_style"), "Input shape", "Output shape", "Weights"]  # of Keras
default_role = "name"  # of extensions/reference.py

# Appearance
html_theme = "furo"
html_title = f"polywhiten {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "tango"
pygments_dark_style = "github-dark"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
