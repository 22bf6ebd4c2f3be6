r"""How the bound of k particles rises to log p(x), where that is known: a linear Gaussian pair, and a trained VAE.

    python examples/bound_against_k.py [--epochs 30] [--images 100] [--draws 4096] [--output runs/bound_against_k]

With k particles the importance-weighted bound is the expected log of the mean of k weights w. It never falls as k
grows, and its distance from log p(x) shrinks like Var[w] / (2 k p(x)^2), as long as that variance is finite. Prints,
for every k, the mean bound over data, the distance with its standard error, and the slope of log distance in log k. For
the linear pair log p(x) is a Gaussian's density, for the VAE of two latent units an integral over a plane.
"""

import math
from pathlib import Path

import head
import numpy as np
import torch
from agreement import linear_pair, quadrature

import pyrovae as pv
from pyrovae.plots import charts, images


def gaps(model, guide, x, exact, draws):
    """The distances from log p(x), averaged over ``x``, and their standard errors, by k = 1, 2, 4 to draws / 16.

    With r the mean of k ratios w / p(x), whose expectation is 1, the distance is E[-log r] = E[r - 1 - log r]. What is
    averaged is the latter, as no term of it is negative. The same draws serve every k, in groups of k: by Jensen's
    inequality no distance is then above that of a smaller k.
    """
    ratios = (pv.log_weights(model, guide, x, num_particles=draws).double() - exact).exp()
    rows = {}
    for k in (2**i for i in range(int(math.log2(draws)) - 3)):
        r = ratios.unflatten(0, (-1, k)).mean(1)
        distances = (r - 1 - r.log()).mean(1)
        rows[k] = distances.mean().item(), (distances.std() / math.sqrt(len(distances))).item()
    return rows


def show(name, rows, exact):
    print(f"{name}: exact log p(x) {exact:.4f} nats")
    for k, (gap, error) in rows.items():
        print(f"{k:>6}  bound {exact - gap:10.4f}  below by {gap:.4f} ± {error:.4f}")
    print(f"slope of log distance in log k, over the last half: {slope(rows):+.2f}")


def slope(rows):
    """Of log distance in log k, over the last half of all k."""
    k, gap = np.transpose([(k, gap) for k, (gap, _) in rows.items()][len(rows) // 2 :])
    return np.polyfit(np.log(k), np.log(gap), 1)[0]


def draw(found, path):
    figure = charts.new_figure(7.6, 3.4)
    left, right = figure.subplots(1, 2)
    charts.dress(left, title="bound, nats above that of k = 1", x="particles k")
    charts.dress(right, title="log p(x) - bound, nats", x="particles k")
    for (name, rows), colour in zip(found.items(), (charts.BLUE, charts.ORANGE), strict=True):
        k, gap = np.array(list(rows)), np.array([gap for gap, _ in rows.values()])
        left.plot(k, gap[0] - gap, "o-", color=colour, markersize=4, label=name)
        left.axhline(gap[0], color=colour, linestyle="--", linewidth=1, label="its exact log p(x)")
        right.plot(k, gap, "o-", color=colour, markersize=4, label=f"{name}: slope {slope(rows):.2f}")
        right.plot(k, gap[-1] * k[-1] / k, ":", color=colour, linewidth=1)
    right.plot([], [], ":", color=charts.IDLE, label="slope -1")
    left.set(xscale="log")
    right.set(xscale="log", yscale="log")
    for axes in (left, right):
        charts.add_legend(axes)
    images.save(figure, path)


def main():
    options = head.options(
        __doc__,
        epochs=30,
        images=(100, "data to measure on"),
        draws=(4096, "draws for each of them, a power of 2"),
        output=Path("runs/bound_against_k"),
    )
    torch.manual_seed(0)
    model, guide, marginal = linear_pair()
    y = marginal.sample((options.images,))
    exact = {"linear Gaussian": marginal.log_prob(y)}
    found = {"linear Gaussian": gaps(model, guide, y, exact["linear Gaussian"], options.draws)}

    digits = pv.data.load("digits", binarization="dynamic")
    vae = pv.models.VAE((1, 8, 8), latent_dim=2, hidden=(64,)).initialise(digits.train.x)
    pv.fit(vae.model, vae.guide, digits.train, objective=pv.ELBO(), epochs=options.epochs)
    vae.cpu()  # where the data are
    x, name = digits.test.x[: options.images], "VAE of two units"
    exact[name] = quadrature(vae, x)
    found[name] = gaps(vae.model, vae.guide, x, exact[name], options.draws)

    for name, rows in found.items():
        show(name, rows, exact[name].mean())
    path = options.output / "bound_against_k.png"
    draw(found, path)
    print(f'picture in "{path}"')


if __name__ == "__main__":
    main()
