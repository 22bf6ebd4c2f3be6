"""Training throughput of one process with as many threads, and of several processes with one each.

    python tests/benchmarks/processes.py --batch-size 200 --particles 50 --processes 2

IWAE's network for 28 x 28 bits, compiled; of each the best epoch, in turns. Data are drawn, as only time counts. Last,
processes that each train a pair of their own on their share of a batch and never add up: what the best way to add up
could come to; and how long adding up so many numbers takes by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings

import torch
from torch import distributed


def rate(batch_size: int, particles: int, steps: int, epochs: int) -> float:
    """The best epoch's data per second, in this process with the others of its group; epochs begin together."""
    import pyrovae as pv

    torch.manual_seed(0)
    x = torch.rand(batch_size * steps, 784, generator=torch.Generator().manual_seed(1))
    vae = pv.models.VAE((784,), latent_dim=50, hidden=(200, 200))
    data = pv.data.Images(x, binarization="dynamic")
    options = {"batch_size": batch_size, "compile": True, "progress": False}
    begins = distributed.barrier if distributed.is_initialized() else None
    found = pv.fit(
        vae.model, vae.guide, data, objective=pv.IWAE(particles), epochs=epochs,
        on_epoch=None if begins is None else lambda fit: begins(), **options,
    )  # fmt: skip
    assert found.timings["path"] == "compiled"
    return max(row["images_per_second"] for row in found.history)


def adding_up() -> float:
    """Milliseconds in which all processes have the sum of as many numbers as the network has weights."""
    numbers, found = torch.zeros(425_284), []
    for _ in range(100):
        distributed.barrier()
        began = time.perf_counter()
        distributed.all_reduce(numbers)
        found.append(1e3 * (time.perf_counter() - began))
    return sorted(found)[len(found) // 2]


def member(rank: int, size: int, folder: str, apart: str, *settings: str) -> None:
    """One process of a group; the first prints what came: data per second, and milliseconds of adding up."""
    if size > 1:
        meeting = f"file://{folder}/meeting"
        distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    warnings.simplefilter("ignore")
    if apart:
        import pyrovae as pv

        with pv.ranks.alone():
            batch_size, *others = map(int, settings)
            found = size * rate(batch_size // size, *others)
    else:
        found = rate(*map(int, settings))
    took = adding_up() if size > 1 else 0.0
    if rank == 0:
        print(json.dumps((found, took)))


def of(processes: int, threads: int, settings: list[str], apart: str = "") -> tuple[float, float]:
    """What so many processes of so many threads come to."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--member"]
        each = [
            subprocess.Popen(
                [*command, str(rank), str(processes), folder, apart, *settings], stdout=subprocess.PIPE, text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            )
            for rank in range(processes)
        ]  # fmt: skip
        said = [one.communicate()[0] for one in each]
        return tuple(json.loads(said[0]))


def main() -> None:
    if sys.argv[1:2] == ["--member"]:
        member(int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"batch-size": 200, "particles": 50, "processes": 2, "steps": 10, "epochs": 4, "turns": 2}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    settings = [str(n) for n in (given.batch_size, given.particles, given.steps, given.epochs)]
    number = given.processes
    ways = {"one": (1, number, settings), "several": (number, 1, settings), "apart": (number, 1, settings, "apart")}
    found = [{name: of(*way) for name, way in ways.items()} for _ in range(given.turns)]
    one, several, apart = (max(turn[name][0] for turn in found) for name in ways)
    took = min(turn["several"][1] for turn in found)
    print(f"batch {given.batch_size}, k = {given.particles}: {given.processes} threads {one:,.0f} data/s")
    print(f"{given.processes} processes of one thread {several:,.0f} data/s, {several / one:.2f} times as many")
    print(f"that never add up {apart:,.0f} data/s, {apart / one:.2f}; adding up alone takes {took:.1f} ms")


if __name__ == "__main__":
    main()
