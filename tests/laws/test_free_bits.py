"""Free bits, which are no function of log-weights, and the closed-form KL that they rest on."""

import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

import pyrovae as pv
from pyrovae.engine.kl import site_kl
from pyrovae.engine.run import run
from tests.laws.exact import expected, mean
from tests.laws.gradients import draws
from tests.laws.pairs import PAIRS
from tests.laws.programs import lp

REPETITIONS = 10_000

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


@pytest.mark.filterwarnings("ignore:free_bits take the KL")
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_vanishing_free_bits_are_the_elbo_in_the_mean(pair, agree):
    """Also where the guide draws a site before the parents that the model gives it: there no closed form is right."""
    objective = pv.ELBO(2, free_bits=1e-9)
    upwards = pair.name in ("hierarchy", "binary-net", "mixed-live")
    with pytest.warns(UserWarning, match="by its draws") if upwards else nullcontext():
        objective.loss(*pair.programs(pair.params()), pair.data)
    truth, gradients = expected(pair, mean, 1)
    found = draws(objective, pair, REPETITIONS)
    for name, exact in gradients.items():
        agree("ELBO(free_bits=0)", pair.name, f"d/d{name}", found[name], exact)
    x = pair.data.repeat(200, *[1] * (pair.data.dim() - 1))
    programs = pair.programs(pair.params(len(x)))
    reported = torch.tensor([-objective.loss(*programs, x) / 200 for _ in range(100)])
    agree("ELBO(free_bits=0)", pair.name, "reported bound", reported, truth)


ALIKE, OTHER = torch.tensor([True, False, True, True]), torch.tensor([True, True, False, True])
UNITS = torch.tensor([True, False, True])
MASKS = {
    "none": lambda fn, kept: (fn.to_event(1), True),
    "handler": lambda fn, kept: (fn.to_event(1), kept),
    "distribution": lambda fn, kept: (fn.to_event(1).mask(kept), True),
    "units": lambda fn, kept: (fn.mask(UNITS).to_event(1).mask(kept), True),
}


def masked_pair(of_model, of_guide):
    """One latent site, which the likelihood does not read, under masks."""

    def draw(fn, mask):
        fn, by_handler = MASKS[mask[0]](fn, mask[1])
        with pyro.poutine.mask(mask=by_handler):
            pyro.sample("z", fn)

    def model(x):
        with pyro.plate("data", len(x)):
            draw(dist.Normal(torch.zeros(len(x), 3), 1.0), of_model)
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, 0])

    def guide(x):
        with pyro.plate("data", len(x)):
            draw(dist.Normal(torch.full((len(x), 3), 0.4), 0.6), of_guide)

    return model, guide


KL = kl_divergence(dist.Normal(torch.tensor(0.4), 0.6), dist.Normal(torch.tensor(0.0), 1.0)).double().item()


@pytest.mark.parametrize(
    ("of_model", "of_guide", "counted"),
    [("handler",) * 2 + (9,), ("distribution",) * 2 + (9,), ("handler", "distribution", 9), ("units", "units", 6)],
)
def test_masks_by_handler_and_on_distributions_count_alike(of_model, of_guide, counted):
    pair = masked_pair((of_model, ALIKE), (of_guide, ALIKE))
    paid = pv.ELBO(2, free_bits=1e-9).loss(*pair, X) + float(dist.Normal(0.0, 1.0).log_prob(X[:, 0]).sum())
    assert paid == pytest.approx(counted * KL, rel=1e-6)  # in closed form, two particles or not


@pytest.mark.parametrize(("kept", "counted"), [(True, 12), (False, 0)])
@pytest.mark.parametrize("wrap", [bool, torch.tensor])
@pytest.mark.parametrize("how", ["handler", "distribution"])
def test_one_mask_for_all(how, wrap, kept, counted):
    pair = masked_pair((how, wrap(kept)), (how, wrap(kept)))
    paid = pv.ELBO(2, free_bits=1e-9).loss(*pair, X) + float(dist.Normal(0.0, 1.0).log_prob(X[:, 0]).sum())
    assert paid == pytest.approx(counted * KL, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("of_model", list(MASKS))
@pytest.mark.parametrize("of_guide", list(MASKS))
def test_masks_that_differ_leave_the_sampled_terms(of_model, of_guide, agree):
    pair = masked_pair((of_model, OTHER), (of_guide, ALIKE))
    by_model, by_guide = (
        (kept.unsqueeze(-1) if how != "none" else torch.ones(4, 1).bool()) & (UNITS if how == "units" else True)
        for how, kept in ((of_model, OTHER), (of_guide, ALIKE))
    )
    entropy, cross = (0.5 * math.log(2 * math.pi) + each for each in (0.5 + math.log(0.6), 0.5 * (0.4**2 + 0.6**2)))
    exact = (by_model * cross - by_guide * entropy) + torch.zeros(4, 3)
    particles = run(*pair, (X,), {}, num_particles=2000, nesting=1)
    agree("site_kl", f"{of_model}-{of_guide}", "mean", site_kl(particles, "z").sum((1, 2)), exact.sum())
    if of_model != of_guide or of_model != "none":
        with pytest.raises(ValueError, match='site "z" is masked or scaled in one program otherwise'):
            pv.ELBO(free_bits=0.1).loss(*pair, X)


class Doubled(dist.Normal):
    """Of twice the scale that it is given: a class whose KL is not that of its base."""

    def log_prob(self, value):
        return super().log_prob((value + self.loc) / 2) - math.log(2)

    def rsample(self, sample_shape=()):
        return 2 * super().rsample(sample_shape) - self.loc


FAMILIES = {
    "folded": lambda loc: dist.FoldedDistribution(dist.Normal(loc, 1.0)),
    "doubled": lambda loc: Doubled(loc, 1.0),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_class_that_alters_the_density_of_its_base_has_not_its_kl(family, agree):
    make = FAMILIES[family]

    def program(loc, observed):
        def run(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", make(torch.full((len(x),), loc)))
                if observed:
                    pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, 0])

        return run

    line = torch.linspace(1e-9 if family == "folded" else -20, 20, 8001)
    q, p = make(torch.tensor(1.0)).log_prob(line), make(torch.tensor(0.0)).log_prob(line)
    exact = torch.trapezoid(q.exp() * (q - p), line)
    particles = run(program(0.0, True), program(1.0, False), (X,), {}, num_particles=3000, nesting=1)
    agree("site_kl", family, "mean", site_kl(particles, "z").flatten(), exact)


class Heads(dist.Bernoulli):
    """Draws that are the same however many are drawn at a time."""

    def sample(self, sample_shape=()):
        return torch.ones(self._extended_shape(sample_shape), dtype=self.logits.dtype)


def test_folded_bits_follow_their_scores_where_the_model_has_plates_inside_of_a_datum():
    rows = torch.tensor([[-1.0, 0.3, 0.8, 1.2], [0.1, 0.5, -0.4, 2.0], [0.9, -0.2, 0.6, 0.7]], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.3)))
            with pyro.plate("inside", 4, dim=-2):
                pyro.sample("x", dist.Normal(0.2 + z, 1.0), obs=x.T)

    def gradient(**how):
        slope = torch.tensor([0.4, 0.4], dtype=torch.float64, requires_grad=True)

        def guide(x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Bernoulli(logits=slope[0] * x.sum(1)))
                with pyro.plate("noise", 2, dim=-2):
                    pyro.sample("u", Heads(logits=slope[1] * x[:, :2].T), infer={"is_auxiliary": True})

        pyro.set_rng_seed(3)
        pv.ELBO(3, free_bits=0.1, **how).loss_and_grads(model, guide, rows)
        return slope.grad

    torch.testing.assert_close(gradient(fold_particles=True), gradient(vectorize_particles=False))
    torch.testing.assert_close(gradient(fold_particles=True), gradient())
