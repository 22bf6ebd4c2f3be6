"""A deep VAE with grids of latents at several scales against a VAE of one layer, in bits per dimension.

    python examples/deep.py [--epochs 30] [--samples 100] [--images 500] [--output FOLDER]
    python examples/deep.py --data cifar10 --batch-size 32 --minutes 10

Both have the same likelihood, a discretized logistic on the data's grey levels, and train for the same number of epochs
or of minutes. On the embedded digits by default; 32x32 colour images want a GPU, or patience.
"""

import math
import time
from pathlib import Path

import head
import torch

import pyrovae as pv


def pairs(shape, levels):
    """The same likelihood at the end of one layer, and of several scales."""
    likelihood = {"likelihood": "discretized_logistic", "scale": "per_pixel", "levels": levels}
    if shape[-1] < 32:
        deep = {"channels": (32, 32), "latent_channels": (2, 4), "blocks": (2, 2), "patch": shape[-1] // 8}
    else:
        deep = {"channels": (48, 64, 64), "latent_channels": (4, 8, 8), "blocks": (2, 2, 2)}
    yield "one layer", lambda: pv.models.VAE(shape, **likelihood, network="conv", hidden=(256,), activation="silu")
    yield "deep", lambda: pv.models.DeepVAE(shape, **deep, **likelihood)


def spread(images, count):
    """At most so many of the images, from all over the set: a folder is sorted by class."""
    count = min(count or len(images), len(images))
    return images.subset(torch.linspace(0, len(images) - 1, count).long())


def train(make, images, epochs, options):
    """A pair from fixed initial weights, trained, and what ``fit`` returned."""
    torch.manual_seed(0)
    pair = make().initialise(images.x)
    return pair, pv.fit(
        pair.model, pair.guide, images, objective=pv.ELBO(), epochs=epochs, batch_size=options.batch_size,
        clip_norm=200.0, kl_warmup=min(options.warmup, epochs / 2),
    )  # fmt: skip


def within(minutes, make, images, options):
    """Images and epochs that fit into the minutes, by the pace of a short training: all images, if one epoch fits."""
    _, short = train(make, images.subset(slice(300)), 2, options)
    number = round(60 * minutes * short.history[-1]["images_per_second"])
    return spread(images, number), max(1, round(number / len(images)))


def main():
    parser = head.parser(
        __doc__,
        data="digits",
        train=int,
        batch_size=100,
        warmup=5.0,
        samples=100,
        images=(500, "test images to measure on"),
        output=Path,
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, default=30)
    length.add_argument("--minutes", type=float, help="instead of epochs: as many as each can do in that time")
    options = parser.parse_args()
    data = head.load(options)
    images, test = spread(data.train, options.train), spread(data.test, options.images)
    shape = tuple(images.event_shape)
    for name, make in pairs(shape, levels=17 if options.data == "digits" else 256):
        some, epochs = images, options.epochs
        if options.minutes:
            some, epochs = within(options.minutes, make, images, options)
        began = time.perf_counter()
        pair, _ = train(make, some, epochs, options)
        minutes = (time.perf_counter() - began) / 60
        estimate = pv.log_likelihood(pair.model, pair.guide, test, num_samples=options.samples, seed=0)
        bits = estimate.nll / (math.prod(shape) * math.log(2))
        length = f"{epochs} epochs of {len(some):,} images, {minutes:.1f} minutes"
        print(f"{name}: {bits:.3f} bits/dim after {length}; {estimate}")
        if options.output:
            stem = options.output / name.replace(" ", "_")
            pv.plots.image_grid(pv.sample(pair, 64, seed=0), stem.with_name(f"{stem.name}_samples.png"), smooth=True)
            with torch.no_grad():
                again = pair.reconstruct(test.x[:32].to(next(pair.parameters()).device)).cpu()
            pv.plots.reconstructions(test.x[:32], again, stem.with_name(f"{stem.name}_reconstructions.png"))


if __name__ == "__main__":
    main()
