"""Beta as a dial: VAEs trained with the KL weighted by beta, in the plane of rate and distortion.

    python examples/rate_distortion.py [--data mnist] [--epochs 100] [--betas 0.3 1 3] [--output runs/rate_distortion]

The rate is the KL, what the code of a datum costs; the distortion is -E log p(x | z), what is lost with it; the two add
up to minus the ELBO, on test data here. A larger beta buys a lower rate with more distortion, along a falling curve
whose slope is -beta; the sum is least near beta = 1, which trains the ELBO itself.
Alemi et al. (2018), *Fixing a broken ELBO*.
"""

from pathlib import Path

import head
import torch
from loss_parts import measure

import pyrovae as pv
from pyrovae.plots import charts, images


def draw(rows, path):
    figure = charts.new_figure(4.8, 3.8)
    axes = charts.dress(figure.add_subplot(), x="rate: KL, nats", y="distortion: -E log p(x | z), nats")
    betas, distortion, rate = zip(*rows, strict=True)
    axes.plot(rate, distortion, "o-", color=charts.BLUE, markersize=5)
    for beta, x, y in zip(betas, rate, distortion, strict=True):
        axes.annotate(f"beta {beta:g}", (x, y), (6, 3), textcoords="offset points", fontsize=8, color=images.INK)
    best = min(x + y for x, y in zip(rate, distortion, strict=True))
    axes.plot(
        [0, max(rate)],
        [best, best - max(rate)],
        "--",
        color=charts.ORANGE,
        label=f"slope -1: a sum of {best:.1f}, the least",
    )
    axes.set_ylim(bottom=min(distortion) - 1)
    axes.margins(x=0.15)
    charts.add_legend(axes)
    images.save(figure, path)


def main():
    options = head.options(
        __doc__,
        data="digits",
        epochs=100,
        latent_dim=10,
        samples=500,
        betas={"nargs": "+", "type": float, "default": [0.1, 0.3, 0.6, 1, 1.5, 2.5, 5], "help": "weights of the KL"},
        output=Path("runs/rate_distortion"),
    )
    data = head.load(options, binarization="dynamic")
    test = data.test.subset(slice(2000))
    rows = []
    for beta in sorted(options.betas):
        torch.manual_seed(0)
        vae = pv.models.VAE(data.train.event_shape, options.latent_dim, hidden=(200,)).initialise(data.train.x)
        objective = pv.ELBO(kl_weight=beta)
        pv.fit(vae.model, vae.guide, data.train, objective=objective, epochs=options.epochs, lr=2e-3, schedule="cosine")
        _, reconstruction, kl, estimate = measure(vae, test, options.samples)
        rows.append((beta, -reconstruction.item(), kl.item()))
        print(
            f"beta {beta:4g}  rate {kl:6.2f}  distortion {-reconstruction:6.2f}  "
            f"sum {kl - reconstruction:6.2f}  -log p(x) {estimate.nll:6.2f}"
        )
    path = options.output / "rate_distortion.png"
    draw(rows, path)
    print(f'picture in "{path}"')


if __name__ == "__main__":
    main()
