"""The house stands: folders import downwards only, files in no circle, and the guide to it says so."""

import ast
import re
from graphlib import TopologicalSorter

import pytest

import pyrovae
from tests.house import FLOORS, ROOT, File, arrows, files, measure

SOURCES = files(ROOT / "pyrovae")
FLOOR = {room: number for number, rooms in enumerate(reversed(FLOORS)) for room in rooms}
FACES = (pyrovae, *(getattr(pyrovae, name) for name in pyrovae.__all__ if name in {source.room for source in SOURCES}))


def imported(source: File) -> set[str]:
    """The package's files that a file imports, by their dotted names."""
    names, found = {other.name for other in SOURCES}, set()
    for dotted in source.imports():
        while dotted not in names:
            dotted = dotted.rpartition(".")[0]
        found.add(dotted)
    return found - {"", source.name}


def test_every_folder_has_a_floor():
    assert {source.room for source in SOURCES if source.room} <= FLOOR.keys()


def test_folders_import_from_floors_below():
    upward = [(above, below) for above, below in arrows(SOURCES) if FLOOR[above] <= FLOOR[below]]
    assert not upward


def test_files_import_in_no_circle():
    TopologicalSorter({source.name: imported(source) for source in SOURCES}).prepare()


@pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)
def test_no_module_bears_the_name_of_a_public_function(face):
    modules = {f"pyrovae.{source.name}" for source in SOURCES}
    assert not [name for name in face.__all__ if callable(getattr(face, name)) and f"{face.__name__}.{name}" in modules]


def test_no_module_only_hands_on_what_stands_elsewhere():
    """Public names are gathered by folders; what moved left no old path behind."""
    own = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    empty = [
        s.name for s in SOURCES if s.path.name != "__init__.py" and not any(isinstance(n, own) for n in s.tree.body)
    ]
    assert set(empty) <= {"__main__"}


LIMITS = {
    "median file": 200, "files above 400 lines": 0, "functions above 60": 0, "median function body": 4,
    "class bodies above 150": 0, "of these private": 0, "private definitions per 1,000 lines": 10,
    "Any per 1,000 lines": 20, "duplicated lines, %": 1.6,
}  # fmt: skip


@pytest.fixture(scope="module")
def figures():
    return measure(ROOT / "pyrovae")


@pytest.mark.parametrize("name", LIMITS)
def test_the_house_stays_within_its_measures(name, figures):
    assert figures[name] <= LIMITS[name]


def test_contributing_shows_the_floors():
    text = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    shown = {
        (int(floor), name)
        for floor, rooms in re.findall(r"^\| (\d) \| (.*?) \|", text, re.MULTILINE)
        for name in re.findall(r"`(\w+)(?:/|\.py)`", rooms)
    }
    assert shown == {(FLOOR[source.room], source.room) for source in SOURCES if source.room} - {(9, "__main__")}
