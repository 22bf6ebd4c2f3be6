"""A VAE of digits given two measured attributes, stroke width and slant; then one digit drawn with others of both.

    python examples/attributes.py [--data mnist --number 10000] [--epochs 100] [--output runs/attributes]

Saves a grid for one test digit, its z kept, the slant rising from left to right and the stroke width from top to
bottom. Prints how well the attributes asked for are met, measured on what was drawn.
"""

from pathlib import Path

import head
import torch
from morphology import slant, stroke_width

import pyrovae as pv


def measured(x):
    """Stroke width in pixels and slant in radians, ``[N, 2]``."""
    return torch.stack([stroke_width(x), slant(x)], -1)


def correlation(a, b):
    """Of two vectors."""
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def main():
    options = head.options(
        __doc__,
        data="digits",
        number=(10_000, "training images to use"),
        epochs=100,
        output=Path("runs/attributes"),
    )

    splits = head.load(options, binarization="threshold")
    drawings = splits.train.x[: options.number]
    attributes = measured(drawings)
    mean, spread = attributes.mean(0), attributes.std(0)
    scaled = (attributes - mean) / spread
    torch.manual_seed(0)
    cvae = pv.models.ConditionalVAE(drawings.shape[1:], num_attributes=2, latent_dim=10, hidden=(400, 400)).initialise(
        drawings
    )
    pv.fit(cvae.model, cvae.guide, (drawings, scaled), objective=pv.ELBO(), epochs=options.epochs)

    cvae.cpu()  # where the data are
    wanted = torch.cartesian_prod(torch.linspace(-2, 2, 7), torch.linspace(-2, 2, 7))
    x = splits.test.x[:1]
    with torch.no_grad():
        grid = cvae.analogies(x, (measured(x) - mean) / spread, wanted)[0]
    pv.plots.image_grid(grid, options.output / "attributes.png", columns=7, smooth=True)

    wanted = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    drawn = pv.sample(cvae, 500, wanted, seed=0)
    seen = drawn.flatten(1).amax(1) > 0.5
    found = measured(drawn[seen])
    for i, name in enumerate(("stroke width", "slant")):
        print(f"{name} asked for and drawn: correlation {correlation(wanted[seen, i], found[:, i]):.2f}")
    print(f'picture in "{options.output}"')


if __name__ == "__main__":
    main()
