"""Do the estimates of log p(x) agree? Importance sampling, annealing both ways, and exact answers, in one table.

    python examples/agreement.py [--epochs 30] [--images 20] [--samples 50000] [--temperatures 500]

VAEs with one and two latent units on the embedded digits, where quadrature over the latents is exact, and a linear
Gaussian pair, whose log p(x) is known in closed form. In the end: how often the stated 95% intervals cover the truth.
"""

import math

import head
import pyro
import pyro.distributions as dist
import torch

import pyrovae as pv


def quadrature(vae, x, steps=401):
    """log p(x) of a VAE with one or two latent units, by the trapezoid rule on [-8, 8]."""
    line = torch.linspace(-8, 8, steps if vae.latent_dim == 1 else 241, dtype=torch.float64)
    nodes = torch.cartesian_prod(*[line] * vae.latent_dim).view(-1, vae.latent_dim)
    log_mass = vae.prior(nodes[:1]).log_prob(nodes) + vae.latent_dim * math.log(line[1] - line[0])
    with torch.no_grad():
        parts = [vae.likelihood(z.unsqueeze(1).to(x)).log_prob(x).double() for z in nodes.split(2000)]
    return torch.logsumexp(torch.cat(parts) + log_mass.unsqueeze(1), 0)


def linear_pair(dim=10, latent=3, noise=0.5):
    """z ~ N(0, I), x ~ N(W z, noise^2 I), and a guide that is off; with its exact log p(x)."""
    loading = torch.randn(dim, latent)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ loading.T, noise).to_event(1), obs=x)

    precision = torch.eye(latent) + loading.T @ loading / noise**2
    reading = torch.linalg.solve(precision, loading.T) / noise**2
    spread = 1.3 * torch.linalg.inv(precision).diagonal().sqrt()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ reading.T, spread).to_event(1))

    marginal = dist.MultivariateNormal(torch.zeros(dim), loading @ loading.T + noise**2 * torch.eye(dim))
    return model, guide, marginal


def table(name, model, guide, x, exact, options):
    """The mean log p(x) by every estimator, and its distance from the exact one in stated standard errors."""
    print(f"{name}: exact {exact.mean():.4f} nats")
    number = 50
    while number <= options.samples:
        found = pv.log_likelihood(model, guide, x, num_samples=number, seed=0)
        show(f"importance, {number:,}", found, exact)
        number *= 10
    show(f"annealing, {options.temperatures:,}", anneal(pv.ais_log_likelihood, model, x, options=options), exact)


def anneal(estimator, model, *arguments, options):
    return estimator(model, *arguments, num_temperatures=options.temperatures, seed=0)


def show(name, found, exact):
    off = found.log_prob.mean() - exact.mean()
    print(f"  {name:22} {found.log_prob.mean():9.4f} ± {found.nll_std_error:.4f}  off by {off:+.4f}")


def main():
    options = head.options(__doc__, epochs=30, images=20, samples=50_000, temperatures=500, repetitions=1000)

    digits = pv.data.load("digits", binarization="dynamic")
    x = digits.test.x[: options.images]
    for units in (1, 2):
        torch.manual_seed(0)
        vae = pv.models.VAE((1, 8, 8), latent_dim=units, hidden=(64,)).initialise(digits.train.x)
        pv.fit(vae.model, vae.guide, digits.train, objective=pv.IWAE(5), epochs=options.epochs)
        vae.cpu()  # where the data are
        table(f"VAE, {units} latent unit{'s' * (units > 1)}", vae.model, vae.guide, x, quadrature(vae, x), options)
        bracket = anneal(pv.bdmc, vae, options.images, options=options)
        ends = (bracket.lower.log_prob.mean(), bracket.upper.log_prob.mean())
        error = (bracket.upper.log_prob - bracket.lower.log_prob).std() / options.images**0.5
        print(f"  simulated data lie between {ends[0]:.4f} and {ends[1]:.4f}, gap {bracket.gap:.4f} ± {error:.4f}")

    torch.manual_seed(0)
    model, guide, marginal = linear_pair()
    y = marginal.sample((options.images,))
    table("linear Gaussian", model, guide, y, marginal.log_prob(y), options)
    copies = y[:1].expand(options.repetitions, -1)
    for name, found in (
        ("importance, 500", pv.log_likelihood(model, guide, copies, num_samples=500, seed=1)),
        (f"annealing, {options.temperatures:,}", anneal(pv.ais_log_likelihood, model, copies, options=options)),
    ):
        low, high = found.interval(0.95)
        covered = ((low < marginal.log_prob(y[0])) & (marginal.log_prob(y[0]) < high)).double().mean()
        print(f"95% intervals of {name}: {covered:.1%} of {options.repetitions:,} cover the truth")


if __name__ == "__main__":
    main()
