"""Free bits, which are no function of log-weights, and the closed-form KL that they rest on."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

import pyrovae as pv
from tests.laws.programs import lp

X = torch.tensor([[0.5, -1.0], [1.5, 0.2], [-0.3, 0.8], [0.9, 0.1]], dtype=torch.float64)


@pytest.mark.parametrize(("free_bits", "num"), [(0.15, 1), (0.3, 3), (5.0, 2)])
@pytest.mark.parametrize("kl_weight", [1.0, 0.5])
def test_free_bits_are_the_formula(free_bits, num, kl_weight):
    phi = torch.tensor([0.1, 0.5, 0.9], requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., :2], 0.7).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(phi * x[:, :1], 0.8).to_event(1))

    objective = pv.ELBO(num, free_bits=free_bits, kl_weight=kl_weight, likelihood_weight=2.0)
    pyro.set_rng_seed(3)
    loss = objective.differentiable_loss(model, guide, X)
    grad = torch.autograd.grad(loss, phi)[0]
    pyro.set_rng_seed(3)
    q = dist.Normal(phi * X[:, :1], torch.tensor(0.8).expand(4, 3))
    z = q.rsample((num,))
    kl = kl_divergence(q, dist.Normal(torch.zeros(4, 3), 1.0)).mean(0)
    by_hand = -2 * lp(dist.Normal(z[..., :2], 0.7), X, 1).mean(0).sum() + kl_weight * 4 * kl.clamp(min=free_bits).sum()
    assert loss.item() == pytest.approx(by_hand.item())
    torch.testing.assert_close(grad, torch.autograd.grad(by_hand, phi)[0])


def test_kl_of_a_full_covariance_normal_against_independent_normals_is_closed_form():
    scale_tril = torch.tensor([[0.9, 0.0], [0.4, 0.6]])
    q = dist.MultivariateNormal(torch.tensor([[0.3, -0.2], [1.0, 0.1]]), scale_tril=scale_tril)
    p = dist.Normal(torch.tensor([0.1, 0.2]), torch.tensor([1.5, 0.7]))
    full = dist.MultivariateNormal(p.loc, scale_tril=torch.diag(p.scale))
    torch.testing.assert_close(kl_divergence(q, p.to_event(1)), kl_divergence(q, full))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(p.loc.expand(len(x), 2), p.scale).to_event(1))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", q)

    x = torch.zeros(2)
    paid = pv.ELBO(free_bits=1e-9).loss(model, guide, x) + float(dist.Normal(0.0, 1.0).log_prob(x).sum())
    assert paid == pytest.approx(float(kl_divergence(q, full).sum()))  # no Monte Carlo error: one particle
    mean_field = pyro.infer.TraceMeanField_ELBO().loss(model, guide, x)
    assert mean_field + float(dist.Normal(0.0, 1.0).log_prob(x).sum()) == pytest.approx(paid)
