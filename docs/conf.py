"""Sphinx's settings: `make site` builds the documentation into site/, and fails for a link that leads nowhere."""

from __future__ import annotations

import sys
from pathlib import Path

from mergekit_ray.core.version import __version__

sys.path.insert(0, str(Path(__file__).parents[1]))  # for docs.site_pages

project = "mergekit-ray"
author = "the mergekit-ray authors"
release = __version__
extensions = [
    "myst_parser",  # the pages are Markdown
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",  # docstrings in Google's style
    "sphinx_copybutton",
    "docs.site_pages",  # ours: what pages say of commands, recipe keys, methods and families is made from the code
]
exclude_patterns = ["*.json"]

myst_enable_extensions = ["alert"]  # GitHub's `> [!NOTE]`
myst_heading_anchors = 4  # the anchors that GitHub gives to headings
napoleon_use_ivar = True  # a class's attributes are described once, in its docstring
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True  # as they are written
autodoc_default_options = {"members": True, "exclude-members": "model_config"}
python_use_unqualified_type_names = True
smartquotes_action = "De"  # dashes and ellipses; quotes stay as they are written
default_role = "code"  # docstrings write `name` for code
copybutton_prompt_text = "$ "
highlight_language = "none"

html_theme = "furo"
html_title = "mergekit-ray"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {
    "source_repository": "https://github.com/mergekit-ray/mergekit-ray/",
    "source_branch": "main",
    "source_directory": "docs/",
    "top_of_page_buttons": ["view"],
}
