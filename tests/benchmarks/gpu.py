"""What a card should answer first, in one go: its tests, steps, epochs beside NumPyro, likelihoods, replicas, resuming,
memory.

    python tests/benchmarks/gpu.py --minutes 9 [--folder runs/gpu] [--only tests resume]

Every answer stands in ``found.json`` and ``found.md`` of the folder as soon as it is there, what was said on the way in
a log beside them. Cut off, or out of minutes, the same command goes on with what is missing, and nothing that it has
started goes on without it. On a processor, and on a device as slow as one, it is a dry run: one part of each kind, of
tiny sizes, shows that the command works, in a folder of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.children import run_child
from tests.benchmarks.options import ROOT
from tests.benchmarks.tables import Table

HELD = "--held"  # in front of a command that ends with this one
RATE, LEAST = "--rate", 0.5  # what measures a device, and the TFLOP/s of the slowest card
KNOWN = "PYROVAE_OUTCOMES"  # the variable with the file of the tests' outcomes, a line each
RUN, RESUME = [sys.executable, "tests/benchmarks/run.py"], [sys.executable, "-m", "tests.benchmarks.resume"]
CELLS = ("mlp 20x1", "mlp 100x1", "mlp 100x50", "mlp 1000x50", "conv 100x1", "conv 100x50")
EPOCHS, STEPS = ("--rounds", "3", "--epoch-steps", "600"), ("--compile-mode", "reduce-overhead")
PEAKS = ("--contenders", "pyrovae compiled", "hand-written, torch.compile")
SECTIONS: dict[str, tuple[str, ...]] = {
    **{f"epochs, {cell}": ("epochs", "--cells", cell, *EPOCHS) for cell in ("100x1", "20x1", "100x5", "100x50")},
    **{
        f"steps, {cell}": ("steps", "--networks", network, "--cells", size, *STEPS)
        for cell in CELLS
        for network, size in [cell.split()]
    },
    "likelihoods": ("likelihoods", "--networks", "mlp", "--images", "500"),
    **{f"replicas, {cell}": ("replicas", "--cells", cell) for cell in ("20x1", "100x5")},
    **{f"memory, {cell}": ("memory", "--cells", cell, *PEAKS) for cell in ("100x50", "1000x50")},
}
QUICK = (
    *("--seconds", "0.05", "--warmup", "2", "--samples", "3", "--images", "2"),
    *("--rounds", "1", "--epoch-steps", "3", "--cells", "4x2", "--replicas", "1", "2"),
)
FEW = {"epochs": ("--contenders", "pyrovae"), "memory": ("--contenders", "hand-written")}
TRIED = ("tests", "resume", "epochs, 20x1", "steps, mlp 20x1", "steps, conv 100x1", "likelihoods", "replicas, 20x1",
         "memory, 100x50")  # fmt: skip
PARTS = ("tests", "resume", *SECTIONS)
KINDS = list(dict.fromkeys(part.partition(",")[0] for part in PARTS))


class Outcomes:
    """For pytest: passes over the tests whose outcome is known, and writes down the others' as they end."""

    def __init__(self, file: Path, *, writes: bool) -> None:
        self.file, self.writes = file, writes

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        known = outcomes(self.file)
        items[:] = [item for item in items if item.nodeid not in known]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if self.writes and (report.when == "call" or not report.passed):
            with self.file.open("a") as file:
                reason = "" if report.passed else str(report.longrepr)[-2000:]
                row = {"test": report.nodeid, "outcome": report.outcome, "reason": reason}
                file.write(f"\n{json.dumps(row)}\n")  # behind a line that may have been cut off

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if self.writes and exitstatus in (0, 1, 5):  # all were run, some failed, none was left
            self.file.with_suffix(".ended").touch()


def pytest_configure(config: Any) -> None:
    """This file is the plugin."""
    config.pluginmanager.register(Outcomes(Path(os.environ[KNOWN]), writes=not hasattr(config, "workerinput")))


def outcomes(file: Path) -> dict[str, dict[str, str]]:
    """Of the tests, so far; a line that was cut off is none."""
    rows: list[dict[str, str]] = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else ():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return {row["test"]: row for row in rows}


def held(command: Sequence[str]) -> int:
    """Run a command, with what it starts, no longer than standard input is held open: its exit status."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def end() -> None:
        os.read(0, 1)  # nothing comes before whoever holds it lets go, or is no more
        os.killpg(child.pid, signal.SIGKILL)

    threading.Thread(target=end, daemon=True).start()
    try:
        status = child.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    return status if status >= 0 else 128 - status


@dataclass
class Card:
    """What one device has answered so far, in a folder; :param ends: when the minutes are over."""

    folder: Path
    device: str
    quick: bool
    ends: float

    def ask(self, part: str) -> str:
        """Run a part in a process of its own, with what it starts: how it ended."""
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        log, environment = self.path(part, ".log"), {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
        if part == "tests":
            environment[KNOWN] = str(self.path(part, ".jsonl"))
        command, left = [sys.executable, __file__, HELD, *self.command(part)], self.ends - time.monotonic()
        with (
            log.open("a") as said,
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=said, stderr=said
            ) as child,
        ):
            try:  # a test that hangs leaves the other parts half of what is left
                status = child.wait(max(1.0, left / 2 if part == "tests" else left))
            except subprocess.TimeoutExpired:
                return "out of minutes"
        return "done" if self.answered(part) else f"failed ({status}): {last_line(log)}"

    def command(self, part: str) -> list[str]:
        """What answers a part."""
        found = ["--json", str(self.path(part, ".json"))]
        if part == "tests":
            marks = [] if self.device == "cpu" else ["-m", "cuda"]
            file = f"tests/test_{'schedules' if self.device == 'cpu' else 'cuda'}.py"
            marks += ["-k", "every_replay"] if self.quick and marks else []
            several = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
            plugin = ["-p", "tests.benchmarks.gpu", "-p", "no:cacheprovider"]
            return [sys.executable, "-m", "pytest", file, "--tb=short", *marks, *several, *plugin]
        if part == "resume":
            return [*RESUME, self.device, *found, *(["--quick"] if self.quick else [])]
        quick = [*QUICK, *FEW.get(part.partition(",")[0], ())] if self.quick else []
        return [*RUN, "--only", *SECTIONS[part], "--device", self.device, *found, *quick]

    def path(self, part: str, suffix: str) -> Path:
        """A file of a part."""
        return self.folder / (re.sub(r"\W+", "-", part) + suffix)

    def answered(self, part: str) -> bool:
        """Whether all of a part is known."""
        if part == "tests":
            return self.path(part, ".ended").exists()
        return bool(self.answer(part).get("sections"))

    def answer(self, part: str) -> dict[str, Any]:
        """What a part has written; nothing where that was cut off."""
        with suppress(FileNotFoundError, json.JSONDecodeError):
            return json.loads(self.path(part, ".json").read_text())
        return {}

    def found(self) -> dict[str, Any]:
        """All answers, the tests' outcomes among them."""
        known = {part: found for part in PARTS if part != "tests" and (found := self.answer(part))}
        return {"tests": list(outcomes(self.path("tests", ".jsonl")).values()), "parts": known}

    def write(self, ended: dict[str, str]) -> None:
        """Both files, whole or as they were."""
        found = {**self.found(), "ended": ended}
        for name, text in (("found.json", json.dumps(found, indent=1)), ("found.md", markdown(found))):
            aside = self.folder / f"{name}.new"
            aside.write_text(text + "\n")
            aside.replace(self.folder / name)


def rate(device: str) -> None:
    """Print where "auto" is, and the TFLOP/s of its products in float32.

    One thread asks for them: so no device that a processor stands for comes near what a card does.
    """
    import torch

    from tests.benchmarks.timing import block

    torch.set_num_threads(1)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.rand(1024, 1024, device=device)
    seconds = min(block(lambda: x @ x, 1, device) for _ in range(5))
    print(json.dumps({"device": device, "rate": 2e-12 * len(x) ** 3 / seconds}))


def last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]


def markdown(found: dict[str, Any]) -> str:
    """What was found, as tables."""
    count = Counter(row["outcome"] for row in found["tests"])
    lines = [f"Tests on the card: {', '.join(f'{n} {outcome}' for outcome, n in count.items()) or 'not run'}."]
    lines += [f"- {row['test']}: {last(row['reason'])}" for row in found["tests"] if row["outcome"] == "failed"]
    about: dict[str, Any] = {}
    for part in found["parts"].values():
        about |= part["environment"]
    lines += ["", ", ".join(f"{name} {value}" for name, value in about.items()), ""]
    for part in found["parts"].values():
        for tables in part["sections"].values():
            lines += [Table(**table).markdown() for table in tables]
    return "\n".join([*lines, *(f"- {part}: {how}" for part, how in found["ended"].items() if how != "done")])


def last(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def main() -> None:
    if sys.argv[1:2] == [HELD]:
        sys.exit(held(sys.argv[2:]))
    if sys.argv[1:2] == [RATE]:
        return rate(sys.argv[2])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it")
    parser.add_argument("--folder", type=Path, help="of the answers; runs/gpu, or runs/dry-DEVICE")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="kinds of parts, in this order")
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, or cpu; a card, where there is one")
    asked = parser.parse_args()
    ends = time.monotonic() + 60 * asked.minutes
    place = {"device": "cpu"} if asked.device == "cpu" else run_child("gpu", RATE, asked.device)
    if "error" in place:
        parser.error(f"no card answers as {asked.device}: {place['error']}")
    dry = place.get("rate", 0.0) < LEAST or place["device"] == "cpu"
    folder = (asked.folder or Path("runs", f"dry-{place['device']}".replace(":", "-") if dry else "gpu")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if dry:
        print(f"a dry run, of tiny sizes: {place['device']} is no card", flush=True)
    ask(Card(folder, place["device"], dry, ends), asked.only)
    print((folder / "found.md").read_text() if (folder / "found.md").exists() else "nothing was missing")


def ask(card: Card, kinds: Sequence[str]) -> None:
    """Ask the card all that it has not answered."""
    ended: dict[str, str] = {}
    parts = TRIED if card.quick else PARTS
    for part in (part for kind in kinds for part in parts if part.partition(",")[0] == kind):
        if card.answered(part):
            continue
        began = time.monotonic()
        ended[part] = card.ask(part) if began < card.ends else "out of minutes"
        card.write(ended)
        print(f"{part}: {ended[part]}, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
