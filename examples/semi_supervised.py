"""A few labelled digits, many without labels: a semi-supervised VAE on the codes of a VAE ("M1 + M2").

    python examples/semi_supervised.py [--data mnist --data-dir PATH] [--per-class 20] [--epochs 60]

A VAE without labels turns digits into codes; the semi-supervised VAE learns those, first from the labelled digits
alone, then from all. Prints the test accuracy of q(y | x) after both, and log p of both models on test data. With
``--pixels`` the semi-supervised VAE learns the digits themselves, which takes far longer to be as accurate.
"""

import head
import torch

import pyrovae as pv
from pyrovae.parts import hide_labels


def encoded(train, test, dim, epochs):
    """Codes of the training and test data, by a VAE that sees no labels."""
    vae = pv.models.VAE(train.event_shape, dim, hidden=(400,), activation="relu").initialise(train.x)
    dynamic = pv.data.Images(train.x, binarization="dynamic")
    pv.fit(vae.model, vae.guide, dynamic, objective=pv.ELBO(), epochs=epochs, lr=2e-3, schedule="cosine")
    some = pv.data.Images(test.x[:1000], binarization="dynamic")
    print("VAE, log p(x):", pv.log_likelihood(vae.model, vae.guide, some, num_samples=100, seed=0))
    vae.cpu()  # where the data are
    with torch.no_grad():
        return vae.encode(train.x), vae.encode(test.x)


def main():
    options = head.options(
        __doc__,
        data="digits",
        per_class=(20, "labels to keep"),
        pixels=(False, "learn from pixels, not from codes"),
        code_epochs=(60, "epochs of the VAE"),
        first=(30, "epochs on the labelled data"),
        epochs=(60, "epochs on all data"),
    )

    train, _, test = head.load(options, labels=True)
    y = hide_labels(train.labels, options.per_class)
    known = (y >= 0).nonzero().squeeze(1)
    torch.manual_seed(0)
    if options.pixels:
        x, x_test, likelihood = train.x.round(), test.x.round(), "bernoulli"
    else:
        (x, x_test), likelihood = encoded(train, test, 30, options.code_epochs), "gaussian"
    model = pv.models.SemiSupervisedVAE(
        x.shape[1:], 10, latent_dim=20, hidden=(300,), likelihood=likelihood, classification_weight=5.0,
        activation="relu",
    ).initialise(x)  # fmt: skip

    # Otherwise the sum over classes settles what is what before the labels have been heard.
    stages = {
        f"{len(known):,} labelled digits": (known, options.first, "constant"),
        f"all {len(y):,} digits": (torch.cat([torch.arange(len(y)), known.repeat(5)]), options.epochs, "cosine"),
    }
    for stage, (rows, epochs, schedule) in stages.items():
        pv.fit(
            model.model, model.guide, (x[rows], y[rows]), objective=pv.ELBO(), epochs=epochs, batch_size=200, lr=2e-3,
            schedule=schedule,
        )  # fmt: skip
        print(f"{stage}: test accuracy {model.cpu().accuracy(x_test, test.labels):.2%}")
    found = pv.log_likelihood(model.model, model.guide, x_test[:1000], num_samples=1000, batch_size=100, seed=0)
    print("semi-supervised VAE, log p of", "x:" if options.pixels else "codes:", found)


if __name__ == "__main__":
    main()
