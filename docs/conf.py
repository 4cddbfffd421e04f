"""Settings of the site. `make docs` builds it from the root of the repository.

The root is the source folder, so that the pages of `benchmarks/`, the notebooks and the
files beside this folder are read where they lie, and a link means the same on the site
and on a code host.
"""

import pathlib
import sys


HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))
sys.path.insert(0, str(HERE.parent))

import fsam_optax  # noqa: E402


project = "fsam_optax"
author = "The fsam_optax authors"
copyright = "the fsam_optax authors, Apache-2.0"
version = release = fsam_optax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "site_pages",
]

root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "benchmarks/*.md",
    "notebooks/*.ipynb",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "PROMISES.md",
]
exclude_patterns = [
    "docs/_*",
    "**/.*",
    "notebooks/.ipynb_checkpoints/**",
    # Where nothing of the site lies; not walked through.
    ".*",
    "dist",
    "results",
    "tests",
]

# Markdown. Notebooks are shown as they were run and committed.
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
nb_execution_mode = "off"
nb_merge_streams = True

# Docstrings: Google style, with names between single backticks.
default_role = "literal"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = False
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

nitpicky = True  # Every link by name is to something, types in signatures apart.
nitpick_ignore_regex = [("py:class", ".*")]
# `make linkcheck` needs a network, and is not part of `make docs`.
linkcheck_timeout = 20
linkcheck_anchors = False

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = "fsam_optax"
html_static_path = ["_static"]
html_extra_path = ["_extra"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "home_page_in_toc": True,
    "navbar_persistent": [],
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
