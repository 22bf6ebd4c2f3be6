"""The house by numbers: ``python tests/house.py [FOLDER ...]`` measures packages (by default pyrovae), one column each.

A room is a folder of the package, or a module beside the folders; an arrow is one room's import of another, counted
once for each pair. Functions are measured from their signature's end to their last line, docstrings left out.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: The floors, top first: a room may import only from floors below its own.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("app",),
    ("train", "export"),
    ("evaluate", "models"),
    ("parts", "sampling"),
    ("objectives", "compile", "data", "plots", "runs"),
    ("engine",),
    ("nn", "schedules"),
    ("arguments", "configured", "files", "html", "memory", "named", "progress", "ranks", "signals"),
    ("errors",),
)
RUN = 6  # lines that make a duplicate

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class File:
    """One source file of a package."""

    package: Path
    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def name(self) -> str:
        """Dotted, below the package; the package's own face is empty."""
        parts = self.path.relative_to(self.package).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def room(self) -> str:
        return self.name.split(".")[0]

    @property
    def lines(self) -> int:
        return self.text.count("\n")

    def imports(self) -> Iterator[str]:
        """Dotted names below the package, of modules and of what is taken from them, wherever they are imported."""
        prefix = f"{self.package.name}."
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            yield from (name.removeprefix(prefix) for name in names if name.startswith(prefix))

    def functions(self) -> Iterator[Function]:
        yield from (node for node in ast.walk(self.tree) if isinstance(node, Function))

    def classes(self) -> Iterator[ast.ClassDef]:
        yield from (node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef))


def files(package: Path) -> list[File]:
    """The sources of a package, in order."""
    return [File(package, path) for path in sorted(package.rglob("*.py"))]


def body(node: Function | ast.ClassDef) -> int:
    """Lines of a function or class without its head and docstring."""
    inside = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return inside[-1].end_lineno - inside[0].lineno + 1 if inside else 0  # type: ignore[operator]


def parameters(node: Function) -> int:
    """Named parameters, ``self`` and ``cls`` aside."""
    named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in named)


def arrows(sources: list[File]) -> set[tuple[str, str]]:
    """Pairs of rooms (importer, imported)."""
    rooms = {source.room for source in sources if source.room}
    found = {(source.room, name.split(".")[0]) for source in sources for name in source.imports() if source.room}
    return {(above, below) for above, below in found if below in rooms and above != below}


def floors(sources: list[File]) -> int | None:
    """How many floors the rooms need so that each stands above all that it imports; None where there is a circle."""
    below: dict[str, set[str]] = {source.room: set() for source in sources if source.room}
    for above, imported in arrows(sources):
        below[above].add(imported)
    floor: dict[str, int] = {}
    try:
        for room in TopologicalSorter(below).static_order():
            floor[room] = 1 + max((floor[other] for other in below[room]), default=0)
    except CycleError:
        return None
    return max(floor.values())


def duplicated(sources: list[File]) -> float:
    """The share of lines that stand in a run of six equal ones elsewhere; blank lines, imports and comments aside."""
    lines = [
        line.strip()
        for source in sources
        for line in source.text.splitlines()
        if line.strip() and not re.match(r"\s*(#|from |import )", line)
    ]
    runs = [tuple(lines[i : i + RUN]) for i in range(len(lines) - RUN)]
    counts = Counter(runs)
    marked = {i + j for i, run in enumerate(runs) if counts[run] > 1 for j in range(RUN)}
    return len(marked) / max(len(lines), 1)


def measure(package: Path) -> dict[str, float | int | str]:
    """Every figure of a package, by its name."""
    sources = files(package)
    functions = [node for source in sources for node in source.functions()]
    classes = [node for source in sources for node in source.classes()]
    total = sum(source.lines for source in sources)
    own = [s.lines for s in sources if s.path.name != "__init__.py"]
    private = [n for n in (*functions, *classes) if re.match(r"_[^_]", n.name)]
    many = [n.name for n in functions if parameters(n) > 10]
    return {
        "lines": total,
        "files": len(sources),
        "rooms": len({source.room for source in sources if source.room}),
        "floors": floors(sources) or "a circle",
        "arrows between rooms": len(arrows(sources)),
        "modules at the root": sum("." not in s.name and s.path.name != "__init__.py" for s in sources),
        "median file": statistics.median(own),
        "files above 400 lines": sum(lines > 400 for lines in own),
        "longest function body": max(map(body, functions)),
        "functions above 60": sum(body(n) > 60 for n in functions),
        "median function body": statistics.median(map(body, functions)),
        "class bodies above 150": sum(body(n) > 150 for n in classes),
        "functions of more than ten parameters": len(many),
        "of these private": sum(name.startswith("_") and name != "__init__" for name in many),
        "private definitions per 1,000 lines": round(1000 * len(private) / total, 1),
        "Any per 1,000 lines": round(1000 * sum(len(re.findall(r"\bAny\b", s.text)) for s in sources) / total, 1),
        "duplicated lines, %": round(100 * duplicated(sources), 2),
    }


def main(folders: list[str]) -> None:
    packages = [Path(folder).resolve() for folder in folders] or [ROOT / "pyrovae"]
    columns = [measure(package) for package in packages]
    for name in columns[0]:
        print(f"{name:<40}" + "".join(f"{column[name]:>12}" for column in columns))


if __name__ == "__main__":
    main(sys.argv[1:])
