"""log p(x) with a class summed out beside drawing it, for the same error: a VAE whose prior is a mixture of ten.

    python tests/benchmarks/classes.py [--samples 1000] [--steps 200]

Drawn classes come from all alike, or from a trained q(c | x). What counts is the variance of
an estimate times the seconds (of the processor, one thread) that it takes, as a multiple of that of the sum: above 1
where summing out pays.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyrovae as pv

CLASSES, PIXELS, LATENT, HIDDEN = 10, 784, 10, 200


class Mixture(nn.Module):
    """c of ten, z ~ N(m_c, s_c^2), x from z by a network; the guide draws z, and the class where it is told how."""

    def __init__(self, drawn: str = "") -> None:
        super().__init__()
        self.drawn = drawn
        self.locs, self.log_scales = (
            nn.Parameter(torch.randn(CLASSES, LATENT)),
            nn.Parameter(torch.zeros(CLASSES, LATENT)),
        )
        self.decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, PIXELS))
        self.encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * LATENT))
        self.classifier = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            mark = {} if self.drawn else {"enumerate": "parallel"}
            c = pyro.sample("c", dist.Categorical(torch.full((CLASSES,), 1 / CLASSES)), infer=mark)
            z = pyro.sample("z", dist.Normal(self.locs[c], self.log_scales[c].exp()).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            if self.drawn:
                logits = self.classifier(x) if self.drawn == "trained" else torch.zeros(len(x), CLASSES)
                pyro.sample("c", dist.Categorical(logits=logits))
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def blobs(number: int) -> Tensor:
    """Bits about ten prototypes, each varied along a few directions."""
    generator = torch.Generator().manual_seed(0)
    prototypes, ways = (2 * torch.randn(n, PIXELS, generator=generator) for n in (CLASSES, 3))
    of = torch.arange(number) % CLASSES
    logits = prototypes[of] + torch.randn(number, 3, generator=generator) @ ways * 0.5
    return torch.bernoulli(logits.sigmoid(), generator=generator)


def measured(pair: Mixture, x: Tensor, samples: int) -> tuple[float, float, str]:
    """The mean variance of log p(x) over data, the processor's seconds of a warm estimate, and how it ran."""
    options = {"num_samples": samples, "compile": True, "chunk_size": samples // 4}
    pv.log_likelihood(pair.model, pair.guide, x, seed=0, **options)
    took, squares = [], []
    for seed in (1, 2):
        began = time.process_time()
        found = pv.log_likelihood(pair.model, pair.guide, x, seed=seed, **options)
        took.append(time.process_time() - began)
        squares.append(found.std_error.square().mean().item())
    return sum(squares) / len(squares), min(took), found.path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    data, x = blobs(2000), blobs(2050)[2000:]
    summed = Mixture()
    fit = {"epochs": max(1, given.steps // 20), "progress": False, "lr": 2e-3}
    pv.fit(summed.model, summed.guide, data, objective=pv.IWAE(5), **fit)
    trained = Mixture("trained")
    trained.load_state_dict(summed.state_dict())
    trained.requires_grad_(False).classifier.requires_grad_(True)
    pv.fit(trained.model, trained.guide, data, objective=pv.RWS(10), **fit)
    uniform = Mixture("uniform")
    uniform.load_state_dict(summed.state_dict())
    found = {pair.drawn or "summed out": measured(pair, x, given.samples) for pair in (summed, uniform, trained)}
    variance, seconds, _ = found["summed out"]
    for name, (own, took, kind) in found.items():
        gain = own * took / (variance * seconds)
        print(f"{name:10} variance {own:.3g} nats^2, {took:.2f} s ({kind}), {gain:.2f} times the summed one's product")


if __name__ == "__main__":
    main()
