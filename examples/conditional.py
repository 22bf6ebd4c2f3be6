"""A conditional VAE: digits drawn by label, and one hand that writes all ten digits.

    python examples/conditional.py [--data mnist --data-dir PATH] [--epochs 100] [--output runs/conditional]

Saves two grids: samples (a row for each label), and analogies (first a test digit, then its z under every label).
Prints the bound on log p(x | y), and how many samples a classifier trained on real digits reads as their label.
"""

from pathlib import Path

import head
import torch
from sklearn.neural_network import MLPClassifier

import pyrovae as pv


def recognised(train, test, x, y):
    """The share of bits ``x`` that a classifier of real digits reads as ``y``, and its own accuracy on test data."""
    reader = MLPClassifier((200,), early_stopping=True, n_iter_no_change=5, random_state=0)
    real = train.fixed()
    reader.fit(real.x.flatten(1).numpy(), real.labels.numpy())
    return tuple(reader.score(a.flatten(1).numpy(), b.numpy()) for a, b in ((x, y), (test.x, test.labels)))


def main():
    options = head.options(__doc__, data="digits", epochs=100, latent_dim=10, output=Path("runs/conditional"))

    train, _, test = head.load(options, binarization="dynamic", labels=True)
    torch.manual_seed(0)
    cvae = pv.models.ConditionalVAE(train.event_shape, 10, options.latent_dim, hidden=(400, 400)).initialise(train.x)
    pv.fit(cvae.model, cvae.guide, train, objective=pv.ELBO(), epochs=options.epochs)
    some = test.subset(slice(1000))
    print("log p(x | y):", pv.log_likelihood(cvae.model, cvae.guide, some, num_samples=200, seed=0))

    cvae.cpu()  # where the data are
    rows = torch.arange(10).repeat_interleave(10)
    pv.plots.image_grid(pv.sample(cvae, 100, rows, seed=0), options.output / "samples.png", columns=10, smooth=True)
    first = torch.stack([(test.labels == label).nonzero()[0, 0] for label in range(10)])
    x, y = test.batch(first)
    with torch.no_grad():
        swapped = torch.cat([x.unsqueeze(1), cvae.analogies(x, y, range(10))], 1)
    pv.plots.image_grid(swapped.flatten(0, 1), options.output / "analogies.png", columns=11, smooth=True)

    labels = torch.arange(1000) % 10
    share, accuracy = recognised(train, test, (pv.sample(cvae, 1000, labels, seed=1) > 0.5).float(), labels)
    print(f"samples recognised as their label: {share:.1%} (the classifier reads {accuracy:.1%} of real test digits)")
    print(f'pictures in "{options.output}"')


if __name__ == "__main__":
    main()
