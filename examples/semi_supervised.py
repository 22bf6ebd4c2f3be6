"""A semi-supervised VAE: a few labelled digits, many without labels, one model of both.

    python examples/semi_supervised.py [--data mnist --data-dir PATH] [--per-class 20] [--epochs 100]

Prints the test accuracy of q(y | x), that of the same classifier trained on the labelled digits alone, and log p(x).
"""

import argparse

import torch

import pyrovae as pv
from pyrovae.models.semi_supervised import hide_labels


def supervised(model, x, y, steps=1000):
    """Train the classifier of an untrained model on labelled data alone."""
    optimizer = torch.optim.Adam(model.classifier.parameters(), weight_decay=1e-4)
    for _ in range(steps):
        batch = torch.randint(len(x), (100,))
        loss = torch.nn.functional.cross_entropy(model.classifier(torch.bernoulli(x[batch])), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--per-class", type=int, default=20, help="labels to keep")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--latent-dim", type=int, default=10)
    parser.add_argument("--hidden", type=int, nargs="+", default=[200])
    parser.add_argument("--samples", type=int, default=200)
    options = parser.parse_args()

    train, _, test = pv.data.load(options.data, options.data_dir, binarization="dynamic", labels=True)
    y = hide_labels(train.labels, options.per_class)
    known = y >= 0
    alpha = 0.1 * len(y) / int(known.sum())

    def build():
        torch.manual_seed(0)
        return pv.models.SemiSupervisedVAE(
            train.event_shape, 10, options.latent_dim, options.hidden, classification_weight=alpha, activation="relu"
        ).initialise(train.x)

    alone = supervised(build(), train.x[known], y[known])
    print(f"{int(known.sum())} labels alone: test accuracy {alone.accuracy(test.x, test.labels):.1%}")
    model = build()
    data = pv.data.Images(train.x, y, binarization="dynamic")
    result = pv.fit(
        model.model, model.guide, data, objective=pv.ELBO(), epochs=options.epochs, batch_size=options.batch_size,
        schedule="cosine",
    )  # fmt: skip
    print(f"{len(y):,} digits, {int(known.sum())} labels: test accuracy {model.accuracy(test.x, test.labels):.1%}")
    some = test.subset(slice(1000)).unlabelled()
    print("log p(x):", pv.log_likelihood(model.model, model.guide, some, num_samples=options.samples, seed=0))
    print(f"trained in {result.timings['seconds']:.0f} s, {result.timings['path']}")


if __name__ == "__main__":
    main()
