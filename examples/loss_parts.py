"""What the parts of the loss do: a VAE of two latent units, trained on parts of its bound, and their latent planes.

    python examples/loss_parts.py [--data mnist] [--epochs 100] [--samples 1000] [--output runs/loss_parts]

Prints reconstruction, KL and log p(x) on test data, in nats. The reconstruction alone scatters codes far beyond the
prior, where sampling never looks; the KL alone puts all of them into the prior, where they say nothing of the data.
"""

from pathlib import Path

import head
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch.distributions import kl_divergence

import pyrovae as pv

PRIOR_95 = 2.448  # the radius that holds 95% of N(0, I) in the plane


def parts(epochs):
    """Each part's name, its objective, and the epochs over which its KL is faded in."""
    return [
        ("reconstruction only", pv.ELBO(kl_weight=0), 0),
        ("KL only", pv.ELBO(likelihood_weight=0), 0),
        ("both", pv.ELBO(), 0),
        ("beta = 4", pv.ELBO(kl_weight=4), 0),
        ("free bits, 3 nats a unit", pv.ELBO(free_bits=3), 0),
        ("KL warm-up", pv.ELBO(), epochs / 2),
    ]


def measure(vae, test, samples):
    """Codes [N, 2]; reconstruction and KL, in nats per datum; the estimate of log p(x)."""
    x = test.fixed().x.to(next(vae.parameters()).device)
    with torch.no_grad():
        posterior = vae.posterior(x)
        reconstruction = vae.likelihood(posterior.sample()).log_prob(x).mean()
        kl = kl_divergence(posterior, vae.prior(x).expand(x.shape[:1])).mean()
    return (
        posterior.mean.cpu(),
        reconstruction,
        kl,
        pv.log_likelihood(vae.model, vae.guide, test, num_samples=samples, seed=0),
    )


def draw(planes, labels, path):
    """One latent plane for each part, the prior's 95% as a circle, digits by colour."""
    colours = [colormaps["tab10"](int(label)) for label in labels]
    figure = Figure(figsize=(7.8, 5.4), dpi=150, layout="constrained")
    for axes, (name, codes) in zip(figure.subplots(2, 3).flat, planes, strict=True):
        axes.scatter(*codes.T, s=max(3, 3000 / len(codes)), c=colours, linewidths=0, alpha=0.7)
        axes.add_patch(Circle((0, 0), PRIOR_95, fill=False, linestyle="--", color="black", zorder=3))
        reach = max(PRIOR_95, codes.abs().max().item()) * 1.1
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main():
    options = head.options(__doc__, data="digits", epochs=100, samples=1000, output=Path("runs/loss_parts"))
    data = head.load(options, binarization="dynamic", labels=True)
    train, test = data.train.unlabelled(), data.test.subset(torch.arange(min(len(data.test), 2000)))
    planes = []
    for name, objective, warmup in parts(options.epochs):
        torch.manual_seed(0)
        vae = pv.models.VAE(train.event_shape, latent_dim=2).initialise(train.x)
        pv.fit(vae.model, vae.guide, train, objective=objective, epochs=options.epochs, kl_warmup=warmup)
        codes, reconstruction, kl, estimate = measure(vae, test.unlabelled(), options.samples)
        planes.append((name, codes))
        doubt = f" (not to be trusted for {estimate.unreliable:.0%} of the data)" if estimate.unreliable > 0.05 else ""
        print(f"{name:25} reconstruction {reconstruction:8.2f}  KL {kl:7.2f}  log p(x) {-estimate.nll:8.2f}{doubt}")
    path = options.output / "loss_parts.png"
    draw(planes, test.labels, path)
    print(f"latent planes in {path}")


if __name__ == "__main__":
    main()
