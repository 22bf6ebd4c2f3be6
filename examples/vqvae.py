"""A VQ-VAE, then a prior over its codes: perplexity, bounds on log p(x) with both priors, pictures.

    python examples/vqvae.py [--data mnist --data-dir FOLDER] [--full] [--output FOLDER]

By default on the embedded digits; ``--data mnist`` takes 5,000 images of MNIST, ``--full`` all data and larger networks
(hours without a GPU). Images are binarised by a threshold: codes of dynamically binarised ones carry its noise, which
no prior can learn (``--binarization dynamic`` makes the bounds comparable with those of other models).
"""

import math
from pathlib import Path

import head
import torch

import pyrovae as pv
from pyrovae.plots import charts, images

SIZES = {  # (vqvae, epochs), (prior, epochs)
    "digits": (
        ({"num_codes": 16, "code_dim": 16, "channels": 32, "num_downsamplings": 1}, 60),
        ({"channels": 32, "num_layers": 4}, 15),
    ),
    "mnist": (
        ({"num_codes": 128, "code_dim": 32, "channels": 32}, 10),
        ({"channels": 32, "num_layers": 6}, 10),
    ),
    "full": (({"num_codes": 512, "code_dim": 64, "channels": 256}, 50), ({"channels": 128, "num_layers": 12}, 50)),
}


@torch.no_grad()
def codes_of(vqvae, images):
    """The codes of a data set, [N, h, w]; a dynamically binarised one is drawn once."""
    device = next(vqvae.parameters()).device
    return torch.cat([vqvae.encode(x.to(device)) for x in images.fixed().x.split(500)])


def draw_use(codes, num_codes, perplexity, path):
    """The share of all positions that each code has, the codes in order of it."""
    share = torch.bincount(codes.flatten().cpu(), minlength=num_codes).sort(descending=True).values / codes.numel()
    figure = charts.new_figure(5.4, 2.6)
    title = f"use of the codebook: {(share > 0).sum()} of {num_codes} codes, perplexity {perplexity:.1f}"
    axes = charts.dress(figure.add_subplot(), title=title, x="code, by use", y="share of positions", grid="y")
    axes.margins(x=0.01)
    axes.bar(range(num_codes), share.tolist(), color=charts.BLUE)
    axes.axhline(1 / num_codes, color=charts.ORANGE, linestyle="--", linewidth=1, label="all alike")
    charts.add_legend(axes)
    images.save(figure, path)


def main():
    options = head.options(
        __doc__,
        data={"default": "digits", "choices": ("digits", "mnist")},
        binarization={"default": "threshold", "choices": ("threshold", "static", "dynamic")},
        full=False,
        train=int,
        epochs={"type": int, "nargs": 2, "help": "of the VQ-VAE and of the prior"},
        output=Path("runs/vqvae"),
    )

    splits = head.load(options, binarization=options.binarization)
    number = options.train or (5000 if options.data == "mnist" and not options.full else len(splits.train))
    train, test = splits.train.subset(slice(number)), splits.test
    (vqvae_sizes, vqvae_epochs), (prior_sizes, prior_epochs) = SIZES["full" if options.full else options.data]
    if options.epochs:
        vqvae_epochs, prior_epochs = options.epochs

    torch.manual_seed(0)
    vqvae = pv.models.VQVAE(train.event_shape, ema_decay=0.99, revive_below=1.0, **vqvae_sizes)
    vqvae.initialise(train.fixed().x)
    result = pv.fit(
        vqvae.model, vqvae.guide, train, objective=pv.ELBO(), epochs=vqvae_epochs, lr=2e-3, schedule="cosine"
    )
    num_codes, positions = vqvae.quantizer.num_codes, math.prod(vqvae.grid)
    print(f"perplexity {result.history[-1]['perplexity']:.1f} of {num_codes} codes, grid {vqvae.grid}")

    codes, test_codes = codes_of(vqvae, train), codes_of(vqvae, test)
    prior = pv.models.CodePrior(vqvae.grid, num_codes, **prior_sizes).initialise(codes)
    pv.fit(prior.model, prior.guide, codes, objective=pv.ELBO(), epochs=prior_epochs, lr=2e-3, schedule="cosine")
    draw_use(codes, num_codes, result.history[-1]["perplexity"], options.output / "codes.png")
    nll = pv.log_likelihood(prior.model, prior.guide, test_codes, num_samples=1).nll
    print(f"code NLL {nll:.1f} nats on test images, uniform {positions * math.log(num_codes):.1f}")

    for name in ("uniform", "learned"):
        if name == "learned":
            vqvae.with_prior(prior)
        bound = pv.log_likelihood(vqvae.model, vqvae.guide, test, num_samples=1, seed=0).nll
        bits = bound / (test.event_shape.numel() * math.log(2))
        print(f"{name} prior: test NLL <= {bound:.1f} nats, {bits:.3f} bits/dim")

    some = test.fixed().x[:20].to(codes.device)
    rebuilt, folder = vqvae.reconstruct(some).detach().cpu(), options.output
    pv.plots.reconstructions(some.cpu(), rebuilt, folder / "reconstructions.png", smooth=True)
    drawn = {"learned prior": pv.sample(vqvae, 64, seed=0).cpu()}
    vqvae.code_prior = None
    drawn["uniform prior"] = pv.sample(vqvae, 64, seed=0).cpu()
    pv.plots.side_by_side(drawn, folder / "samples.png", smooth=True)
    print(f"pictures in {options.output}")


if __name__ == "__main__":
    main()
