"""A class summed out beside drawing it, and beside the same sum by hand: a VAE whose prior is a mixture of ten.

    python tests/benchmarks/classes.py [--only estimates|steps] [--data digits|blobs] [--samples 1000] [--epochs 60]

Estimates of log p(x): what counts is the variance of an estimate times the seconds (of the processor, one thread) that
it takes, as a multiple of that of the sum: above 1 where summing out pays. Drawn classes come from the prior, as they
must for who has no q(c | x), or from a trained one. Of each pair of estimates the median over data is shown.

Steps of IWAE(5): seconds of loss and gradients as multiples of those with the sum written by hand, where the class is
in the prior alone, and where the data hang on it, too, so that there are ten likelihoods.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyrovae as pv
from pyrovae.engine.randomness import isolated_rng

CLASSES = 10


class Mixture(nn.Module):
    """c of ten, z ~ N(m_c, s_c^2), x from z by a network, and from c if it has ``offsets``.

    :param way: of the class: "summed", "by hand", or drawn from the "prior" or a "trained" guide.
    """

    def __init__(self, pixels: int, latent: int, hidden: int, way: str = "summed", *, offsets: bool = False) -> None:
        super().__init__()
        self.way = way
        self.locs = nn.Parameter(torch.randn(CLASSES, latent))
        self.log_scales = nn.Parameter(torch.zeros(CLASSES, latent))
        self.offsets = nn.Parameter(torch.zeros(CLASSES, pixels)) if offsets else None
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, pixels))
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latent))
        self.classifier = nn.Sequential(nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES))

    def model(self, x: Tensor) -> None:
        if self.way == "by hand":
            return self.by_hand(x)
        with pyro.plate("data", len(x)):
            mark = {"enumerate": "parallel"} if self.way == "summed" else {}
            c = pyro.sample("c", dist.Categorical(logits=x.new_zeros(CLASSES)), infer=mark)
            z = pyro.sample("z", dist.Normal(self.locs[c], self.log_scales[c].exp()).to_event(1))
            logits = self.decoder(z) if self.offsets is None else self.decoder(z) + self.offsets[c]
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def by_hand(self, x: Tensor) -> None:
        """p(z) as a mixture, and p(x | z) with the class's p(c | z)."""
        parts = dist.Normal(self.locs, self.log_scales.exp()).to_event(1)
        with pyro.plate("data", len(x)):
            prior = dist.MixtureSameFamily(dist.Categorical(logits=x.new_zeros(CLASSES)), parts)
            z = pyro.sample("z", prior)
            logits = self.decoder(z)
            if self.offsets is None:
                pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)
                return
            log_given = torch.log_softmax(parts.log_prob(z.unsqueeze(-2)), -1)
            each = dist.Bernoulli(logits=logits.unsqueeze(-2) + self.offsets).log_prob(x.unsqueeze(-2)).sum(-1)
            pyro.factor("x", (log_given + each).logsumexp(-1))

    def guide(self, x: Tensor) -> None:
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            if self.way in ("prior", "trained"):
                logits = self.classifier(x) if self.way == "trained" else x.new_zeros(CLASSES)
                pyro.sample("c", dist.Categorical(logits=logits))
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def like(self, other: Mixture) -> Mixture:
        """With another one's numbers."""
        self.load_state_dict(other.state_dict())
        return self


def blobs(number: int, pixels: int = 784) -> Tensor:
    """Bits about ten prototypes, each varied along a few directions."""
    generator = torch.Generator().manual_seed(0)
    prototypes, ways = (2 * torch.randn(n, pixels, generator=generator) for n in (CLASSES, 3))
    of = torch.arange(number) % CLASSES
    logits = prototypes[of] + torch.randn(number, 3, generator=generator) @ ways * 0.5
    return torch.bernoulli(logits.sigmoid(), generator=generator)


def data(name: str, rows: int) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """Data to train on, others to estimate log p(x) of, and the sizes of a model of them."""
    if name == "blobs":
        x = blobs(2000 + rows)
        return x[:2000], x[2000:], (784, 10, 200)
    digits = pv.data.load("digits", binarization="threshold")
    return digits.train.x.flatten(1), digits.test.x[:rows].flatten(1), (64, 8, 100)


def measured(pair: Mixture, x: Tensor, samples: int, rounds: int = 4) -> tuple[Tensor, float, str]:
    """The variance of log p(x) of each datum, the processor's seconds of a warm estimate, and how it ran."""
    options = {"num_samples": samples, "compile": True, "chunk_size": samples // 4}
    pv.log_likelihood(pair.model, pair.guide, x, seed=0, **options)
    took, estimates = [], []
    for seed in range(1, 1 + rounds):
        began = time.process_time()
        estimates.append(pv.log_likelihood(pair.model, pair.guide, x, seed=seed, **options))
        took.append(time.process_time() - began)
    squares = torch.stack([found.std_error.square() for found in estimates]).mean(0)
    return squares, min(took), estimates[0].path


def estimates(name: str, samples: int, epochs: int, rows: int) -> None:
    """A trained model, whose class is summed out or drawn."""
    train, x, sizes = data(name, rows)
    summed = Mixture(*sizes)
    fit = {"epochs": epochs, "progress": False, "lr": 2e-3}
    pv.fit(summed.model, summed.guide, train, objective=pv.IWAE(5), **fit)
    trained = Mixture(*sizes, "trained").like(summed)
    trained.requires_grad_(False).classifier.requires_grad_(True)
    pv.fit(trained.model, trained.guide, train, objective=pv.RWS(10), **fit)
    pairs = (summed, Mixture(*sizes, "prior").like(summed), trained)
    found = {pair.way: measured(pair, x, samples) for pair in pairs}
    variance, seconds, _ = found["summed"]
    for way, (own, took, kind) in found.items():
        gains = (own * took / (variance * seconds)).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=own.dtype))
        print(
            f"{way:8} relative variance {samples * own.median():.3g} a draw, {took:.3f} s ({kind}); variance x seconds "
            f"{gains[1]:.2f} times the sum's (quartiles {gains[0]:.2f}, {gains[2]:.2f})"
        )


def steps(rounds: int = 30) -> None:
    """Loss and gradients of 100 data."""
    x, objective = blobs(100), pv.IWAE(5)
    for offsets in (False, True):
        marked, written = (Mixture(784, 10, 200, way, offsets=offsets) for way in ("summed", "by hand"))
        pairs = {pair.way: pair for pair in (marked, written.like(marked))}
        for how in ("eager", "compiled"):
            runs = {way: run_of(pair, objective, x, compiled=how == "compiled") for way, pair in pairs.items()}
            best, losses = dict.fromkeys(runs, float("inf")), {}
            for turn in range(rounds):
                for way, run in runs.items():
                    with isolated_rng(turn):
                        began = time.process_time()
                        losses[way] = run()
                    if turn > 2:
                        best[way] = min(best[way], time.process_time() - began)
            (summed, hand), shown = best.values(), ", ".join(f"{loss:.4f}" for loss in losses.values())
            print(
                f"class in {'prior and data' if offsets else 'the prior':14} {how:8}: {1e3 * summed:.2f} ms, by hand "
                f"{1e3 * hand:.2f} ms: {summed / hand:.2f} times (losses {shown})"
            )


def run_of(pair: Mixture, objective: pv.Objective, x: Tensor, *, compiled: bool) -> Callable[[], float]:
    """A function that takes loss and gradients, compiled with a step that moves nothing."""
    if not compiled:
        return lambda: float(objective.loss_and_grads(pair.model, pair.guide, x)) / len(x)
    step = pv.training_step(pair.model, pair.guide, objective, torch.optim.SGD(pair.parameters(), lr=0.0), x)
    return lambda: float(step(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("estimates", "steps"))
    parser.add_argument("--data", choices=("digits", "blobs"), default="digits")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--rows", type=int, default=100)
    given = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    if given.only != "steps":
        estimates(given.data, given.samples, given.epochs, given.rows)
    if given.only != "estimates":
        steps()


if __name__ == "__main__":
    main()
