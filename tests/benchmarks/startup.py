"""CPU time to answer, to import, to the first step and to the end of the first command, in fresh processes.

The contenders take turns, each on one core's thread, and each figure is the least of its turns; ratios are to
``import torch, pyro`` in the same run.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from tests.benchmarks.children import run_child
from tests.benchmarks.options import ROOT, Options
from tests.benchmarks.tables import Row, Table

REPEATS = 3
TURNS = 5
BASE = "import torch, pyro"
TOUCHED = "import pyrovae as pv; pv.fit, pv.models.VAE, pv.log_likelihood"
PYROVAE = (sys.executable, "-m", "pyrovae")
COMPLETE = {"_PYROVAE_COMPLETE": "complete_bash", "COMP_WORDS": "pyrovae train --objective i", "COMP_CWORD": "3"}
#: What a user waits for: the command, what it finds in its environment, and its exit code.
QUICK: dict[str, tuple[Sequence[str], Mapping[str, str], int]] = {
    BASE: ((sys.executable, "-c", BASE), {}, 0),
    "pyrovae --help": ((*PYROVAE, "--help"), {}, 0),
    "pyrovae train --help": ((*PYROVAE, "train", "--help"), {}, 0),
    "pyrovae --version": ((*PYROVAE, "--version"), {}, 0),
    "pyrovae train vea": ((*PYROVAE, "train", "vea"), {}, 2),
    "pyrovae train --objective i⇥": (PYROVAE, COMPLETE, 0),
    "import pyrovae": ((sys.executable, "-c", "import pyrovae"), {}, 0),
    TOUCHED: ((sys.executable, "-c", TOUCHED), {}, 0),
    "import pythae.models": ((sys.executable, "-c", "import pythae.models"), {}, 0),
}
FIRST = (*PYROVAE, "train", "--device", "cpu")


def cpu_seconds(command: Sequence[str], environment: Mapping[str, str], code: int = 0) -> float | None:
    """What a process and its children take of a processor; None where it does not end as it should."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, capture_output=True, cwd=folder, env=variables)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime if done.returncode == code else None


def answers(turns: int = TURNS) -> list[Row]:
    """CPU time of each of :data:`QUICK`, and its ratio to the first."""
    took: dict[str, list[float | None]] = {name: [] for name in QUICK}
    for _ in range(turns):
        for name, quick in QUICK.items():
            took[name].append(cpu_seconds(*quick))
    least = {name: min(t for t in times if t is not None) for name, times in took.items() if None not in times}
    return [{"what": n, "CPU s": least[n], "of torch and pyro": least[n] / least[BASE]} for n in least]


def first_command() -> Row:
    """CPU time of ``pyrovae train`` on the embedded digits, all of it."""
    seconds = cpu_seconds(FIRST, {})
    return {"what": "pyrovae train"} | ({"error": "it failed"} if seconds is None else {"CPU s": seconds})


def child_step(contender: str, device: str) -> dict[str, float]:
    """Seconds to import the library, and to make the network and take one step with it."""
    began = time.perf_counter()
    importlib.import_module("pyrovae")
    from tests.benchmarks import contenders
    from tests.benchmarks.timing import block

    torch = importlib.import_module("torch")
    result = {"import, s": time.perf_counter() - began}
    x = torch.bernoulli(torch.full((100, 1, 28, 28), 0.13)).to(device)

    def first() -> None:
        contenders.CONTENDERS[contender](contenders.Setting().vae().to(device), 1, x)(x)

    result["first step, s"] = block(first, 1, device)
    return result | {"in all, s": sum(result.values())}


def median_of_children(*arguments: object, environment: dict[str, str] | None = None, repeats: int = REPEATS) -> Row:
    results = [run_child("startup", *arguments, environment=environment) for _ in range(repeats)]
    failed = next((r for r in results if "error" in r), None)
    return failed or {key: statistics.median(r[key] for r in results) for key in results[0]}


def run(options: Options) -> list[Table]:
    """Two tables: answers and imports, first steps."""
    from tests.benchmarks.contenders import COMPILED, HAND, HAND_COMPILED, OURS

    print("startup: answers, imports and first steps", file=sys.stderr)
    quick = [*answers(), first_command()]
    steps = [{"contender": n, "cache": ""} | median_of_children("step", n, options.device) for n in (HAND, OURS)]
    for name in (HAND_COMPILED, COMPILED):
        with tempfile.TemporaryDirectory() as folder:
            for cache, repeats in (("cold", 1), ("in the cache", REPEATS)):
                environment = {"TORCHINDUCTOR_CACHE_DIR": folder}
                found = median_of_children("step", name, options.device, environment=environment, repeats=repeats)
                steps.append({"contender": name, "cache": cache} | found)
    notes = [
        "Batch 100, k = 1, the MLP. The start of the interpreter itself is left out.",
        f"For {HAND} and {HAND_COMPILED} only the first step is theirs: the network here comes from pyrovae.",
    ]
    at = ["contender", "cache", "import, s", "first step, s", "in all, s", "error"]
    shown = at if any("error" in row for row in steps) else at[:-1]
    said = ["One thread. The interpreter's own start is in each, the ⇥ is a shell's request to complete."]
    first = Table("Answers and imports", ["what", "CPU s", "of torch and pyro"], quick, said)
    return [first, Table("First steps", shown, steps, notes)]


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    print(json.dumps(child_step(*rest) if kind == "step" else answers()))
