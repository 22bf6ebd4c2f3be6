"""Training throughput of one process with as many threads, and of several processes with one each.

    python tests/benchmarks/processes.py --batch-size 200 --particles 50 --processes 2

IWAE's network for 28 x 28 bits, compiled; of each the best epoch, in turns. Data are drawn, as only time counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings

import torch
from torch import distributed


def rate(batch_size: int, particles: int, steps: int, epochs: int) -> float:
    """The best epoch's data per second, in this process with the others of its group."""
    import pyrovae as pv

    torch.manual_seed(0)
    x = torch.rand(batch_size * steps, 784, generator=torch.Generator().manual_seed(1))
    vae = pv.models.VAE((784,), latent_dim=50, hidden=(200, 200))
    data = pv.data.Images(x, binarization="dynamic")
    options = {"batch_size": batch_size, "compile": True, "progress": False}
    found = pv.fit(vae.model, vae.guide, data, objective=pv.IWAE(particles), epochs=epochs, **options)
    assert found.timings["path"] == "compiled"
    return max(row["images_per_second"] for row in found.history)


def member(rank: int, size: int, folder: str, *settings: str) -> None:
    """One process of a group; the first prints what came."""
    if size > 1:
        meeting = f"file://{folder}/meeting"
        distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    warnings.simplefilter("ignore")
    found = rate(*map(int, settings))
    if rank == 0:
        print(json.dumps(found))


def of(processes: int, threads: int, settings: list[str]) -> float:
    """The rate of so many processes of so many threads."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--member"]
        each = [
            subprocess.Popen(
                [*command, str(rank), str(processes), folder, *settings], stdout=subprocess.PIPE, text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            )
            for rank in range(processes)
        ]  # fmt: skip
        said = [one.communicate()[0] for one in each]
        return float(json.loads(said[0]))


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
    one = several = 0.0
    for _ in range(given.turns):
        one = max(one, of(1, given.processes, settings))
        several = max(several, of(given.processes, 1, settings))
    print(f"batch {given.batch_size}, k = {given.particles}: {given.processes} threads {one:,.0f} data/s")
    print(f"{given.processes} processes of one thread {several:,.0f} data/s, {several / one:.2f} times as many")


if __name__ == "__main__":
    main()
