"""The fault matrix: what users, disks and strangers do to the library, each with the answer that is right.

    python tests/faults/matrix.py [PATTERN] [--package FOLDER] [--wrong] [--jobs 2] [--seconds 120]

prints every row (or those whose name matches PATTERN) and counts them by clause; ``--package`` tries the rows on
another checkout of the package, ``--wrong`` prints only those that are not right. ``tests/faults/test_matrix.py`` runs
the same rows as tests.

A row is a function of an empty folder, which is also the working directory, that yields once: a command line of
``pyrovae`` as a tuple, or something to call. What it does before is the preparation, what it asserts afterwards must
be true as well::

    @fault("A4", "evaluate", 4, r"weights\\.safetensors.*changed")
    def a_bit_of_the_weights_is_flipped(folder):
        run = small_run(folder / "run")
        flip(run / "last" / "weights.safetensors")
        outcome = yield "evaluate", run
        assert not (run / "results.json").exists()

Each runs in a process of its own, so that a row may crash, hang, take signals or change global state. The exit code of
something called is that of the class of its error, unless it returns an ``Outcome`` itself; ``says`` is searched in the
error (or, for commands, in stderr; for code 0 in what is printed and warned of).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SECONDS = 120  # after which a row hangs
LONGEST = 1000  # characters of a message that a person reads
# An error's class by name, so that an older package, or another's error, is judged by the same rule.
CODES = {
    "DataError": 3, "CheckpointError": 4, "ArithmeticError": 5, "OSError": 6, "MemoryError": 6, "OutOfMemoryError": 6,
    "ValueError": 2, "TypeError": 2, "KeyboardInterrupt": 130,
}  # fmt: skip

Action = tuple[object, ...] | Callable[[], object]
Body = Callable[..., Generator[Action, "Outcome", None]]


@dataclass(frozen=True)
class Row:
    """One fault: where it is from, who meets it, and the answer that is right."""

    clause: str  # of what must hold, "A1"
    verb: str  # the command, or the function
    name: str
    code: int
    says: str
    body: Body = field(repr=False)
    value: tuple[object, ...] = ()

    def __str__(self) -> str:
        return f"{self.clause}-{self.verb}-{self.name}"


@dataclass
class Outcome:
    """What came of a row's action."""

    code: int
    message: str = ""  # of the error, or all of stderr
    printed: str = ""
    value: Any = None


@dataclass
class Verdict:
    """How a row was answered."""

    kind: str  # "right", or what is wrong with it
    code: int | None
    message: str


ROWS: list[Row] = []


def fault(
    clause: str, verb: str, code: int = 0, says: str = "", *, each: dict[str, object] | None = None
) -> Callable[[Body], Body]:
    """A row of the matrix, or one for each of several values, which the function takes after the folder."""

    def add(body: Body) -> Body:
        for label, value in (each or {"": None}).items():
            name = body.__name__ + (f"[{label}]" if label else "")
            ROWS.append(Row(clause, verb, name, code, says, body, () if each is None else (value,)))
        return body

    return add


def rows() -> list[Row]:
    """All rows of the files beside this one."""
    for path in sorted(HERE.glob("*.py")):
        if path.stem not in ("matrix", "preloaded") and not path.stem.startswith("test_"):
            importlib.import_module(f"tests.faults.{path.stem}")
    names = Counter(map(str, ROWS))
    assert max(names.values(), default=1) == 1, [name for name, count in names.items() if count > 1]
    return list(ROWS)


def once(key: str, folder: Path, make: Callable[[], object]) -> Path:
    """What is made in ``folder``: for each package and key once, and copied there for other rows."""
    import pyrovae

    kept = Path(os.environ["PYROVAE_MATRIX"]) / re.sub(r"\W+", "-", f"{Path(pyrovae.__file__).parent}{key}")
    if kept.exists():
        shutil.copytree(kept, folder)
        return folder
    make()
    aside = Path(tempfile.mkdtemp(dir=kept.parent)) / "made"
    shutil.copytree(folder, aside)
    with contextlib.suppress(OSError):  # another process was first
        aside.replace(kept)
    return folder


def small_run(folder: Path, *more: str, epochs: int = 2) -> Path:
    """A finished run on the digits."""
    words = ["train", "--epochs", str(epochs), "--samples", "20", "--latent-dim", "3", "--set", "hidden=[16]", *more]
    return once(str(words), folder, lambda: command(*words, "--device", "cpu", "--run-dir", folder))


def command(*words: object) -> Outcome:
    """Run the command line in this process."""
    from pyrovae.app.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
    return Outcome(code, err.getvalue(), out.getvalue())


def call(function: Callable[[], object]) -> Outcome:
    """Call something; its error, or its value and what it warned of."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            value = function()
            if isinstance(value, Outcome):  # of a process of its own, say
                return value
        except BaseException as error:
            names = [kind.__name__ for kind in type(error).__mro__]
            code = next((CODES[name] for name in CODES if name in names), 1)
            notes = " ".join(getattr(error, "__notes__", ()))
            return Outcome(code, f"{error} {notes}".strip() or repr(error), value=error)
    return Outcome(0, "\n".join(str(w.message) for w in warned), value=value)


def judge(row: Row, outcome: Outcome) -> Verdict:
    """Compare an outcome with the row's answer."""
    code, message = outcome.code, outcome.message.strip()

    def verdict(kind: str) -> Verdict:
        return Verdict(kind, code, message)

    if code == 0 and row.code:
        return verdict("silently wrong")
    if "Traceback (most recent" in message or (code == 1 and row.code != 1):
        return verdict("unclear: a traceback")
    if code != row.code:
        return verdict(f"wrong code {code}")
    errors = [line for line in message.splitlines() if not line.startswith("warning: ")]
    if row.code and (len(errors) > 1 or len(message) > LONGEST or "tensor(" in message):
        return verdict("unclear: long, or several lines")
    if not re.search(row.says, message if row.code else f"{message}\n{outcome.printed}", re.DOTALL):
        return verdict("unclear: other words")
    return verdict("right")


def attempt(row: Row, folder: Path, result: Path) -> None:
    """In a process of its own: prepare, act, look, and write the verdict down."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    body = row.body(folder, *row.value)
    action = next(body)
    outcome = call(action) if callable(action) else command(*action)
    verdict = judge(row, outcome)
    try:
        body.send(outcome)
    except StopIteration:
        pass
    except Exception as error:  # not an assertion only: a file that is gone is lost
        if verdict.kind == "right":
            line = traceback.extract_tb(error.__traceback__)[-1].line
            verdict = Verdict("wrong afterwards", outcome.code, f"{line}: {error!r}; {outcome.message}")
    result.write_text(json.dumps(asdict(verdict)), encoding="utf-8")


def child(name: str, folder: Path, kept: str) -> None:
    """Find a row by its name and attempt it; what it prints stays in its folder."""
    os.setsid()
    for number in (signal.SIGHUP, signal.SIGTERM):  # which a job in the background may have been told to ignore
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, path in ((1, folder / "stdout"), (2, folder / "stderr")):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), stream)
    os.environ |= {"HOME": str(folder), "COLUMNS": "200", "PYROVAE_MATRIX": kept}
    row = next(row for row in rows() if str(row) == name)
    (folder / "work").mkdir()
    attempt(row, folder / "work", folder / "verdict.json")


def run(row: Row, folder: Path, seconds: float = SECONDS) -> Verdict:
    """One row, from a process that has imported the package and does nothing else."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.faults.preloaded"])
    process = processes.Process(target=child, args=(str(row), folder, os.environ["PYROVAE_MATRIX"]))
    process.start()
    process.join(seconds)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)  # what it started too
        process.join()
        return Verdict("hung", None, f"no answer after {seconds:g} s")
    with contextlib.suppress(OSError, ValueError):  # of a row that crashed, or lets no file grow
        return Verdict(**json.loads((folder / "verdict.json").read_text(encoding="utf-8")))
    said = (folder / "stderr").read_text(encoding="utf-8", errors="replace")[-500:]
    return Verdict("crashed" if process.exitcode else "no verdict", process.exitcode, said)


@contextlib.contextmanager
def alone(kept: Path, package: Path | None = None) -> Iterator[None]:
    """Processes that are started find the package to be tried first, use one thread and no GPU, and share a folder."""
    paths = [str(path) for path in (package, HERE.parent.parent) if path is not None]
    settings = {
        "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "PYROVAE_MATRIX": str(kept), "MPLBACKEND": "Agg", "PYTHONSAFEPATH": "1",
    }  # fmt: skip
    before, path = dict(os.environ), list(sys.path)
    kept.mkdir(exist_ok=True)
    os.environ |= settings
    sys.path[:0] = paths
    try:
        yield
    finally:
        sys.path[:] = path
        os.environ.clear()
        os.environ |= before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pattern", nargs="?", default="", help="of the rows' names")
    parser.add_argument("--package", type=Path, help="folder of another checkout to try")
    parser.add_argument("--wrong", action="store_true", help="print only what is not right")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which a row hangs")
    options = parser.parse_args()
    chosen = [row for row in rows() if re.search(options.pattern, str(row))]
    with (
        tempfile.TemporaryDirectory() as base,
        alone(Path(base, "kept"), options.package),
        ThreadPoolExecutor(options.jobs) as pool,
    ):
        folders = [Path(base, f"{i:04d}") for i in range(len(chosen))]
        for folder in folders:
            folder.mkdir()
        found: Counter[tuple[str, str]] = Counter()
        for row, verdict in zip(chosen, pool.map(partial(run, seconds=options.seconds), chosen, folders), strict=True):
            kind = verdict.kind.partition(":")[0].partition(" code")[0]
            found[row.clause, kind] += 1
            if not (options.wrong and kind == "right"):
                said = " ".join(verdict.message.split())[:160]
                print(f"{row!s:80} {row.code:4} {verdict.kind:30} {said}", flush=True)
    kinds = sorted({kind for _, kind in found}, key=lambda kind: (kind != "right", kind))
    print("\n" + "clause".ljust(8) + "".join(kind.rjust(18) for kind in kinds))
    for clause in sorted({clause for clause, _ in found}):
        print(clause.ljust(8) + "".join(f"{found[clause, kind]:18}" for kind in kinds))
    right = sum(count for (_, kind), count in found.items() if kind == "right")
    print("all".ljust(8) + "".join(f"{sum(n for (_, k), n in found.items() if k == kind):18}" for kind in kinds))
    print(f"\n{right} of {len(chosen)} right")
    return int(right != len(chosen))


if __name__ == "__main__":
    sys.path[0] = str(HERE.parent.parent)
    # Under the name that the files of rows know it by: there is one list.
    sys.exit(importlib.import_module("tests.faults.matrix").main())
