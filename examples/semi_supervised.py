"""A semi-supervised VAE: a few labelled digits, many without labels, one model of both.

    python examples/semi_supervised.py [--data mnist --data-dir PATH] [--per-class 20] [--epochs 60]

Trains on the labelled digits alone, then on all. Prints the test accuracy of q(y | x) after both, and log p(x).
"""

import argparse

import torch

import pyrovae as pv
from pyrovae.models.semi_supervised import hide_labels


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--per-class", type=int, default=20, help="labels to keep")
    parser.add_argument("--first", type=int, default=40, help="epochs on the labelled data")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--latent-dim", type=int, default=30)
    parser.add_argument("--alpha", type=float, default=10.0)
    parser.add_argument("--samples", type=int, default=1000)
    options = parser.parse_args()

    train, _, test = pv.data.load(options.data, options.data_dir, binarization="threshold", labels=True)
    y = hide_labels(train.labels, options.per_class)
    known = (y >= 0).nonzero().squeeze(1)
    torch.manual_seed(0)
    model = pv.models.SemiSupervisedVAE(
        train.event_shape, 10, options.latent_dim, hidden=(256,), classification_weight=options.alpha,
        activation="relu", classifier={"network": "conv", "channels": (16, 32), "hidden": (128,)},
    ).initialise(train.x)  # fmt: skip

    # Otherwise the sum over classes settles what is what before the labels have been heard.
    stages = {
        f"{len(known):,} labelled digits": (known, options.first, 2e-3, "constant"),
        f"all {len(y):,} digits": (torch.cat([torch.arange(len(y)), known.repeat(10)]), options.epochs, 1e-3, "cosine"),
    }
    for stage, (rows, epochs, lr, schedule) in stages.items():
        result = pv.fit(
            model.model, model.guide, (train.x[rows], y[rows]), objective=pv.ELBO(), epochs=epochs, lr=lr,
            schedule=schedule,
        )  # fmt: skip
        accuracy = model.accuracy(test.x, test.labels)
        print(f"{stage}: test accuracy {accuracy:.2%} ({result.timings['seconds']:.0f} s, {result.timings['path']})")
    some = test.subset(slice(1000)).unlabelled()
    print("log p(x):", pv.log_likelihood(model.model, model.guide, some, num_samples=options.samples, seed=0))


if __name__ == "__main__":
    main()
