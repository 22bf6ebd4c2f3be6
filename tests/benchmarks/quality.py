"""Time to quality: how good MNIST's one-layer network gets in how many minutes, by each contender.

    python tests/benchmarks/quality.py compiled --minutes 30 --out runs/quality
    python tests/benchmarks/quality.py --plot --out runs/quality

All train with the same settings: batches of 100 with dynamic binarisation, IWAE with k = 1, 5, 20 in 6, 11 and 3
parts of the epochs, doubly reparameterised gradients where the contender has them (Pyro's RenyiELBO has not), Adam
with a learning rate that falls linearly from 3e-3 to nothing. Each gets as many epochs as fit into the minutes, by a
short measurement of its own steps; compiling is on the clock. Twenty times on the way 1,000 test images are measured
with 500 samples, off the clock; in the end all 10,000, with 5,000 or as asked.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyro
import torch
from pyro.infer import SVI, RenyiELBO
from torch import Tensor

import pyrovae as pv
from pyrovae.schedules import linear
from pyrovae.train.compiled import training_step
from tests.benchmarks import contenders, images

PARTS = (1,) * 6 + (5,) * 11 + (20,) * 3
STAGES = tuple(dict.fromkeys(PARTS))
RATE, BATCH, POINTS, CALIBRATION = 3e-3, 100, 20, 12

Step = Callable[[Tensor, float], Any]  # a batch and the learning rate


def _with_rate(optimizer: torch.optim.Optimizer, step: Callable[[Tensor], Any]) -> Step:
    def at_rate(x: Tensor, rate: float) -> Any:
        for group in optimizer.param_groups:
            group["lr"] = rate
        return step(x)

    return at_rate


def compiled(vae: pv.models.VAE, x: Tensor, precision: str = "float32") -> list[Step]:
    """The library's compiled step."""
    optimizer = torch.optim.Adam(vae.parameters(), fused=True)
    steps = [training_step(vae.model, vae.guide, _dreg(k), optimizer, x, precision=precision) for k in STAGES]
    return [_with_rate(optimizer, step) for step in steps]


def bfloat16(vae: pv.models.VAE, x: Tensor) -> list[Step]:
    """The library's compiled step, networks in bfloat16."""
    return compiled(vae, x, "bfloat16")


def eager(vae: pv.models.VAE, x: Tensor) -> list[Step]:
    """The library's eager step."""
    optimizer = torch.optim.Adam(vae.parameters(), fused=True)

    def make(objective: pv.Objective) -> Step:
        def step(x: Tensor) -> None:
            optimizer.zero_grad()
            (objective.differentiable_loss(vae.model, vae.guide, x) / len(x)).backward()
            optimizer.step()

        return _with_rate(optimizer, step)

    return [make(_dreg(k)) for k in STAGES]


def hand(vae: pv.models.VAE, x: Tensor) -> list[Step]:
    """Plain PyTorch, doubly reparameterised by a hook on the samples."""
    optimizer = torch.optim.Adam(vae.parameters(), fused=True)

    def make(k: int) -> Step:
        def step(x: Tensor) -> None:
            optimizer.zero_grad()
            z, log_w = contenders.fixed_log_weights(vae, x, k)
            weights = log_w.detach().softmax(0)
            z.register_hook(lambda gradient: weights.unsqueeze(-1) * gradient)
            (-(weights * log_w).sum() / len(x)).backward()
            optimizer.step()

        return _with_rate(optimizer, step)

    return [make(k) for k in STAGES]


def svi(vae: pv.models.VAE, x: Tensor) -> list[Step]:
    """Pyro's SVI with its vectorised RenyiELBO at alpha = 0."""
    optimizer = pyro.optim.Adam({"lr": RATE})  # type: ignore[attr-defined]

    def model(x: Tensor) -> None:
        pyro.module("vae", vae)
        vae.model(x)

    def make(k: int) -> Step:
        objective = RenyiELBO(alpha=0, num_particles=k, vectorize_particles=True, max_plate_nesting=1)
        step = SVI(model, vae.guide, optimizer, objective).step

        def at_rate(x: Tensor, rate: float) -> None:
            for each in optimizer.optim_objs.values():
                for group in each.param_groups:
                    group["lr"] = rate
            step(x)

        return at_rate

    return [make(k) for k in STAGES]


CONTENDERS = {"compiled": compiled, "bfloat16": bfloat16, "eager": eager, "hand": hand, "svi": svi}


def _dreg(k: int) -> pv.IWAE:
    return pv.IWAE(k, gradient="dreg")


def _network(train: pv.data.Images) -> pv.models.VAE:
    torch.manual_seed(0)
    return pv.models.VAE(train.event_shape).initialise(train.x)


def _batch(images: pv.data.Images, index: Tensor) -> Tensor:
    x = images.batch(index)
    assert isinstance(x, Tensor)  # unlabelled
    return x


def epochs_in(minutes: float, make: Callable[..., list[Step]], train: pv.data.Images) -> int:
    """How many epochs fit into the minutes, by a few steps of each stage."""
    vae, x = _network(train), _batch(train, torch.arange(BATCH))
    seconds = 0.0
    for k, step in zip(STAGES, make(vae, x), strict=True):
        for _ in range(CALIBRATION // 3):
            step(x, RATE)
        times = []
        for _ in range(CALIBRATION):
            began = time.perf_counter()
            step(x, RATE)
            times.append(time.perf_counter() - began)
        seconds += sorted(times)[len(times) // 2] * PARTS.count(k) / len(PARTS)
    pyro.clear_param_store()
    return max(len(PARTS), int(60 * minutes / (seconds * len(train) / BATCH)))


def train(name: str, minutes: float, samples: int, data: pv.data.Images, test: pv.data.Images, out: Path) -> None:
    """One contender's run; its curve and its end go into ``out``."""
    make = CONTENDERS[name]
    epochs = epochs_in(minutes, make, data)
    vae, number = _network(data), len(data)
    few, curve = test.subset(slice(0, 1000)), []
    began = time.perf_counter()
    steps = dict(zip(STAGES, make(vae, _batch(data, torch.arange(BATCH))), strict=True))
    clock = time.perf_counter() - began
    print(f"{name}: {epochs} epochs")
    for epoch in range(epochs):
        began = time.perf_counter()
        step = steps[PARTS[epoch * len(PARTS) // epochs]]
        for i, index in enumerate(torch.randperm(number).split(BATCH)):
            step(_batch(data, index), RATE * linear((epoch + i * BATCH / number) / epochs))
        clock += time.perf_counter() - began
        if (epoch + 1) * POINTS // epochs > epoch * POINTS // epochs:
            nll = pv.log_likelihood(vae.model, vae.guide, few, num_samples=500, seed=0, compile=True).nll
            curve.append({"epoch": epoch + 1, "minutes": clock / 60, "nll": nll})
            print(f"{name}: epoch {epoch + 1}, {clock / 60:.1f} min, {nll:.2f} nats", flush=True)
            _write(out / f"{name}.json", {"name": name, "epochs": epochs, "curve": curve})
    estimate = pv.log_likelihood(vae.model, vae.guide, test, num_samples=samples, seed=0, compile=True)
    final = {"nll": estimate.nll, "std_error": estimate.nll_std_error, "samples": samples, "minutes": clock / 60}
    print(f"{name}: {estimate} after {clock / 60:.1f} min")
    _write(out / f"{name}.json", {"name": name, "epochs": epochs, "curve": curve, "final": final})


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def plot(out: Path) -> Path:
    """Nats against minutes, of all contenders that have run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for path in sorted(out.glob("*.json")):
        result = json.loads(path.read_text())
        ends = f": {result['final']['nll']:.2f}" if "final" in result else ""
        points = [p for p in result["curve"] if math.isfinite(p["nll"])]
        axes.plot([p["minutes"] for p in points], [p["nll"] for p in points], marker=".", label=result["name"] + ends)
    axes.set(xlabel="minutes of training", ylabel="test NLL, 1,000 images, 500 samples (nats)", ylim=(84, 100))
    axes.legend()
    figure.tight_layout()
    figure.savefig(out / "quality.png", dpi=150)
    return out / "quality.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("contender", nargs="?", choices=CONTENDERS)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--samples", type=int, default=5000, help="of the last measurement")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--plot", action="store_true")
    options = parser.parse_args()
    if options.contender:
        data, test = images.load(options.data_dir)[:2]
        train(options.contender, options.minutes, options.samples, data, test, options.out)
    if options.plot:
        print(plot(options.out))


if __name__ == "__main__":
    main()
