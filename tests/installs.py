"""Does it install everywhere? ``python tests/installs.py [--only WORDS]``: an environment a row, one after another.

A row is a Python that this machine has, the lowest or the newest versions that ``pyproject.toml`` allows, and what is
installed: the wheel, the sdist, or the wheel without any extra. The package is built once, and must hold every file of
the repository's ``pyrovae``. A row's environment is made by uv (``pip install uv``) from wheels of the index that uv is
set to, within the constraints of this machine's pip; in it, away from the repository, run the command line from a
starter to a table of samples, and a choice of the tests against the package that is installed. Then it is deleted.

Rows that passed with the same sources, lowest versions and tests are not tried again (``--again`` does); each is a file
in ``--records``, with the versions that it was tried with. Exit 1 if a row fails. A row downloads up to 3 GB (PyTorch's
CUDA; none that uv has in a ``$UV_CACHE_DIR`` of yours), needs 10 GB under ``$TMPDIR`` and takes minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
EXTRAS = ("hub", "onnx", "tensorboard")
TESTS = (
    *("tests/test_plots.py", "tests/test_notebooks.py", "tests/test_export.py", "tests/test_hub.py"),
    *("tests/evaluate/test_psis.py", "tests/models/test_vae.py", "tests/models/test_pca.py"),
    *(f"tests/evaluate/test_likelihood.py::test_{name}" for name in (
        "arviz_receives_every_number", "arviz_receives_the_draws_and_draws_them",
        "leaving_a_datum_out_gives_its_own_log_density",
    )),
)  # fmt: skip
SHOWN = ("torch", "pyro-ppl", "numpy", "matplotlib", "arviz")
TINY = ("--epochs", "2", "--samples", "10", "--run-dir")
COMMANDS = (  # what a user does first, in an empty folder
    ("train", "vae", *TINY, "runs/a", "--tensorboard"),
    ("train", "vae", "--objective", "iwae", "--particles", "2", "--set", "compile=true", *TINY, "runs/b"),
    ("evaluate", "runs/b", "--samples", "10"),
    ("report", "runs/a"),
    ("compare", "runs/a", "runs/b", "--html"),
    ("sample", "runs/a", "--output", "samples.csv"),
    ("export", "runs/a"),
    ("new", "mine.py"),
    ("train", "mine:MyPair", *TINY, "runs/mine"),
    ("report", "runs/mine", "--trust"),
    ("list",),
)
LEFT = ("runs/a/report.html", "runs/compare.html", "samples.csv", "runs/a/decoder.onnx", "runs/mine/samples.png")
BARE = re.compile("--tensorboard|^export$|onnx$")  # what needs an extra


class Failed(Exception):
    """A step of a row that ended badly, with its last lines."""


@dataclass(frozen=True)
class Row:
    """One environment."""

    python: str
    versions: str  # "lowest" or "newest"
    what: str  # "wheel", "sdist" or "bare"
    held: tuple[str, ...] = ()  # constraints of this row

    def __str__(self) -> str:
        return " ".join((self.python, self.versions, self.what, *self.held))


ROWS = (
    *(Row(python, "newest", "wheel") for python in PYTHONS),
    Row("3.12", "newest", "wheel", ("arviz<1",)),
    Row("3.12", "newest", "sdist"),
    Row("3.13", "newest", "bare"),
    *(Row(python, "lowest", "wheel") for python in PYTHONS),
)


def call(words: tuple[object, ...], where: Path, env: Mapping[str, str]) -> str:
    """Standard output of a command that must end well."""
    done = subprocess.run([str(word) for word in words], cwd=where, env=dict(env), capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr).rstrip().splitlines()[-25:]
        raise Failed("\n".join([f"{' '.join(map(str, words))}: exit {done.returncode}", *said]))
    return done.stdout


def settings(scratch: Path) -> dict[str, str]:
    """The environment of every command: nothing of the repository, pip's constraints, all Pythons of pyenv."""
    dropped = ("PYTHON", "VIRTUAL_ENV", "PYROVAE", "PYTEST")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    asked = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    if held := re.search(r"(?m)^[^\n]*\bconstraint='(.*)'$", asked.stdout):
        env.setdefault("UV_CONSTRAINT", held[1])
    if shutil.which("pyenv"):
        there = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True).stdout.split()
        env["PYENV_VERSION"] = ":".join(reversed(there))
    env |= {"UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1", "MPLBACKEND": "agg", "COLUMNS": "120"}
    env.setdefault("UV_CACHE_DIR", str(scratch / "cache"))
    return env | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def build(uv: str, scratch: Path, env: Mapping[str, str]) -> dict[str, Path]:
    """An sdist of the repository and a wheel of the sdist, each with every file of the package."""
    call((uv, "build", "--out-dir", scratch / "dist", ROOT), scratch, env)
    tracked = set(call(("git", "ls-files", "pyrovae"), ROOT, env).split())
    (wheel,), (sdist,) = (scratch / "dist").glob("*.whl"), (scratch / "dist").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as opened, tarfile.open(sdist) as packed:
        inside = {"wheel": set(opened.namelist()), "sdist": {name.partition("/")[2] for name in packed.getnames()}}
        packed.extractall(scratch, filter="data")
    for kind, names in inside.items():
        if missing := sorted(tracked - names):
            raise Failed(f"the {kind} lacks {', '.join(missing)}")
    unpacked = scratch / sdist.name.removesuffix(".tar.gz")
    shutil.rmtree(unpacked / "pyrovae")  # what is tested is what is installed
    return {"wheel": wheel, "bare": wheel, "sdist": sdist, "tests": unpacked}


def attempt(row: Row, uv: str, built: Mapping[str, Path], scratch: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Install a row, use it, and return the versions of its packages."""
    home, outside = scratch / "env", scratch / "outside"
    python, bare = home / "bin" / "python", row.what == "bare"
    call((uv, "venv", "--quiet", "--clear", "--python", row.python, home), scratch, env)
    (scratch / "held.txt").write_text("\n".join(row.held))
    held = ("--constraint", scratch / "held.txt", "--only-binary", ":all:", "--python", python)
    held += ("--constraint", env["UV_CONSTRAINT"]) if "UV_CONSTRAINT" in env else ()  # which the first would drop
    extras = () if bare else [word for extra in EXTRAS for word in ("--extra", extra)]
    resolution = ("--resolution", "lowest-direct" if row.versions == "lowest" else "highest")
    call(
        (uv, "pip", "compile", "-q", "-o", "lock.txt", *held, *resolution, *extras, ROOT / "pyproject.toml"),
        scratch,
        env,
    )
    call((uv, "pip", "install", *held, "-r", "lock.txt"), scratch, env)
    call((uv, "pip", "install", "--python", python, "--no-deps", built[row.what]), scratch, env)
    call((uv, "pip", "check", "--python", python), scratch, env)
    outside.mkdir()
    for words in COMMANDS:
        if not (bare and BARE.search(words[0])):
            kept = [word for word in words if not (bare and BARE.search(word))]
            call((home / "bin" / "pyrovae", *kept), outside, env)
    if missing := [name for name in LEFT if not (outside / name).exists() and not (bare and BARE.search(name))]:
        raise Failed(f"no {', '.join(missing)}")
    listed = json.loads(call((uv, "pip", "list", "--format", "json", "--python", python), scratch, env))
    if not bare:
        call((uv, "pip", "install", "--python", python, "pytest", "hypothesis"), scratch, env)
        call((python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS), built["tests"], env)
    return {package["name"]: package["version"] for package in listed}


def digest() -> str:
    """Of everything that a row depends on."""
    names = subprocess.check_output(["git", "ls-files", "pyrovae", "tests", "pyproject.toml"], cwd=ROOT, text=True)
    texts = (name.encode() + (ROOT / name).read_bytes() for name in names.split() if (ROOT / name).exists())
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def tried(rows: list[Row], records: Path, again: bool) -> Iterator[tuple[Row, dict[str, object]]]:
    """Every row with its record: of an earlier call, where nothing changed since and it passed."""
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if uv is None:
        sys.exit("tests/installs.py needs uv: pip install uv")
    records.mkdir(parents=True, exist_ok=True)
    built, state = {}, digest()
    with tempfile.TemporaryDirectory(prefix="installs-") as made:
        scratch = Path(made)
        env = settings(scratch)
        for row in rows:
            path = records / f"{re.sub('[^a-z0-9.]+', '-', str(row))}.json"
            known = json.loads(path.read_text()) if path.exists() else {}
            if again or known.get("state") != state or known.get("failed"):
                begun = time.monotonic()
                known = {"row": str(row), "state": state, "failed": "", "versions": {}}
                try:
                    call((uv, "python", "find", row.python), scratch, env)
                except Failed:
                    yield row, known | {"absent": f"this machine has no Python {row.python}"}
                    continue
                try:
                    built = built or build(uv, scratch, env)
                    known["versions"] = attempt(row, uv, built, scratch, env)
                except Failed as error:
                    known["failed"] = str(error)
                known["seconds"] = round(time.monotonic() - begun)
                path.write_text(json.dumps(known, indent=1))
                for folder in ("env", "outside"):
                    shutil.rmtree(scratch / folder, ignore_errors=True)
                if "UV_CACHE_DIR" not in os.environ:
                    call((uv, "cache", "clean", "-q", "torch"), scratch, env)  # one Python's; the rest serves all
            yield row, known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help='a regular expression of rows, such as "3.13|lowest"')
    parser.add_argument("--records", type=Path, default=ROOT / "runs" / "installs", help="folder of the rows' records")
    parser.add_argument("--again", action="store_true", help="try rows that passed, too")
    parser.add_argument("--json", action="store_true", help="print the records instead of a table")
    options = parser.parse_args()
    rows = [row for row in ROWS if re.search(options.only, str(row))]
    found = []
    if not options.json:
        print("| row |", " | ".join(SHOWN), "| seconds | |\n|---|" + "---|" * (len(SHOWN) + 2))
    for row, record in tried(rows, options.records.resolve(), options.again):
        found.append(record)
        if not options.json:
            versions = [str(record["versions"].get(name, "")) for name in SHOWN]
            outcome = record.get("absent") or ("FAILED" if record["failed"] else "passed")
            print(f"| {row} |", " | ".join(versions), f"| {record.get('seconds', '')} | {outcome} |", flush=True)
            if record["failed"]:
                print(record["failed"], file=sys.stderr)
    if options.json:
        print(json.dumps(found, indent=1))
    sys.exit(any(record["failed"] for record in found))


if __name__ == "__main__":
    main()
