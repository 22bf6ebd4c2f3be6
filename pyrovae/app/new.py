"""A starter: a pair of one's own in a file that trains at once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rich.console import Console

STARTERS = Path(__file__).parent / "starters"


def new(path: Path, *, table: bool, out: Console) -> None:
    """Write a commented pair into a file that is not there yet, and say how it is trained."""
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise ValueError(
            f'a model is imported by the name of its file, got "{path}": take letters, digits and _, as in my_model.py'
        )
    if importlib.util.find_spec(path.stem) is not None and not path.exists():
        raise ValueError(f'there is a module "{path.stem}" already, which would be imported instead: take another name')
    starter = (STARTERS / ("table.txt" if table else "images.txt")).read_text("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(starter.format(module=path.stem))
    except FileExistsError as error:
        raise ValueError(f'"{path}" is there already, and is left as it is: name another file') from error
    out.print(f"wrote {path}, a pair of programs for {'a table' if table else 'images (--table: for a table)'}")
    where = "" if path.parent == Path() else f"cd {path.parent} && "
    first = f"python {path.name} && " if table else ""
    out.print(f"train it: {where}{first}pyrovae train {path.stem}:MyPair{' --data npz:table.npz' if table else ''}")
