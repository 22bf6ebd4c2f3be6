r"""Tighter bounds are not always better: the signal-to-noise ratio of the gradient against the number of particles K.

    python examples/signal_to_noise.py [--repetitions 2000] [--particles 1 3 10 30 100] [--output runs/signal_to_noise]

The pair of Rainforth et al. (2018): z ~ N(mu, I), x ~ N(z, I), and a guide N(A x + b, 2/3 I) near its best. IWAE's
gradient of the model's mu gets clearer as sqrt(K), that of the guide's A and b drowns as 1/sqrt(K); the doubly
reparameterised gradient of the same bound (Tucker et al. 2018) rises as sqrt(K) too. Prints the ratios and their slopes
in log K, of which the theory speaks where K is large.
"""

import math
from pathlib import Path

import head
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyrovae as pv
from pyrovae.plots import charts, images


class Gaussian(nn.Module):
    """The model and a guide whose parameters lie near their best, A = I/2 and b = mu/2."""

    def __init__(self, dim=2):
        super().__init__()
        self.mu = nn.Parameter(0.3 * torch.randn(dim))
        self.a = nn.Parameter(0.5 * torch.eye(dim) + 0.05 * torch.randn(dim, dim))
        self.b = nn.Parameter(0.5 * self.mu.detach() + 0.1 * torch.randn(dim))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ self.a.T + self.b, (2 / 3) ** 0.5).to_event(1))


def measure(pair, x, numbers, repetitions):
    """By name, the signal-to-noise ratio at every number of particles."""
    found = {"model, IWAE": [], "guide, IWAE": [], "guide, IWAE with DReG": []}
    for k in numbers:
        plain, doubly = (
            pv.gradient_snr(pv.IWAE(k, gradient=gradient), pair.model, pair.guide, x, repetitions=repetitions)
            for gradient in ("total", "dreg")
        )
        for line, ratio in zip(found.values(), (plain.model, plain.guide, doubly.guide), strict=True):
            line.append(ratio)
    return found


def slope(numbers, line):
    """Of log ratio in log K, from K = 3 on; a ratio of 0 has drowned in noise."""
    known = [(math.log(k), math.log(ratio)) for k, ratio in zip(numbers, line, strict=True) if k >= 3 and ratio > 0]
    return np.polyfit(*np.transpose(known), 1)[0] if len(known) > 1 else math.nan


def draw(numbers, found, path):
    figure = charts.new_figure(5.4, 3.6)
    axes = charts.dress(figure.add_subplot(), title="signal-to-noise ratio of the gradient", x="particles K")
    for (name, line), colour in zip(found.items(), charts.class_colours(len(found)), strict=True):
        axes.plot(numbers, line, "o-", color=colour, markersize=4, label=f"{name}: slope {slope(numbers, line):+.2f}")
        theory, middle = -0.5 if name == "guide, IWAE" else 0.5, len(numbers) // 2
        expected = line[middle] * (np.array(numbers) / numbers[middle]) ** theory
        axes.plot(numbers, expected, ":", color=colour, linewidth=1)
    axes.plot([], [], ":", color=charts.IDLE, label="slopes of +1/2 and -1/2")
    axes.set(xscale="log", yscale="log")
    charts.add_legend(axes)
    images.save(figure, path)


def main():
    options = head.options(
        __doc__,
        repetitions=(2000, "gradients at every K"),
        particles={"nargs": "+", "type": int, "default": [1, 3, 10, 30, 100], "help": "numbers of particles K"},
        batch=(256, "data in the batch"),
        output=Path("runs/signal_to_noise"),
    )
    torch.manual_seed(0)
    pair, x = Gaussian(), math.sqrt(2) * torch.randn(options.batch, 2)
    found = measure(pair, x, options.particles, options.repetitions)
    print(f"{'K':>23} " + " ".join(f"{k:>7}" for k in options.particles) + "   slope")
    for name, line in found.items():
        ratios = " ".join(f"{ratio:7.3f}" for ratio in line)
        print(f"{name:>23} {ratios}   {slope(options.particles, line):+.2f}")
    path = options.output / "signal_to_noise.png"
    draw(options.particles, found, path)
    print(f'picture in "{path}"')


if __name__ == "__main__":
    main()
