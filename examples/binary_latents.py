"""A binary-latent model, trained with the objectives that need no reparameterised samples, beside a Gaussian VAE.

    python examples/binary_latents.py [--epochs 100] [--particles 10] [--samples 2000]

A sigmoid belief net with one layer of bits, as two plain Pyro programs, on the embedded digits. Score-function ELBO,
VIMCO, reweighted wake-sleep and the thermodynamic objective train the same pair; prints the test NLL of each.
"""

import head
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyrovae as pv


def make_pair(bits=30):
    """h ~ Bernoulli(learned), x ~ Bernoulli(f(h)); guide q(h | x) Bernoulli."""
    torch.manual_seed(0)
    encoder, decoder = pv.nn.DenseEncoder((1, 8, 8), (64,), bits), pv.nn.DenseDecoder(bits, (64,), (1, 8, 8))
    prior = nn.Parameter(torch.zeros(bits))

    def model(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=prior).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(h)).to_event(3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=encoder(x)).to_event(1))

    return model, guide


def main():
    options = head.options(__doc__, epochs=100, particles=10, samples=2000)
    digits, k = pv.data.load("digits", binarization="dynamic"), options.particles

    def report(name, model, guide, objective):
        result = pv.fit(
            model, guide, digits.train, objective=objective, epochs=options.epochs, lr=3e-3, schedule="cosine"
        )
        estimate = pv.log_likelihood(model, guide, digits.test, num_samples=options.samples, seed=0)
        print(f"{name:20} {estimate}, {result.timings['seconds']:.0f} s")

    for objective in (pv.ELBO(k), pv.VIMCO(k), pv.RWS(k), pv.TVO(k)):
        report(f"bits, {type(objective).__name__}", *make_pair(), objective)
    torch.manual_seed(0)
    vae = pv.models.VAE((1, 8, 8), latent_dim=30, hidden=(64,)).initialise(digits.train.x)
    report("Gaussian VAE, IWAE", vae.model, vae.guide, pv.IWAE(k))


if __name__ == "__main__":
    main()
