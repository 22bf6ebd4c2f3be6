"""Sphinx: ``python -m sphinx -W --keep-going -b html docs docs/_build/html``. Every page with code is executed."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The checkout is what the pages describe and run, whatever is installed beside it.
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
os.environ["OMP_NUM_THREADS"] = "1"  # the tensors are small: more threads only wait for each other
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's, which Pyro imports

from docutils import nodes  # noqa: E402

import pyrovae  # noqa: E402
from pyrovae.app.report.words import mathml  # noqa: E402

project, author = "pyrovae", "the pyrovae authors"
copyright = author
version = release = pyrovae.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode", "myst_nb"]
exclude_patterns = ["_build"]
html_math_renderer = "mathml"
html_theme, html_title = "furo", f"pyrovae {version}"
html_show_copyright = False
html_static_path, html_css_files = ["_static"], ["pages.css"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"show-inheritance": True}
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_execution_show_tb = True


def show_math(translator, node):
    """MathML, which browsers draw by themselves: no script, no network."""
    block = node.tagname == "math_block"
    tex = node.astext()
    if block and ("&" in tex or r"\\" in tex) and r"\begin" not in tex:
        tex = rf"\begin{{split}}{tex}\end{{split}}"
    formula = mathml(tex, display="block" if block else "inline")
    translator.body.append(f'<div class="math">{formula}</div>' if block else f'<span class="math">{formula}</span>')
    raise nodes.SkipNode


def keep_options(app, page, template, context, doctree):
    """An option breaks nowhere: after the first of its dashes it would read as another word."""
    body = context.get("body", "")
    context["body"] = body.replace('<span class="pre">--', '<span class="pre option">--')


def setup(app):
    """Equations are rendered while the pages are built."""
    app.add_html_math_renderer("mathml", (show_math, None), (show_math, None))
    app.connect("html-page-context", keep_options)
