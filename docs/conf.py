"""The site: `make docs` builds it from these pages and the docstrings."""

import re

import brelax_jax

release = brelax_jax.__version__
project = "brelax_jax"
author = copyright = "The brelax_jax authors"  # noqa: A001
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
default_role = "py:obj"

myst_heading_anchors = 4  # as GitHub makes them
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say shapes and dtypes
napoleon_use_ivar = True
napoleon_attr_annotations = False

html_theme = "sphinx_book_theme"
html_title = "brelax_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "repository_url": "https://github.com/brelax-jax/brelax_jax",
    "use_repository_button": True,
    "use_issues_button": True,
    "path_to_docs": "docs",
    "show_toc_level": 2,
    "navbar_persistent": [],  # the search is in the sidebar
}


def as_rst(app, what, name, obj, options, lines):
    """Docstrings are plain text: stars and bars are no markup, and a formula's block is literal."""
    found, kind = [], "text"
    for line in lines:
        if not line.strip():
            kind = "text"
        elif line.lstrip().startswith(">>>"):
            kind = "doctest"
        elif line.startswith("    ") and found and not found[-1]:
            kind = "formula"
            found += ["::", ""]
        found.append(escaped(line) if kind == "text" else line)
    lines[:] = found


def escaped(line):
    """A line of text whose only markup are backticks, also where a letter follows them."""
    between = re.split(r"(`[^`]*`)", line)
    between[::2] = [re.sub(r"([*|])", r"\\\1", text) for text in between[::2]]
    between[2::2] = [re.sub(r"^(?=\w)", r"\\", text) for text in between[2::2]]
    return "".join(between)


def setup(app):
    """Runs before the sections of a docstring are taken apart."""
    app.connect("autodoc-process-docstring", as_rst, priority=400)
