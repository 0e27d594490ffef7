"""Sphinx: pages in Markdown, the reference from the docstrings. Built without a network by `make docs` into out/docs."""

from importlib import metadata

project = "lowrank_kernels"
author = "the lowrank_kernels developers"
copyright = "the lowrank_kernels developers, Apache-2.0"
release = version = metadata.version("lowrank-kernels")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "myst_parser"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["figures/made/*.md"]  # captions, which figures.md includes

html_theme = "furo"
html_title = f"lowrank_kernels {version}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
napoleon_google_docstring = True
napoleon_custom_sections = [("Source", "notes_style")]
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
_SKLEARN = "set_fit_request,set_partial_fit_request,set_predict_request,set_score_request,set_transform_request"
autodoc_default_options = {"members": True, "show-inheritance": True, "exclude-members": _SKLEARN}
add_module_names = False
suppress_warnings = ["myst.xref_missing"]  # README and CONTRIBUTING link to files of the repository
