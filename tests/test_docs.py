"""What the guides name exists: paths in the package, files, links; and every public name stands in the reference."""

import importlib
import pkgutil
import re
import sys

import pytest

import pyrovae as pv
from pyrovae.app.cli import app
from tests.house import ROOT

DOCS = ROOT / "docs"
PLACES = {"README.md": ROOT / "README.md"} | {str(p.relative_to(DOCS)): p for p in DOCS.glob("*.md")}
PLACES |= {str(p.relative_to(DOCS)): p for p in DOCS.glob("api/*.md")}
PAGES = {name: path.read_text(encoding="utf-8") for name, path in PLACES.items()}
FACES = (pv, pv.models, pv.parts, pv.nn, pv.data, pv.plots, pv.objectives, pv.evaluate)


def resolve(dotted):
    """The object of a dotted path, importing modules on the way."""
    found = importlib.import_module("pyrovae")
    for part in dotted.split(".")[1:]:
        if not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


def documented():
    """Every path that the reference describes, in full."""
    module, paths = "pyrovae", []
    reference = "".join(text for page, text in PAGES.items() if page.startswith("api/"))
    for directive, name in re.findall(r"^\.\. ([\w:]+):: ([\w.]+)$", reference, re.MULTILINE):
        if directive == "currentmodule":
            module = name
        else:
            paths.append(name if name.startswith("pyrovae.") else f"{module}.{name}")
    return paths


@pytest.mark.parametrize("page", PAGES)
def test_the_names_of_the_package_in_a_page_exist(page):
    text = re.sub(r"(?m)^\| `pyrovae\..*? \| ", "", PAGES[page])  # the old paths in the changelog's table
    names = re.findall(r"(?<![\w./])(?:pv|pyrovae)(?:\.[a-zA-Z_]\w*)+", text)
    for name in {re.sub("^pv", "pyrovae", name) for name in names}:
        resolve(name)


def anchors(path):
    """What the headings of a page are called in links."""
    titles = re.findall(r"(?m)^#{1,3} (.+)$", path.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
    folder = PLACES[page].parent
    for link, place in re.findall(r"\]\(((?!https?:)[^)#]*)#?([^)]*)\)", re.sub("`[^`\n]*`", "", PAGES[page])):
        assert (folder / (link or PLACES[page].name)).exists(), link
        assert not place or place in anchors(folder / (link or PLACES[page].name)), f"{link}#{place}"
    for path in re.findall(r"(?<![\w/])(?:tests|examples|pyrovae|docs)/[\w/]+\.(?:py|md|png)", PAGES[page]):
        assert (ROOT / path).exists(), path


def test_the_reference_names_what_exists():
    paths = documented()
    assert len(paths) == len(set(paths))
    for path in paths:
        assert resolve(path).__doc__, path


def test_every_public_name_stands_in_the_reference():
    described = [resolve(path) for path in documented()]
    modules = {name for _, name, _ in pkgutil.iter_modules(pv.__path__)}
    for face in FACES:
        for name in set(face.__all__) - modules:
            assert any(getattr(face, name) is known for known in described), f"{face.__name__}.{name}"


def test_every_example_stands_on_the_page_of_the_lectures():
    examples = {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}
    assert set(re.findall(r"`(examples/\w+\.py)", PAGES["lectures.md"])) == examples


def test_the_walk_from_the_command_line_to_a_gradient_meets_its_places_in_order(tmp_path):
    places = re.findall(r"^\| \d+ \| `([\w/]+\.py):([\w.]+)`", PAGES["contributing.md"], re.MULTILINE)
    assert len(places) == 10
    package, met = ROOT / "pyrovae", []

    def note(frame, event, _):
        if event == "call" and (package.name + "/") in frame.f_code.co_filename:
            met.append((frame.f_code.co_filename.removeprefix(f"{package}/"), frame.f_code.co_qualname))

    sys.setprofile(note)
    try:
        app(["train", "--epochs", "1", "--samples", "1", "--run-dir", str(tmp_path / "run")], standalone_mode=False)
    finally:
        sys.setprofile(None)
    calls = iter(met)
    for place in places:
        assert place in calls, place


@pytest.mark.parametrize("page", sorted(set(PAGES) - {"README.md"}))  # whose commands are one line each
def test_code_fits_its_box(page):
    """At desktop width a box holds some ninety columns, on a phone half of that."""
    cells = re.findall(r"(?ms)^```(?:\{code-cell\} ipython3|python)\n(.*?)^```$", PAGES[page])
    cells += re.findall(r"(?m)^    \$? ?((?:pyrovae|python|pip|export|OMP|MALLOC)\b.*(?:\n {8}.*)*)", PAGES[page])
    lines = [line for cell in cells for line in cell.splitlines() if not line.startswith("    alt:")]
    assert not [line for line in lines if len(line) > 80]
