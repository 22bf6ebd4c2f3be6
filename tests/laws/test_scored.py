"""Draws that carry no gradient, or only a part of it: by rejection, under masks, hard ones made of soft ones."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions.testing.rejection_gamma import RejectionGamma, ShapeAugmentedGamma
from torch.distributions import kl_divergence, transforms

import pyrovae as pv
from tests.laws.exact import mean, power_mean
from tests.laws.programs import seeded_loss
from tests.state import refused

R, COUNT, FACTOR = 20_000, 3.0, 2.0


# --- rejection: z ~ Gamma(2, 1), x ~ Poisson(z), guide by rejection from Gamma(a, r) --------------------------------


def gamma_pair(posterior, event_dim=0, factor=1.0):
    """The pair with a guide of this kind; ``factor`` if its draws are that many times the model's."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample(
                "z", dist.Gamma(x.new_tensor(2.0), 1.0 / factor).expand([1] * event_dim).to_event(event_dim)
            )
            rate = z.squeeze(-1) if event_dim else z
            pyro.sample("x", dist.Poisson(rate / factor), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior())

    return model, guide


def gamma_parameters(size=()):
    return tuple(torch.full(size, value, requires_grad=True) for value in (1.3, 0.8))


def exact_gamma(expectation, num):
    """The gradient of the expected bound in a and r, by quadrature."""
    a, r = gamma_parameters()
    z = torch.logspace(-9, 2.2, 6000)
    width = torch.cat([z[1:2] - z[:1], (z[2:] - z[:-2]) / 2, z[-1:] - z[-2:-1]])
    log_q = dist.Gamma(a, r).log_prob(z)
    log_w = dist.Gamma(2.0, 1.0).log_prob(z) + dist.Poisson(z).log_prob(torch.tensor(COUNT)) - log_q
    return torch.autograd.grad(expectation(log_q + width.log(), log_w, num), (a, r))


def test_the_quadrature_is_the_closed_form():
    a, r = gamma_parameters()
    likelihood = COUNT * (a.digamma() - r.log()) - a / r - torch.lgamma(torch.tensor(COUNT + 1))
    elbo = likelihood - kl_divergence(dist.Gamma(a, r), dist.Gamma(2.0, 1.0))
    torch.testing.assert_close(torch.autograd.grad(elbo, (a, r)), exact_gamma(mean, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [RejectionGamma, ShapeAugmentedGamma], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("objective", "expectation", "num"),
    [
        (pv.ELBO(1), mean, 1), (pv.ELBO(3), mean, 1), (pv.ELBO(2, free_bits=1e-9), mean, 1),
        (pv.IWAE(3), power_mean(0.0), 3), (pv.MIWAE(2, 2), power_mean(0.0), 2),
    ],
    ids=lambda part: repr(part) if isinstance(part, pv.Objective) else "",
)  # fmt: skip
def test_rejection_leaves_a_score(objective, expectation, num, kind, agree):
    a, r = gamma_parameters((R,))
    if kind is ShapeAugmentedGamma:
        kind = lambda *args: ShapeAugmentedGamma(*args, boost=1)  # noqa: E731
    objective.differentiable_loss(*gamma_pair(lambda: kind(a, r)), torch.full((R,), COUNT)).backward()
    for name, found, truth in zip("ar", (a, r), exact_gamma(expectation, num), strict=True):
        agree(repr(objective), "by rejection", f"d/d{name}", -found.grad, truth)


@pytest.mark.parametrize("objective", [pv.RWS(3), pv.TVO(3)], ids=repr)
def test_the_score_at_fixed_draws_is_that_of_the_density(objective, agree):
    grads = []
    for kind in (RejectionGamma, dist.Gamma):
        a, r = gamma_parameters((R,))
        objective.differentiable_loss(*gamma_pair(lambda: kind(a, r)), torch.full((R,), COUNT)).backward()  # noqa: B023
        grads.append((a.grad, r.grad))
    for name, ours, theirs in zip("ar", *grads, strict=True):
        agree(repr(objective), "by rejection", f"d/d{name} less that of Gamma", ours - theirs, 0.0)


@pytest.mark.parametrize("wrap", ["event", "mask", "both", "transform", "event of a transform"])
def test_the_score_is_found_under_wrappers(wrap):
    a, r = (torch.full((50,), value, requires_grad=True) for value in (1.3, 0.8))
    event_dim, factor = int("event" in wrap or wrap == "both"), FACTOR if "transform" in wrap else 1.0
    shape = (50, 1) if event_dim else (50,)

    def wrapped():
        fn = RejectionGamma(a.view(shape), r.view(shape))
        if wrap == "mask":
            return fn.mask(torch.ones(50, dtype=torch.bool))
        if wrap == "both":
            return fn.to_event(1).mask(torch.ones(50, dtype=torch.bool))
        if factor != 1:
            fn = dist.TransformedDistribution(fn, [transforms.AffineTransform(0.0, factor)])
        return fn.to_event(event_dim)

    x = torch.full((50,), COUNT)
    plain = seeded_loss(pv.IWAE(3), *gamma_pair(lambda: RejectionGamma(a, r)), x, params=(a, r))
    other = seeded_loss(pv.IWAE(3), *gamma_pair(wrapped, event_dim, factor), x, params=(a, r))
    assert plain[0] == pytest.approx(other[0])
    torch.testing.assert_close(plain[1], other[1])


class Whole(dist.Gamma):
    """A distribution that says in its own words that its draws carry all of the gradient."""

    def score_parts(self, value):
        return dist.score_parts.ScoreParts(self.log_prob(value), 0, self.log_prob(value))


@pytest.mark.parametrize("event_dim", [0, 1])
@pytest.mark.parametrize("gradient", ["total", "dreg"])
def test_no_score_is_no_score(event_dim, gradient):
    found = []
    for kind in (Whole, dist.Gamma):
        a, r = (torch.full((50,) + (1,) * event_dim, value, requires_grad=True) for value in (1.3, 0.8))
        pair = gamma_pair(lambda: kind(a, r).to_event(event_dim), event_dim)  # noqa: B023
        found.append(seeded_loss(pv.IWAE(3, gradient=gradient), *pair, torch.full((50,), COUNT), params=(a, r)))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("objective", [pv.ELBO(gradient="stl"), pv.IWAE(3, gradient="dreg"), pv.RWS(gradient="dreg")])
def test_rejection_is_refused_where_draws_must_carry_all(objective):
    pair = gamma_pair(lambda: RejectionGamma(*gamma_parameters((2,))).expand([2]))
    refused(ValueError, r'guide site "z" \(RejectionGamma\) draws by rejection', objective.loss, *pair, torch.ones(2))


# --- masks: what is not counted is drawn all the same, and what is drawn from it counts -----------------------------


@pytest.mark.parametrize("how", ["handler", "distribution", "part", "never", "no distribution"])
@pytest.mark.parametrize("num", [1, 3])
def test_a_masked_draw_is_scored(num, how, agree):
    # log w is log p(x | c) alone (or for "part" of the data), whose mean depends on the guide of c.
    x = torch.tensor([0.9, -0.4]).repeat(R)
    logit = torch.full((2 * R,), 0.3, requires_grad=True)
    kept = torch.tensor([False, how == "part"]).repeat(R)

    def site(p):
        fn = dist.Bernoulli(logits=p.expand(2 * R))
        if "distribution" in how:
            return pyro.sample("c", fn.mask(False if how == "no distribution" else kept))
        with poutine.mask(mask=False if how == "never" else kept):
            return pyro.sample("c", fn)

    def model(x):
        with pyro.plate("data", len(x)):
            c = site(torch.tensor(-0.5))
            pyro.sample("x", dist.Normal(c, 0.8), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            site(logit)

    pv.ELBO(num).differentiable_loss(model, guide, x).backward()
    value = torch.tensor(0.3, requires_grad=True)
    q, on = dist.Bernoulli(logits=value), value.sigmoid()
    for datum, counts in zip((0.9, -0.4), (0.0, float(how == "part")), strict=True):
        ones, zeros = (dist.Normal(c, 0.8).log_prob(torch.tensor(datum)) for c in (1.0, 0.0))
        elbo = on * ones + (1 - on) * zeros - counts * kl_divergence(q, dist.Bernoulli(logits=torch.tensor(-0.5)))
        (truth,) = torch.autograd.grad(elbo, value, retain_graph=True)
        agree(f"ELBO({num})", f"masked by {how}", f"datum {datum}", -logit.grad[datum < 0 :: 2], truth)


@pytest.mark.parametrize("options", [{"kl_weight": 0.0}, {}], ids=str)
def test_log_weights_without_gradient_leave_the_score(options, agree):
    # With kl_weight 0 log w is log p(x | z); as noise of the guide u is in no term at all, but moves z.
    logit = torch.full((R,), 0.3, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4)))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            if options:
                pyro.sample("z", dist.Bernoulli(logits=logit))
            else:
                u = pyro.sample("u", dist.Bernoulli(logits=logit), infer={"is_auxiliary": True})
                pyro.sample("z", dist.Bernoulli(0.2 + 0.6 * u))

    pv.ELBO(2, **options).differentiable_loss(model, guide, torch.full((R,), 0.9)).backward()
    value = torch.tensor(0.3, requires_grad=True)

    def elbo(on):
        q, p = dist.Bernoulli(on), dist.Bernoulli(torch.tensor(0.4))
        ones, zeros = (dist.Normal(z, 0.8).log_prob(torch.tensor(0.9)) for z in (1.0, 0.0))
        return on * ones + (1 - on) * zeros - (0.0 if options else kl_divergence(q, p))

    on = value.sigmoid()
    truth = elbo(on) if options else on * elbo(torch.tensor(0.8)) + (1 - on) * elbo(torch.tensor(0.2))
    agree(f"ELBO({options})", "no gradient in log w", "d/dlogit", -logit.grad, torch.autograd.grad(truth, value)[0])


# --- particles without weight ---------------------------------------------------------------------------------------


def test_a_particle_without_weight_has_the_signal_of_one_with_next_to_none():
    grads = []  # one alone of 20 has none, at most data
    for floor in (-1e4, -math.inf):
        logit = torch.tensor(-3.0, requires_grad=True)

        def model(x):
            with pyro.plate("data", len(x)):
                c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.5)))
                pyro.factor("x", torch.where(c == 1, floor, 0.1 * x))  # noqa: B023

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("c", dist.Bernoulli(logits=logit.expand(len(x))))  # noqa: B023

        grads.append(seeded_loss(pv.IWAE(20), model, guide, torch.arange(5.0), params=[logit])[1][0])
    torch.testing.assert_close(grads[0], grads[1])


# --- straight through: a hard draw that carries the soft one, by which it is scored ---------------------------------

TEMPERATURE = torch.tensor(0.6, dtype=torch.float64)
BITS = torch.tensor([[0.5], [-1.0], [1.5]], dtype=torch.float64)
KINDS = {
    "bernoulli": lambda logits: dist.RelaxedBernoulliStraightThrough(TEMPERATURE, logits=logits).to_event(1),
    "categorical": lambda logits: dist.RelaxedOneHotCategoricalStraightThrough(TEMPERATURE, logits=logits),
}


def straight_pair(kind, phi, theta):
    """Two units whose prior and posterior are relaxed; x hangs on the hard draw."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", KINDS[kind](torch.zeros(2)))
            pyro.sample("x", dist.Normal((theta * z).sum(-1, keepdim=True), 0.7).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", KINDS[kind](phi * x))

    return model, guide


def by_hand(kind, gradient, soft, hard, phi, theta):
    """IWAE's gradient in phi and theta, from these draws of the soft value, live in phi."""
    soft_leaf, hard_leaf = soft.detach().requires_grad_(), hard.detach().requires_grad_()
    hard_leaf._unquantize = soft_leaf

    def log_w(leaf, q):
        x = dist.Normal((theta * leaf).sum(-1, keepdim=True), 0.7).to_event(1).log_prob(BITS)
        return x + KINDS[kind](torch.zeros(2)).log_prob(leaf) - KINDS[kind](q * BITS).log_prob(leaf)

    weights = log_w(hard_leaf, phi).detach().softmax(0)
    path = weights**2 if gradient == "dreg" else weights
    along = torch.autograd.grad((path * log_w(hard_leaf, phi.detach())).sum(), (soft_leaf, hard_leaf))
    of_phi = torch.autograd.grad(sum((g.detach() * soft).sum() for g in along), phi)  # hard follows soft one to one
    return of_phi[0], torch.autograd.grad((weights * log_w(hard_leaf, phi)).sum(), theta)[0]


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
@pytest.mark.parametrize("make", [pv.IWAE, Unknown := type("Unknown", (pv.IWAE,), {"proportional": False})])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_a_hard_draw_carry_the_soft_one(kind, make, gradient):
    phi, theta = (torch.tensor(v, requires_grad=True) for v in ([0.4, -0.7], [1.1, 0.3]))
    seen = []

    def model_and_guide(keep):
        model, guide = straight_pair(kind, phi, theta)

        def kept(x):
            with poutine.trace() as traced:
                guide(x)
            seen.append(traced.trace.nodes["z"]["value"])

        return model, kept if keep else guide

    loss, found = seeded_loss(make(4, gradient=gradient), *model_and_guide(False), BITS, params=(phi, theta))
    assert loss == pytest.approx(seeded_loss(pv.IWAE(4), *model_and_guide(True), BITS)[0], rel=1e-12)
    hard = seen[-1]
    wanted = by_hand(kind, gradient, hard._unquantize, hard, phi, theta)
    torch.testing.assert_close([-g for g in found], list(wanted))


@pytest.mark.parametrize("objective", [pv.RWS(4), pv.RWS(4, gradient="dreg"), pv.TVO(4)], ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_wake_sleep_scores_the_soft_draw(kind, objective):
    phi, theta = (torch.tensor(v, requires_grad=True) for v in ([0.4, -0.7], [1.1, 0.3]))
    pair = straight_pair(kind, phi, theta)
    if isinstance(objective, pv.RWS):
        assert seeded_loss(objective, *pair, BITS)[0] == pytest.approx(seeded_loss(pv.IWAE(4), *pair, BITS)[0])
    _, (of_phi, _) = seeded_loss(objective, *pair, BITS, params=(phi, theta))
    assert of_phi.abs().max() < 20  # a density of the hard value has slopes beyond 1000


def test_annealing_refuses_hard_draws_by_name():
    pair = straight_pair("bernoulli", torch.tensor([0.4, -0.7]), torch.tensor([1.1, 0.3]))
    refused(ValueError, "gives one value and scores another", pv.ais_log_likelihood, pair[0], BITS)
