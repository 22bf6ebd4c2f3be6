"""A deep autoencoder of one unit that knows its data by heart, beside the linear one and a VAE of one unit.

    python examples/overfitted.py [--data mnist] [--train 30] [--epochs 2000] [--output runs/overfitted]

A network that is wide enough puts every training image at a place of its own on a line, and gives it back whole. The
line between these places means nothing, and the codes of other images land anywhere on it: small error in training says
nothing of a latent space. Prints squared errors; draws training and test images, with their reconstructions below, and
what equal steps over the codes decode to.
"""

from pathlib import Path

import head
import torch

import pyrovae as pv

WIDE = (300, 300, 300)


def families(shape):
    """With one unit each: the linear autoencoder, the wide one, and the VAE of the same networks."""
    common = {"likelihood": "gaussian", "scale": 0.1}
    yield "linear", pv.models.Autoencoder(shape, 1, (), **common)
    yield "deep", pv.models.Autoencoder(shape, 1, WIDE, activation="relu", **common)
    yield "deep VAE", pv.models.VAE(shape, 1, WIDE, "gaussian", 0.3, activation="relu")


def squared_error(rebuilt, x):
    """Summed over pixels, averaged over data."""
    return (rebuilt - x).square().flatten(1).sum(1).mean().item()


def show(name, seen, unseen):
    print(f"{name:10} squared error {seen:7.3f} in training, {unseen:7.3f} on test data")


def main():
    options = head.options(
        __doc__, data="digits", train=(30, "images to learn by heart"), epochs=2000, output=Path("runs/overfitted")
    )
    data = head.load(options)
    train, test = data.train.subset(slice(options.train)), data.test.x
    shown = {"training": train.x[:12], "test": test[:12]}
    rows = {f"{kind} data": x for kind, x in shown.items()}
    mean = train.x.mean(0, keepdim=True)
    show("their mean", squared_error(mean, train.x), squared_error(mean, test))
    for name, pair in families(train.event_shape):
        torch.manual_seed(0)
        pair.initialise(train.x)
        pv.fit(
            pair.model, pair.guide, train, objective=pv.ELBO(), epochs=options.epochs, lr=1e-3, schedule="cosine",
            compile=False,
        )  # fmt: skip
        pair.cpu()  # where the data are
        with torch.no_grad():
            errors = [squared_error(pair.reconstruct(x), x) for x in (train.x, test)]
            rows |= {f"{kind}, {name}": pair.reconstruct(x) for kind, x in shown.items()}
            low, high = pair.encode(train.x).aminmax()
            rows[f"line, {name}"] = pair.decode(torch.linspace(low, high, 12).unsqueeze(-1))
        show(name, *errors)
    path = options.output / "overfitted.png"
    kinds = sorted(rows, key=lambda name: ("training", "test", "line").index(name.split()[0].strip(",")))
    pv.plots.image_rows({name: rows[name] for name in kinds}, path, smooth=True)
    print(f'picture in "{path}"')


if __name__ == "__main__":
    main()
