r"""Why a bound of many samples rises to log p(x), and why a Gaussian prior loses nothing.

    python examples/why_many_samples.py [--repeats 100000] [--output runs/why_many_samples]

The importance-weighted bound is the expected log of a mean of k weights. Here a weight X is a or b with probability
1/2, so that all is known: for k = 1 the bound is the mean of logs; as k grows it never falls, and its distance from
log E[X] shrinks like Var[X] / (2 k E[X]^2). Prints the exact bound, its simulation and that distance.

The second picture is g(z) = z / 10 + z / |z|, which turns draws from a plain two-dimensional Gaussian into a ring: what
the prior lacks, a decoder makes.
"""

import math
from pathlib import Path

import head
import numpy as np
import torch
from matplotlib.figure import Figure

BLUE, ORANGE = "#2f6796", "#d0743c"


def exact_bound(a, b, k):
    """E log of the mean of k values, each a or b with probability 1/2: a sum over how many of them are b."""
    j = torch.arange(k + 1, dtype=torch.float64)
    log_choose = math.lgamma(k + 1) - torch.lgamma(j + 1) - torch.lgamma(k - j + 1)
    return ((log_choose - k * math.log(2)).exp() * ((a * (k - j) + b * j) / k).log()).sum().item()


def simulated_bound(a, b, k, repeats):
    """The same by drawing: its mean and standard error."""
    j = torch.distributions.Binomial(k, torch.tensor(0.5)).sample((repeats,)).double()
    log_mean = ((a * (k - j) + b * j) / k).log()
    return log_mean.mean().item(), log_mean.std().item() / math.sqrt(repeats)


def ring(z):
    """g(z) = z / 10 + z / |z|."""
    return z / 10 + z / z.norm(dim=-1, keepdim=True)


def bounds(a, b, numbers, repeats, path):
    log_mean = math.log((a + b) / 2)
    spread = ((b - a) / (a + b)) ** 2  # Var[X] / E[X]^2
    print(f"X is {a:g} or {b:g}: log E[X] = {log_mean:.4f}, E[log X] = {math.log(a * b) / 2:.4f}")
    print(f"{'k':>6} {'E log k-mean':>13} {'simulated':>20} {'below log E[X]':>15} {'Var / (2 k E^2)':>16}")
    exact = []
    for k in numbers:
        exact.append(exact_bound(a, b, k))
        mean, error = simulated_bound(a, b, k, repeats)
        simulated = f"{mean:.4f} ± {error:.4f}"
        print(f"{k:>6} {exact[-1]:>13.4f} {simulated:>20} {log_mean - exact[-1]:>15.4f} {spread / (2 * k):>16.4f}")
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="k", ylabel="nats", title="the log of a mean of k, expected")
    axes.axhline(log_mean, color=ORANGE, label="log E[X]")
    axes.plot(numbers, exact, color=BLUE, marker="o", label="E log of a k-mean")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def gaussian_and_ring(number, path):
    z = torch.randn(number, 2)
    radius = ring(z).norm(dim=-1)
    print(f"g(z) = z/10 + z/|z| of {number} Gaussian draws: radius {radius.mean():.3f} ± {radius.std():.3f}")
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    for i, (points, title) in enumerate(((z, "z ~ N(0, I)"), (ring(z), "g(z) = z/10 + z/|z|"))):
        axes = figure.add_subplot(1, 2, i + 1, aspect="equal", title=title)
        axes.scatter(*np.asarray(points).T, s=2, color=BLUE, linewidths=0)
    figure.savefig(path, dpi=150)


def main():
    options = head.options(__doc__, repeats=100_000, output=Path("runs/why_many_samples"))
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    numbers = [1, 2, 3, 5, 10, 20, 50, 100, 1000]
    bounds(1.0, 100.0, numbers, options.repeats, options.output / "bounds.png")
    gaussian_and_ring(2000, options.output / "ring.png")
    print(f'pictures in "{options.output}": bounds.png, ring.png')


if __name__ == "__main__":
    main()
