"""Time to the first training step, imports apart: from an empty cache, and from the one that this fills."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable

from tests.benchmarks.children import run_child
from tests.benchmarks.options import Options
from tests.benchmarks.tables import Row, Table
from tests.benchmarks.trainers import FIT, HAND_COMPILED, NUMPYRO
from tests.benchmarks.turns import hold_to, numbers_of_cores

CELLS = ((20, 1),)
CACHES = ("empty", "filled")
#: What is imported beforehand: for graphs of torch's, what its compiler imports when it is called.
COMPILER = ("compile_fx", "standalone_compile", "cpu_vec_isa", "codegen.cpp_wrapper_cpu")
INDUCTOR = ("torch", "pyro", *(f"torch._inductor.{name}" for name in COMPILER))
MODULES = {FIT: (*INDUCTOR, "pyrovae"), HAND_COMPILED: (*INDUCTOR, "torch._dynamo"), NUMPYRO: ("jax", "numpyro")}
FIGURES = ("imports", "seconds", "CPU", "of it the C++ compiler")


def run(options: Options) -> list[Table]:
    """Seconds of each contender's first step, in processes that start with an empty cache and with a filled one."""
    rows: list[Row] = []
    for cores in numbers_of_cores(options.cores, "cpu"):
        for batch, k in options.cells or CELLS:
            for name in options.contenders or MODULES:
                with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
                    for state in CACHES[: 1 if name == NUMPYRO else 2]:
                        print(f"first step: {cores} cores, {name}, cache {state}", file=sys.stderr)
                        found = run_child(
                            "first", name, batch, k, cores, environment={"TORCHINDUCTOR_CACHE_DIR": cache}
                        )
                        rows.append(
                            {"cores": cores, "batch": batch, "k": k, "contender": name, "cache": state, **found}
                        )
    note = "784-200-200-50, the loss of one batch and Adam. JAX keeps no cache on disk unless it is told to."
    return [Table("Seconds to the first step", ["cores", "batch", "k", "contender", "cache", *FIGURES], rows, [note])]


def step_of(name: str, batch: int, k: int) -> Callable[[], object]:
    """One training step, of a network that is there."""
    import torch

    import pyrovae as pv
    from tests.benchmarks import contenders

    vae = contenders.Setting("mlp", batch, k).vae()
    x = torch.rand(batch, *vae.input_shape).round()
    if name == NUMPYRO:
        from tests.benchmarks import jax_vae

        return lambda: next(jax_vae.epochs(jax_vae.weights(vae), k, x.flatten(1).numpy(), batch))
    if name == FIT:
        optimizer = contenders.adam(vae)
        return lambda: pv.training_step(vae.model, vae.guide, contenders.objective(k), optimizer, x)(x)
    return lambda: contenders.CONTENDERS[name](vae, k, x)(x)


def main(name: str, batch: int, k: int, cores: int) -> None:
    """Print the figures of one contender."""
    hold_to(cores)
    os.environ["JAX_PLATFORMS"] = "cpu"
    began = time.perf_counter()
    for module in MODULES[name]:
        importlib.import_module(module)
    imports = time.perf_counter() - began
    step = step_of(name, batch, k)
    began, spent = time.perf_counter(), os.times()
    step()
    seconds, now = time.perf_counter() - began, os.times()
    used = [now[i] - spent[i] for i in range(4)]  # by this process and by those that it started
    print(json.dumps(dict(zip(FIGURES, (imports, seconds, sum(used), used[2] + used[3]), strict=True))))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
