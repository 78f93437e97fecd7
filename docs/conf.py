"""Sphinx's settings: `sphinx-build -W -n -b html docs docs/_build`."""

import re

from flax import nnx
from sphinx.util import inspect as sphinx_inspect

import capsjax
import capsjax.models
import capsjax.nn

project = "capsjax"
author = copyright = "the capsjax authors"
version = release = capsjax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "jupyter_execute"]  # myst-nb writes the latter
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # the tutorial shows the outputs that are committed with it
default_role = "code"  # docstrings write code in single backquotes

html_theme = "sphinx_book_theme"
html_title = "capsjax"
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
html_theme_options = {"show_toc_level": 2, "navbar_persistent": []}

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
# Without intersphinx, whose inventories need a network, names of other projects have no target.
nitpick_ignore_regex = [
    ("py:.*", r"(jax|flax|nnx|numpy|os|collections|typing|lax)\..*"),
    ("py:.*", r"tuple\[int|Array|DTypeLike|Initializer|Mapping|Sequence|Callable|Any|Protocol"),
    ("py:.*", r"(capsjax|_arguments)\..*\b_\w+"),
]

_PUBLIC = {
    name: f"{module.__name__}.{name}"
    for module in (capsjax.models, capsjax.nn, capsjax)
    for name, value in vars(module).items()
    if callable(value)
}


def _link_public_names(app, what, name, obj, options, lines):
    """Link public names in single backquotes, and escape bars, which mark substitutions."""
    pattern = re.compile(r"(?<![`:\w])`((?:capsjax\.)?(\w+))`(?![`_])")

    def link(found):
        target = _PUBLIC.get(found[2])
        if target is None or target == name:
            return found[0]
        return f":py:obj:`{found[1]} <{target}>`"

    for index, line in enumerate(lines):
        parts = line.split("`")  # code has odd indices
        parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
        text = pattern.sub(link, "`".join(parts))
        # An argument that is described as "C." is no item of an enumeration.
        lines[index] = re.sub(r"^(\s*(?::param \w+:)?\s*[A-Z])\.(?=\s|$)", r"\1\\.", text)


def _sign_modules(app, what, name, obj, options, signature, result):
    """Give NNX modules the signature of `__init__`, which their metaclass hides."""
    if what == "class" and issubclass(obj, nnx.Module):
        own = sphinx_inspect.signature(obj.__init__, bound_method=True)
        return sphinx_inspect.stringify_signature(own, show_return_annotation=False), None
    return None


def setup(app):
    """Connect the handlers above."""
    app.connect("autodoc-process-signature", _sign_modules)
    app.connect("autodoc-process-docstring", _link_public_names)
