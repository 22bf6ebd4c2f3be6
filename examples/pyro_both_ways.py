"""Pyro's objectives in our loop, our objective in Pyro's loop, and an autoguide under an importance-weighted bound.

python examples/pyro_both_ways.py [--epochs 50]
"""

import head
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

import pyrovae as pv


def digits_vae(digits):
    torch.manual_seed(0)
    return pv.models.VAE(digits.event_shape, latent_dim=10, hidden=(64,)).initialise(digits.x)


def pyro_objectives_in_fit(digits, epochs):
    """Any pyro.infer.ELBO is an objective of pv.fit."""
    renyi = RenyiELBO(alpha=0.5, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    for objective in (Trace_ELBO(), TraceMeanField_ELBO(), renyi, pv.Renyi(0.5, 5)):
        vae = digits_vae(digits.train)
        result = pv.fit(vae.model, vae.guide, digits.train, objective=objective, epochs=epochs)
        module = type(objective).__module__.partition(".")[0]
        print(f"{module}.{type(objective).__name__}: bound {result.history[-1]['bound']:.2f} nats")


def our_objective_in_svi(digits, epochs):
    """Our IWAE is an ordinary pyro.infer.ELBO, so SVI takes it."""
    pyro.clear_param_store()
    vae = digits_vae(digits.train)

    def model(x):
        pyro.module("vae", vae)
        vae.model(x)

    svi = SVI(model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=pv.IWAE(5))
    for _ in range(epochs):
        order = torch.randperm(len(digits.train)).split(100)
        losses = [svi.step(digits.train.batch(index)) for index in order]
    print(f"pyrovae.IWAE in pyro.infer.SVI: bound {-sum(losses) / len(digits.train):.2f} nats")


def autoguide_with_iwae():
    """AutoNormal with IWAE on a mean whose posterior, and whose log p(x), are known."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    x = 1.0 + torch.randn(20)

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    guide = AutoNormal(model)
    pv.fit(model, guide, x, objective=pv.IWAE(10), epochs=500, batch_size=len(x), lr=0.02)
    estimate = pv.log_likelihood(model, guide, x, num_samples=1000, seed=0)
    covariance = torch.eye(len(x)) + 1.0
    exact = dist.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(x)
    print(
        f"AutoNormal with pyrovae.IWAE: log p(x) {estimate.log_prob:.4f} ± {estimate.std_error:.1g}, exact {exact:.4f}"
    )


def main():
    options = head.options(__doc__, epochs=50)
    digits = pv.data.load("digits", binarization="dynamic")
    pyro_objectives_in_fit(digits, options.epochs)
    our_objective_in_svi(digits, options.epochs)
    autoguide_with_iwae()


if __name__ == "__main__":
    main()
