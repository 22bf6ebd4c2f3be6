"""How many latent units? VAEs of 2, 5, 10 and 20: what they draw, the plane of the first, and ways between two digits.

    python examples/latent_sizes.py [--data mnist] [--sizes 2 5 10 20] [--epochs 150] [--output runs/latent_sizes]

Prints the parts of the bound, log p(x) and active units: more units reconstruct more, until those added are left idle.
Saves data beside samples of every size, the plane that two units decode to, and, between two test digits, what lies on
the straight line between their codes.
"""

from pathlib import Path

import head
import torch

import pyrovae as pv


def between(vae, test, ways=6, steps=10):
    """Test digits at the ends of a row, and what lies on the way between their codes: ``[ways, steps + 2, ...]``."""
    a, b = test.x[:ways], test.x[ways : 2 * ways]
    with torch.no_grad():
        return torch.cat([a.unsqueeze(1), vae.interpolate(a, b, steps=steps), b.unsqueeze(1)], 1)


def main():
    options = head.options(
        __doc__,
        data="digits",
        sizes={"nargs": "+", "type": int, "default": [2, 5, 10, 20], "help": "latent units"},
        epochs=150,
        samples=500,
        output=Path("runs/latent_sizes"),
    )
    data = head.load(options, binarization="dynamic")
    train, test = data.train, data.test.subset(slice(2000))
    drawn = {"data": train.x[:16]}
    for size in options.sizes:
        torch.manual_seed(0)
        vae = pv.models.VAE(train.event_shape, size).initialise(train.x)
        fitted = pv.fit(
            vae.model, vae.guide, train, objective=pv.ELBO(), epochs=options.epochs, lr=2e-3, schedule="cosine"
        )
        found = pv.log_likelihood(vae.model, vae.guide, test, num_samples=options.samples, seed=0)
        active, row = pv.active_units(vae.guide, test)["z"].count, fitted.history[-1]
        parts = f"reconstruction {row['reconstruction']:.2f}, KL {row['kl']:.2f}, {active} active"
        print(f"{size:2} units: {parts}; {found}")
        vae.cpu()  # where the data are
        drawn[f"{size} units"] = pv.sample(vae, 16, seed=0)
        if size == 2:
            path = options.output / "manifold.png"
            pv.plots.manifold(vae.decode, path, event_shape=train.event_shape, steps=12, smooth=True)
        ways = between(vae, test)
        path = options.output / f"between_{size}.png"
        pv.plots.image_grid(ways.flatten(0, 1), path, columns=ways.shape[1], smooth=True)
    pv.plots.side_by_side(drawn, options.output / "samples.png", smooth=True)
    print(f'pictures in "{options.output}"')


if __name__ == "__main__":
    main()
