"""Richer priors and posteriors against the plain VAE: the same networks, the same training.

    python examples/priors.py [--data mnist --data-dir PATH] [--epochs 100] [--latent-dim 10] [--output runs/priors]

Prints test NLL with its standard error, the two parts of the bound, and seconds an epoch; saves samples of each.
"""

from pathlib import Path

import head
import torch

import pyrovae as pv

CHOICES = {
    "plain": {},
    "prior mixture": {"prior": "mixture", "components": 100},
    "prior vamp": {"prior": "vamp", "components": 100},
    "prior flow": {"prior": "flow"},
    "posterior full": {"posterior": "full"},
    "posterior flow": {"posterior": "flow"},
    "posterior iaf": {"posterior": "iaf"},
    "flow and iaf": {"prior": "flow", "posterior": "iaf"},
}


def main():
    options = head.options(
        __doc__,
        data="digits",
        only={"nargs": "*", "default": list(CHOICES), "choices": list(CHOICES)},
        latent_dim=10,
        epochs=100,
        samples=500,
        number=(2000, "test images to measure on"),
        output=Path("runs/priors"),
    )

    splits = head.load(options, binarization="dynamic")
    test = splits.test.fixed(0).x[: options.number]
    for name in options.only:
        torch.manual_seed(0)
        vae = pv.models.VAE(splits.train.event_shape, options.latent_dim, **CHOICES[name]).initialise(splits.train.x)
        result = pv.fit(vae.model, vae.guide, splits.train, objective=pv.ELBO(), epochs=options.epochs)
        found = pv.log_likelihood(vae.model, vae.guide, test, num_samples=options.samples, batch_size=500, seed=0)
        row, seconds = result.history[-1], result.timings["seconds"] / options.epochs
        print(
            f"{name:15} NLL {found.nll:7.2f} ± {found.nll_std_error:.2g} nats, reconstruction "
            f"{-row['reconstruction']:.1f}, KL {row['kl']:.1f}; {seconds:.2f} s an epoch, {result.timings['path']}"
        )
        picture = options.output / f"{name.replace(' ', '-')}.png"
        pv.plots.image_grid(pv.sample(vae, 64, seed=0), picture, smooth=True)


if __name__ == "__main__":
    main()
