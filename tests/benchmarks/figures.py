"""The page of results: records of what commands printed, and nothing else.

    python tests/benchmarks/figures.py
    python tests/benchmarks/figures.py --part "Training steps" --title "Growth" \\
        -- python tests/benchmarks/run.py --only growth

The first makes ``docs/results.md`` of the records in ``docs/results/figures``. The second runs a command, keeps the
tables in Markdown that it prints, and its other lines, as a record, and makes the page. What the same command printed
before, under the same title, is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import records

from pyrovae import runs
from tests.benchmarks.options import ROOT, Options
from tests.benchmarks.run import environment
from tests.benchmarks.tables import Table

Record = dict[str, Any]
PARTS = (
    "Likelihoods on MNIST", "The zoo", "Estimates of log p(x)", "Training steps", "Evaluations", "Memory", "The laws",
)  # fmt: skip
FIELDS = ("part", "title", "commands", "commit", "date", "machine", "taken", "tables", "printed")
PRINTED, PAGE = "printed by the command", "taken from this page as it stood then"
HEAD = """# Results

This page is made by `python tests/benchmarks/figures.py` from the records in `docs/results/figures`, one JSON file for
what one command printed; it is not edited by hand. Every record says its commit, day and machine: figures of other
commits are not those of today's code. NLL is in nats per test image, ± its standard error over draws, and a dash is a
figure that was not measured. Compare times within a row. The lectures' tables, beside the published ones, stand on
[a page of their own](results/tables.md), made from records as well.
"""


def name(part: str, title: str) -> str:
    """The name of a record's file."""
    return re.sub("[^a-z0-9]+", "-", f"{part} {title}".lower()).strip("-")


def parsed(printed: str) -> tuple[list[Table], list[str]]:
    """The tables in Markdown among what was printed, and the other lines."""
    tables: list[Table] = []
    others: list[str] = []
    title, inside = "", False
    for line in printed.splitlines():
        cells = [cell.strip() for cell in line.strip()[1:-1].split("|")] if line.startswith("|") else []
        if line.startswith("#"):
            title = line.lstrip("# ")
        elif cells and not inside:
            tables.append(Table(title, cells, []))
        elif cells and not set(line) <= set("|-: "):
            tables[-1].rows.append(dict(zip(tables[-1].columns, cells, strict=True)))
        elif line.strip() and not cells:
            others.append(line.rstrip())
        inside = bool(cells)
    return tables, others


def run(part: str, title: str, command: list[str]) -> Record:
    """What a command prints, as a record."""
    about, began = environment(Options()), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    tables, others = parsed(done.stdout)
    machine = {key: about[key] for key in ("device", "units", "cores", "threads", "python", "torch", "pyro-ppl")}
    return {
        "part": part, "title": title, "commands": [shlex.join(command)], "commit": records.commit(),
        "date": about["date"], "machine": machine | {"seconds": round(time.perf_counter() - began, 1)},
        "taken": PRINTED, "tables": list(map(asdict, tables)), "printed": others,
    }  # fmt: skip


def read(folder: Path) -> list[Record]:
    """All records of a folder, in the order of the page; what is none is refused."""
    found = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if missing := [key for key in FIELDS if key not in record]:
            raise ValueError(f'"{path}" lacks {", ".join(missing)}: make it again by its command')
        if record["part"] not in PARTS or path.stem != name(record["part"], record["title"]):
            raise ValueError(f'"{path}" is no record of {record["part"]!r}, {record["title"]!r}: move it away')
        found.append(record)
    return sorted(found, key=lambda record: PARTS.index(record["part"]))


def shown(record: Record) -> Iterable[str]:
    """A record on the page, block by block."""
    yield f"### {record['title']}"
    lines = [" \\\n    ".join(textwrap.wrap(line, 74, **WHOLE)) for line in record["commands"]]
    yield "\n".join(["```text", *lines, "```"])
    for table in record["tables"]:
        several = len(record["tables"]) > 1 and table["title"] != record["title"]
        made = Table(**table).markdown().partition("\n\n")[2].strip()
        yield f"**{table['title']}**\n\n{made}" if several else made
    if record["printed"]:
        yield "\n".join(["```text", *record["printed"], "```"])
    machine = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    yield f"Commit {record['commit'][:7]}, {record['date']}, {record['taken']}; {machine}."


WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def page(found: list[Record]) -> str:
    """The page, as text, of all records."""
    blocks = [HEAD.strip()]
    for part in PARTS:
        of_part = [record for record in found if record["part"] == part]
        blocks += [f"## {part}"] * bool(of_part) + [block for record in of_part for block in shown(record)]
    return "\n\n".join(blocks) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="the part of the page that a new record belongs to")
    parser.add_argument("--title", help="the record's title there")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "results" / "figures", help="of the records")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md", help="what is written")
    parser.add_argument("command", nargs="*", help="what is run and recorded, after --")
    options = parser.parse_args()
    if options.command:
        if not (options.part and options.title):
            parser.error("a command's record needs --part and --title")
        record = run(options.part, options.title, options.command)
        options.folder.mkdir(parents=True, exist_ok=True)
        runs.write_json(options.folder / f"{name(options.part, options.title)}.json", record)
    runs.write_text(options.page, page(read(options.folder)))


if __name__ == "__main__":
    main()
