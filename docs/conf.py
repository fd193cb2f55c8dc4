"""The documentation site, which `make docs` builds.

Its pages are the Markdown files of this repository, which a forge shows, too: the source folder is the root, so that
links between them hold in both places. The reference is made of the docstrings.
"""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent), str(DOCS.parent / "kernels")]

import reference_pages  # noqa: E402

import fastprompt  # noqa: E402

project = "fastprompt"
author = "The fastprompt authors"
project_copyright = author
version = release = fastprompt.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/reference/*.rst", "benchmarks/results/*.md"]
exclude_patterns = [".venv", "build", "runs", ".matrix"]
myst_heading_anchors = 3
highlight_language = "none"  # indented blocks are commands
default_role = "py:obj"  # `name` in a docstring: a link where there is something to link to
add_module_names = False
autosummary_generate = False
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True  # fields of a class are documented where its docstring has them

html_theme = "furo"
html_title = f"fastprompt {version}"
html_extra_path = ["site"]  # the page that leads to docs/index.html
html_static_path = ["static"]
html_css_files = ["site.css"]

(DOCS / "reference").mkdir(exist_ok=True)
for name, text in reference_pages.pages().items():
    file = DOCS / "reference" / f"{name}.rst"
    if not file.exists() or file.read_text(encoding="utf-8") != text:  # what did not change is not read again
        file.write_text(text, encoding="utf-8")


def literal_blocks(*event: object) -> None:
    """Indented blocks of docstrings are formulas or code, but for those of Google's sections."""
    lines = event[-1]
    for number in range(len(lines) - 1, 1, -1):
        above, between, here = lines[number - 2 : number + 1]
        if here[:1] == " " and not between and above[:1].strip():
            lines[number:number] = ["::", ""]


def setup(app: object) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", literal_blocks, priority=400)  # before napoleon reads the sections
