"""Pyro's example programs and tutorials under every objective: a table of what comes of each.

    python tests/programs/table.py [--programs PATTERN] [--objectives NAMES] [--checks NAMES] [--results FILE] [--quick]

Each row is a program and an objective. What was found is kept in FILE, and a run goes on where the last one stopped;
what failed there is tried again. At the end come the table, its counts, and every refusal's and failure's sentence.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.programs import ALL, checks

KINDS = ("ok", "-", "refused", "eager", "FAULT")


def kind(came: str) -> str:
    """The first word of what came of a check."""
    return next(word for word in KINDS if came.startswith(word))


def run(programs: list[str], objectives: list[str], names: list[str], file: Path, quick: bool) -> dict[str, str]:
    """All cells, those known already from the file."""
    known: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    for program in programs:
        for objective in objectives:
            started = time.monotonic()
            missing = [c for c in names if kind(known.get(f"{program}|{objective}|{c}", "FAULT")) == "FAULT"]
            came = checks.outcomes(program, objective, missing, quick=quick)
            known |= {f"{program}|{objective}|{check}": said for check, said in came.items()}
            file.write_text(json.dumps(known, indent=1))
            words = [kind(known[f"{program}|{objective}|{check}"]) for check in names]
            print(
                f"{program:24} {objective:6}", *(f"{word:8}" for word in words), f"{time.monotonic() - started:.1f} s"
            )
            sys.stdout.flush()
    return known


def show(known: dict[str, str], programs: list[str], objectives: list[str], names: list[str]) -> int:
    """The table with its counts, and all sentences; the number of faults."""
    signs = {"ok": ".", "-": " ", "refused": "r", "eager": "e", "FAULT": "F"}
    print(f"\n{'':24}", *(f"{o:7}" for o in objectives), f"  ({', '.join(names)})")
    counts: Counter[str] = Counter()
    sentences: dict[str, list[str]] = {}
    for program in programs:
        cells = [[known[f"{program}|{objective}|{check}"] for check in names] for objective in objectives]
        print(f"{program:24}", *(f"{''.join(signs[kind(came)] for came in cell):7}" for cell in cells))
        for objective, cell in zip(objectives, cells, strict=True):
            for check, came in zip(names, cell, strict=True):
                counts[kind(came)] += 1
                if kind(came) in ("refused", "eager", "FAULT"):
                    sentences.setdefault(came, []).append(f"{program}/{objective}/{check}")
    print("\n" + ", ".join(f"{number} {signs[word]!r} {word}" for word, number in counts.items()))
    for came, places in sorted(sentences.items(), key=lambda item: item[0]):
        print(f"\n{came}\n    {len(places)}: {', '.join(places[:4])}{' ...' if len(places) > 4 else ''}")
    return counts["FAULT"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", default="", help="a pattern of names")
    parser.add_argument("--objectives", default=",".join(checks.OBJECTIVES))
    parser.add_argument(
        "--checks", default=",".join(checks.CHECKS).removesuffix(",inductor"), help="inductor is one more"
    )
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "pyrovae_programs.json")
    parser.add_argument("--quick", action="store_true", help="few steps, and no means of many runs compared")
    given = parser.parse_args()
    programs = [name for name in ALL if re.search(given.programs, name)]
    what = programs, given.objectives.split(","), given.checks.split(",")
    known = run(*what, given.results, given.quick)
    return int(show(known, *what) > 0)


if __name__ == "__main__":
    sys.exit(main())
