"""Autoencoders side by side: linear, undercomplete, sparse, denoising, and PCA, which the linear one must find.

    python examples/autoencoders.py [--data mnist] [--subset 10000] [--epochs 100] [--output runs/autoencoders]

Prints parameters, squared error per test image, units in use per image, and the angles to PCA's subspace, of which the
last may be far from 0: where two directions vary almost alike, training takes long to tell them apart. Draws
reconstructions (above that of the denoising one, what it is shown), and samples from densities that are fitted on the
codes afterwards: autoencoders have no log p(x).
"""

from pathlib import Path

import head
import torch

import pyrovae as pv

UNITS = 20


def families(shape):
    """Every autoencoder, on squared errors: a Gaussian of fixed scale; and PCA with as many units."""
    common = {"likelihood": "gaussian", "scale": 0.1}
    models = pv.models
    return {
        "PCA": models.PCA(shape, UNITS),
        "linear": models.Autoencoder(shape, UNITS, (), **common),
        "undercomplete": models.Autoencoder(shape, UNITS, (200, 200), **common),
        "sparse, L1": models.SparseAutoencoder(shape, 100, (200,), penalty="l1", weight=5.0, **common),
        "sparse, KL": models.SparseAutoencoder(shape, 100, (200,), penalty="kl", weight=5.0, **common),
        "denoising": models.DenoisingAutoencoder(shape, UNITS, (200, 200), noise="masking", level=0.3, **common),
    }


def train(pair, data, epochs):
    """Train an autoencoder and fit a density to its codes; PCA has a fit, and a density, of its own."""
    if isinstance(pair, pv.models.PCA):
        pair.fit(data)
        pair.cpu()
        return
    pair.initialise(data.x)
    lr = 1e-3 if pair.config["hidden"] else 1e-2
    pv.fit(pair.model, pair.guide, data, objective=pv.ELBO(), epochs=epochs, lr=lr, schedule="cosine")
    pair.fit_density(data)
    pair.cpu()  # where the data are


def squared_error(pair, seen, wanted):
    """The squared error of reconstructions of ``seen``, summed over pixels, averaged over data."""
    with torch.no_grad():
        return (pair.reconstruct(seen) - wanted).square().flatten(1).sum(1).mean().item()


def main():
    options = head.options(
        __doc__,
        data="digits",
        subset=(int, "train on this many images only"),
        epochs=100,
        output=Path("runs/autoencoders"),
    )
    data = head.load(options)
    train_set, test = data.train.subset(slice(options.subset)), data.test.x
    torch.manual_seed(0)
    pairs = families(train_set.event_shape)
    masked = pairs["denoising"].corrupt(test)
    rows, drawn = {"data": test[:12]}, {"data": test[:12]}
    for name, pair in pairs.items():
        train(pair, train_set, options.epochs)
        count = sum(t.numel() for t in (pair.buffers() if name == "PCA" else pair.parameters()))
        line = f"{name:14} {count:8,} parameters  squared error {squared_error(pair, test, test):7.3f}"
        if name != "PCA":
            line += f"  {pair.activity(test).units:5.1f} of {pair.latent_dim} units in use"
        if name == "linear":
            angles = pair.subspace_angles(pairs["PCA"].components).rad2deg()
            line += f"  {angles.median():.1f} degrees from PCA's subspace (median), at most {angles.max():.1f}"
        print(line)
        if name == "denoising":
            rows["masked data"] = masked[:12]
        rows[name] = pair.reconstruct(masked[:12] if name == "denoising" else test[:12]).detach()
        drawn[name] = pv.sample(pair, 12, seed=0)
    for name in ("undercomplete", "denoising"):
        print(f"{name:14} with 30% of the pixels masked: squared error {squared_error(pairs[name], masked, test):7.3f}")
    for kind, images in (("reconstructions", rows), ("samples", drawn)):
        path = options.output / f"autoencoders_{kind}.png"
        pv.plots.image_rows(images, path, smooth=True)
        print(f"{kind} in {path}")


if __name__ == "__main__":
    main()
