"""Time to import, and to the end of the first training step, in fresh processes."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import tempfile
import time

from tests.benchmarks.children import run_child
from tests.benchmarks.options import Options
from tests.benchmarks.tables import Row, Table

PACKAGES = ("torch", "pyro", "pyrovae", "pythae.models")
REPEATS = 3


def child_import(package: str) -> dict[str, float]:
    """Seconds to import a package."""
    began = time.perf_counter()
    importlib.import_module(package)
    return {"import, s": time.perf_counter() - began}


def child_step(contender: str, device: str) -> dict[str, float]:
    """Seconds to import the library, and to make the network and take one step with it."""
    result = child_import("pyrovae")
    from tests.benchmarks import contenders
    from tests.benchmarks.timing import block

    torch = importlib.import_module("torch")
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
    """Two tables: imports, first steps."""
    from tests.benchmarks.contenders import COMPILED, HAND, HAND_COMPILED, OURS

    print("startup: imports and first steps", file=sys.stderr)
    imports = [{"package": package} | median_of_children("import", package) for package in PACKAGES]
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
    return [Table("Imports", ["package", "import, s"], imports), Table("First steps", shown, steps, notes)]


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    print(json.dumps(child_import(*rest) if kind == "import" else child_step(*rest)))
