"""A deep VAE with grids of latents at several scales against a VAE of one layer, in bits per dimension.

    python examples/deep.py [--data cifar10] [--epochs 30] [--samples 100] [--images 500] [--output FOLDER]

Both have the same likelihood, a discretized logistic on the data's grey levels. On the embedded digits by default;
32x32 colour images want a GPU, or patience.
"""

import argparse
import math
import time
from pathlib import Path

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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--warmup", type=float, default=5, help="epochs over which the KL's weight rises to 1")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--images", type=int, default=500, help="test images to measure on")
    parser.add_argument("--output", type=Path, help="folder for samples and reconstructions")
    options = parser.parse_args()
    data = pv.data.load(options.data, options.data_dir)
    count = min(options.images, len(data.test))
    spread = torch.linspace(0, len(data.test) - 1, count).long()  # over all classes, where a folder is sorted by them
    test = data.test.subset(spread)
    shape = tuple(data.train.event_shape)
    for name, make in pairs(shape, levels=17 if options.data == "digits" else 256):
        torch.manual_seed(0)
        pair = make().initialise(data.train.x)
        began = time.perf_counter()
        pv.fit(
            pair.model, pair.guide, data.train, objective=pv.ELBO(), epochs=options.epochs, clip_norm=200.0,
            kl_warmup=min(options.warmup, options.epochs / 2),
        )  # fmt: skip
        minutes = (time.perf_counter() - began) / 60
        estimate = pv.log_likelihood(pair.model, pair.guide, test, num_samples=options.samples, seed=0)
        bits = estimate.nll / (math.prod(shape) * math.log(2))
        print(f"{name}: {bits:.3f} bits/dim after {minutes:.1f} minutes; {estimate}")
        if options.output:
            stem = options.output / name.replace(" ", "_")
            pv.plots.image_grid(pv.sample(pair, 64, seed=0), stem.with_name(f"{stem.name}_samples.png"))
            with torch.no_grad():
                again = pair.reconstruct(test.x[:32].to(next(pair.parameters()).device)).cpu()
            pv.plots.reconstructions(test.x[:32], again, stem.with_name(f"{stem.name}_reconstructions.png"))


if __name__ == "__main__":
    main()
