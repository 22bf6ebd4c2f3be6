"""Milliseconds per eager training step, beside hand-written PyTorch and Pyro's SVI, in one process.

    python tests/benchmarks/steps.py [--seconds 3] [--json steps.json]

Same network (784-200-200-50, tanh, Bernoulli), same optimizer (fused Adam; Pyro has its own), data of MNIST's size. The
contenders take turns step by step, so that what else runs on the machine hits all of them; medians are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, RenyiELBO
from torch import Tensor, nn
from torch.distributions import Normal

import pyrovae as pv

GRID = [(20, 1), (20, 5), (20, 50), (100, 1), (100, 5), (100, 50)]


def network() -> pv.models.VAE:
    torch.manual_seed(0)
    return pv.models.VAE((1, 28, 28), latent_dim=50)


def hand_written(x: Tensor, k: int) -> Callable[[], None]:
    """IWAE as one writes it without a library: logits, binary cross entropy, softmax weights, fused Adam."""
    vae = network()
    optimizer = torch.optim.Adam(vae.parameters(), fused=True)
    prior = Normal(0.0, 1.0, validate_args=False)

    def step() -> None:
        mean, log_scale = vae.encoder(x).chunk(2, -1)
        posterior = Normal(mean, log_scale.exp(), validate_args=False)
        z = posterior.rsample((k,))
        logits = vae.decoder(z)
        target = x.expand_as(logits)
        log_px = -nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none").sum((-1, -2, -3))
        log_w = log_px + prior.log_prob(z).sum(-1) - posterior.log_prob(z).sum(-1)
        loss = -(torch.softmax(log_w.detach(), 0) * log_w).sum() / len(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def ours(x: Tensor, k: int) -> Callable[[], None]:
    """The same through the library's objective."""
    vae, objective = network(), pv.IWAE(k)
    optimizer = torch.optim.Adam(vae.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (objective.differentiable_loss(vae.model, vae.guide, x) / len(x)).backward()
        optimizer.step()

    return step


def pyro_svi(x: Tensor, k: int) -> Callable[[], None]:
    """Pyro's own vectorised RenyiELBO at alpha = 0, with its optimizer and its default validation."""
    vae = network()

    def model(x: Tensor) -> None:
        pyro.module("vae", vae)
        vae.model(x)

    objective = RenyiELBO(alpha=0, num_particles=k, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), objective)
    return lambda: svi.step(x)


CONTENDERS = {"hand-written": hand_written, "pyrovae": ours, "Pyro SVI": pyro_svi}


def measure(batch: int, k: int, seconds: float) -> dict[str, float]:
    """Median milliseconds per step of each contender, taking turns for ``seconds`` in all."""
    pyro.clear_param_store()
    x = torch.bernoulli(torch.full((batch, 1, 28, 28), 0.2))
    steps = {name: make(x, k) for name, make in CONTENDERS.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(5):
            step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["pyrovae"]) < 10:
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'batch':>5} {'k':>3} " + " ".join(f"{name:>13}" for name in CONTENDERS) + f" {'/ hand':>8} {'/ SVI':>7}")
    for batch, k in GRID:
        ms = measure(batch, k, options.seconds)
        ratios = ms["pyrovae"] / ms["hand-written"], ms["pyrovae"] / ms["Pyro SVI"]
        rows.append({"batch": batch, "k": k, **ms, "of_hand_written": ratios[0], "of_svi": ratios[1]})
        print(
            f"{batch:5} {k:3} " + " ".join(f"{v:10.2f} ms" for v in ms.values()) + f" {ratios[0]:8.2f} {ratios[1]:7.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
