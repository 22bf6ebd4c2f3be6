"""Peak memory of evaluations and of training steps, each in a process of its own.

An evaluation's peak must not grow with the number of images beyond the data and the results themselves. On CUDA it is
the allocator's peak, elsewhere the resident size; peaks count from that of a process that only builds the model.

Beside them stands what was predicted: the tensors that a trace on few data has alive at its peak, for all of them.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.children import run_child
from tests.benchmarks.options import Options
from tests.benchmarks.tables import Row, Table

IMAGES = (100, 400, 1600)
CELLS = ((1, 1), (100, 1), (100, 50), (1000, 1), (1000, 50))
STEPS = 5


def peak(device: str) -> float:
    """MiB at most, so far."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # a child's ru_maxrss begins at its parent's
        lines = (line.split() for line in status.read_text().splitlines())
        return next(int(line[1]) for line in lines if line[0] == "VmHWM:") / 1024
    per_mib = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_mib


def child_evaluation(device: str, images: int, samples: int) -> dict[str, float]:
    """Peak and seconds of an evaluation of so many images; none at all is the start."""
    import torch

    import pyrovae as pv

    torch.manual_seed(0)
    vae = pv.models.VAE((1, 28, 28), latent_dim=50).to(device)
    x = pv.data.Images(torch.full((max(images, 1), 1, 28, 28), 0.2), binarization="dynamic")
    began = time.perf_counter()
    if images:
        pv.log_likelihood(vae.model, vae.guide, x, num_samples=samples, seed=0)
    found = {"peak": peak(device), "seconds": time.perf_counter() - began}
    if images and not device.startswith("cuda"):
        from pyrovae.memory import PeakBytes

        with PeakBytes() as used:  # of one batch, however many there are
            pv.log_likelihood(vae.model, vae.guide, x.fixed().x[:100], num_samples=samples, seed=0, compile=False)
        found["predicted"] = used.peak / 2**20
    return found


def child_step(device: str, contender: str, batch: int, k: int) -> dict[str, float]:
    """Peak of some training steps; a batch of zero is the start."""
    import torch

    from tests.benchmarks.contenders import CONTENDERS, Setting

    vae = Setting().vae().to(device)
    if batch:
        x = torch.bernoulli(torch.full((batch, 1, 28, 28), 0.2)).to(device)
        step = CONTENDERS[contender](vae, k, x)
        for _ in range(STEPS):
            step(x)
        return {"peak": peak(device), "predicted": predicted(vae, k, x)}
    return {"peak": peak(device)}


def predicted(vae: Any, k: int, x: Any) -> float:
    """MiB of a step as :func:`pyrovae.fit` predicts them: its tensors, with Adam's moments."""
    import torch

    import pyrovae as pv
    from pyrovae.memory import bytes_at_peak

    objective, parameters = pv.IWAE(k), list(vae.parameters())

    def step(n: int) -> object:
        return torch.autograd.grad(objective.differentiable_loss(vae.model, vae.guide, x[:n]), parameters)

    return (bytes_at_peak(step, len(x)) + 2 * sum(p.nbytes for p in parameters)) / 2**20


def evaluations(options: Options) -> Table:
    """Peak and rate by the number of images."""
    rows: list[Row] = []
    start = run_child("memory", "evaluation", options.device, 0, options.samples)
    for images in IMAGES:
        print(f"memory: {images} images", file=sys.stderr)
        found = run_child("memory", "evaluation", options.device, images, options.samples)
        rate = {"images x samples / s": images * options.samples / found["seconds"]} if "seconds" in found else {}
        own = {"predicted, MiB": found.get("predicted"), **_above(found, start), **rate}
        rows.append({"images": images, "samples": options.samples, **own})
    columns = ["images", "samples", "predicted, MiB", "peak above start, MiB", "images x samples / s"]
    return Table("Memory of an evaluation (pyrovae, the MLP)", columns, rows)


def training(options: Options) -> Table:
    """Peak by contender and size."""
    from tests.benchmarks.contenders import COMPILED, HAND, HAND_COMPILED, OURS, PYTHAE, SVI_FAST

    rows: list[Row] = []
    names = options.contenders or (OURS, COMPILED, SVI_FAST, HAND, HAND_COMPILED, PYTHAE)
    start = run_child("memory", "step", options.device, HAND, 0, 1)
    for batch, k in options.cells or CELLS:
        print(f"memory: steps, batch {batch}, k {k}", file=sys.stderr)
        found = {name: run_child("memory", "step", options.device, name, batch, k) for name in names}
        peaks = {name: _above(result, start)["peak above start, MiB"] for name, result in found.items()}
        rows.append({"batch": batch, "k": k, "predicted": found[names[0]].get("predicted"), **peaks, "details": found})
    notes = ["MiB above a process that builds the model. Compiled: with the compiler itself, which batch 1, k 1 shows."]
    return Table("Memory of training steps (the MLP)", ["batch", "k", "predicted", *names], rows, notes)


def _above(found: dict[str, Any], start: dict[str, Any]) -> dict[str, float | None]:
    known = "peak" in found and "peak" in start
    return {"peak above start, MiB": found["peak"] - start["peak"] if known else None}


def run(options: Options) -> list[Table]:
    return [evaluations(options), training(options)]


if __name__ == "__main__":
    kind, device, *rest = sys.argv[1:]
    if kind == "evaluation":
        print(json.dumps(child_evaluation(device, *map(int, rest))))
    else:
        print(json.dumps(child_step(device, rest[0], int(rest[1]), int(rest[2]))))
