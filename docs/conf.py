"""The settings of Sphinx. ./launch/docs.sh builds the pages and serves them."""

import os
import re
from typing import Any

from sphinx.application import Sphinx

import ranktuner_jax

os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"

# The source folder is the repository, so that links between its Markdown files are the same here
# as where the files are read as they are. Links to other files become downloads.
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/api/*.md", "docs/*.ipynb", "launch/*.md"]
exclude_patterns = [
    *(".*", "**/.*", "*.egg-info", "build", "dist", "runs"),
    *("configs", "examples", "ranktuner_jax", "tests"),
]

project = "ranktuner_jax"
version = release = ranktuner_jax.__version__
html_theme = "furo"
html_title = f"{project} {version}"
html_show_copyright = False
html_show_sphinx = False

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # A test runs the notebook; the outputs are those in the file.

autodoc_mock_imports = ["tunix", "kauldron", "haliax", "levanter", "maxtext"]
autodoc_default_options = {"members": True, "imported-members": True}
autodoc_member_order = "groupwise"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
# Attributes say their dtypes in words; shapes such as "*B T" are not reStructuredText.
napoleon_attr_annotations = False


# Docstrings are plain text with code as in Markdown: this is what reStructuredText would misread.
_EXAMPLE = r"(?P<example>^ *>>> .*(?:\n.+)*)"
_BLOCK = r"(?P<block>(?<=\n\n)(?: {4}.*\n+)+)"
_CODE = r"`+(?P<code>[^`]+)`+"
_MARKUP = re.compile(rf"{_EXAMPLE}|{_BLOCK}|{_CODE}|[*|]|_(?!\w)", re.MULTILINE)


def _restructured(found: re.Match[str]) -> str:
    if found["example"]:
        return found[0]
    if found["block"]:
        return f"::\n\n{found[0]}"
    if found["code"]:
        literal = f"``{' '.join(found['code'].split())}``"
        return literal + "\\ " * found.string[found.end() : found.end() + 1].isalnum()
    return f"\\{found[0]}"


def read_docstring(
    app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]
) -> None:
    """Makes reStructuredText of the lines of a docstring."""
    lines[:] = _MARKUP.sub(_restructured, "\n".join(lines)).split("\n")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", read_docstring, priority=400)
