"""A pair of plain Pyro functions, trained with five objectives by changing one word.

    python examples/plain_functions.py [--epochs 100] [--samples 1000]

On the embedded digits; prints the test log-likelihood of each, with its standard error.
"""

import head
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyrovae as pv


def make_pair(num_latents=10):
    """A generative model and its guide: plain functions that close over two networks."""
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(num_latents, 64), nn.Tanh(), nn.Linear(64, 64))
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2 * num_latents))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(num_latents), 1.0).to_event(1))
            logits = decoder(z).unflatten(-1, (1, 8, 8))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            mean, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))

    return model, guide


def main():
    options = head.options(__doc__, epochs=100, samples=1000)
    digits = pv.data.load("digits", binarization="dynamic")
    for objective in (pv.ELBO(), pv.IWAE(5), pv.Renyi(0.5, 5), pv.MIWAE(4, 4), pv.CIWAE(0.5, 16)):
        model, guide = make_pair()
        pv.fit(model, guide, digits.train, objective=objective, epochs=options.epochs)
        print(objective, pv.log_likelihood(model, guide, digits.test, num_samples=options.samples, seed=0))


if __name__ == "__main__":
    main()
