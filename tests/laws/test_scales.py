"""A scale on all sites is a factor of the bound; on some, it tempers these inside of it, as kl_weight does."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO

import pyrovae as pv
from tests.laws.pairs import GAUSSIAN
from tests.laws.programs import X, lp, normal, run_of, seeded_loss


@pytest.mark.parametrize(
    ("objective", "bound"),
    [(pv.IWAE(4), lambda w: w.exp().mean(0).log()), (pv.ELBO(4), lambda w: w.mean(0))],
    ids=["IWAE", "ELBO"],
)
def test_a_scale_on_everything_is_a_factor_of_the_bound(objective, bound):
    pair, params = GAUSSIAN, GAUSSIAN.params()
    torch.manual_seed(2)
    log_w = pv.log_weights(*pair.programs(params), pair.data, num_particles=4)
    for scale in (0.25, torch.tensor([0.5, 3.0])):
        model, guide = (poutine.scale(program, scale) for program in pair.programs(params))
        torch.manual_seed(2)
        assert objective.loss(model, guide, pair.data) == pytest.approx(-float((scale * bound(log_w)).sum()))
        torch.manual_seed(2)
        torch.testing.assert_close(pv.log_weights(model, guide, pair.data, num_particles=4), log_w)


def learned(theta, phi, scale_x=1.0, scale_z=1.0, guide_scale=None):
    """A two-layer pair whose sites are scaled as asked."""

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=scale_z):
                z = pyro.sample("z", normal(torch.zeros(2)).to_event(1))
                y = pyro.sample("y", normal(theta * z.sum(-1), 0.9))
            with poutine.scale(scale=scale_x):
                pyro.sample("x", normal(theta * z + y.unsqueeze(-1), 0.7).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=scale_z if guide_scale is None else guide_scale):
            z = pyro.sample("z", normal(phi * x, phi.exp() / 2).to_event(1))
            pyro.sample("y", normal(phi * z.sum(-1), 0.8))

    return model, guide


@pytest.mark.parametrize("gradient", ["total", "stl", "dreg"])
@pytest.mark.parametrize("make", [pv.ELBO, pv.IWAE, pv.MIWAE, pv.PIWAE])
def test_a_scale_on_some_sites_tempers_them_as_the_weights_do(make, gradient):
    params = [torch.tensor(0.6, requires_grad=True), torch.tensor(0.4, requires_grad=True)]
    weighted = make(num_particles=3, gradient=gradient, kl_weight=0.5, likelihood_weight=2.0)
    scaled = make(num_particles=3, gradient=gradient)
    a = seeded_loss(weighted, *learned(*params), X, params=params)
    b = seeded_loss(scaled, *learned(*params, scale_x=2.0, scale_z=0.5), X, params=params)
    assert a[0] == pytest.approx(b[0], rel=1e-12)
    torch.testing.assert_close(a[1], b[1], rtol=1e-10, atol=1e-11)


def test_tempering_of_one_site_is_inside_the_logarithm_and_log_weights_ignore_it():
    model, guide = learned(torch.tensor(0.6), torch.tensor(0.4), scale_x=2.0)
    plain = learned(torch.tensor(0.6), torch.tensor(0.4))
    values = []
    for pair in ((model, guide), plain):
        pyro.set_rng_seed(3)
        values.append(pv.log_weights(*pair, X, num_particles=3))
    torch.testing.assert_close(*values)
    (loss, _), seen = run_of(lambda m, g, x: seeded_loss(pv.IWAE(3), m, g, x), model, guide, X)
    likelihood = lp(normal(0.6 * seen["z"] + seen["y"].unsqueeze(-1), 0.7), X, 1)
    assert loss == pytest.approx(-float((values[0] + likelihood).exp().mean(0).log().sum()), rel=1e-12)


def test_the_elbo_scales_each_site_as_trace_elbo_does():
    params = [torch.tensor(0.6, requires_grad=True), torch.tensor(0.4, requires_grad=True)]
    pair = learned(*params, scale_x=3.0, scale_z=0.5, guide_scale=2.0)
    ours = seeded_loss(pv.ELBO(3), *pair, X, params=params)
    theirs = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    theirs = seeded_loss(theirs, *pair, X, params=params)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
    torch.testing.assert_close(ours[1], theirs[1])


def test_a_tempered_discrete_latent_has_the_gradient_of_kl_weight():
    logit = torch.tensor(0.3, requires_grad=True)

    def pair(scale):
        def model(x):
            with pyro.plate("data", len(x)):
                with poutine.scale(scale=scale):
                    c = pyro.sample("c", dist.Bernoulli(0.4))
                pyro.sample("x", normal(c, 0.7), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)), poutine.scale(scale=scale):
                pyro.sample("c", dist.Bernoulli(logits=logit * x))

        return model, guide

    scaled = seeded_loss(pv.IWAE(3), *pair(0.5), X[:, 0], params=[logit])
    weighted = seeded_loss(pv.IWAE(3, kl_weight=0.5), *pair(1.0), X[:, 0], params=[logit])
    assert scaled[0] == pytest.approx(weighted[0])
    torch.testing.assert_close(scaled[1], weighted[1])


def test_dreg_refuses_latents_tempered_differently():
    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(0.5 * x, 0.8).to_event(1))
            with poutine.scale(scale=0.5):
                pyro.sample("y", normal(z.sum(-1), 0.8))

    model, _ = learned(torch.tensor(0.6), torch.tensor(0.4))
    with pytest.raises(ValueError, match='"y"'):
        pv.IWAE(3, gradient="dreg").differentiable_loss(model, guide, X)
    pv.IWAE(3).differentiable_loss(model, guide, X)


@pytest.mark.parametrize("fold", [False, True])
def test_latents_tempered_datum_by_datum_stick_the_landing_and_are_refused_by_dreg(fold):
    x, phi, scale = X[:, 0], torch.tensor(0.4, requires_grad=True), torch.arange(1.0, 1.0 + len(X)).to(X) / 2

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=scale.repeat(len(x) // len(scale))):
                z = pyro.sample("z", normal(0.0))
            pyro.sample("x", normal(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=scale.repeat(len(x) // len(scale))):
            pyro.sample("z", normal(phi * x, 0.8))

    loss, (gradient,) = seeded_loss(pv.ELBO(3, gradient="stl", fold_particles=fold), model, guide, x, params=[phi])
    pyro.set_rng_seed(3)
    z = normal(phi * x, 0.8).expand([3, len(x)]).rsample()
    kl = lp(normal(phi.detach() * x, 0.8), z) - lp(normal(0.0), z)
    by_hand = (scale * kl - lp(normal(z), x)).mean(0).sum()
    assert loss == pytest.approx(by_hand.item())
    torch.testing.assert_close(gradient, torch.autograd.grad(by_hand, phi)[0])
    with pytest.raises(ValueError, match='sites and data, but "z"'):
        pv.IWAE(3, gradient="dreg", fold_particles=fold).loss(model, guide, x)


@pytest.mark.parametrize("objective", [pv.ELBO(2), pv.IWAE(3), pv.IWAE(3, gradient="dreg"), pv.RWS(3)], ids=repr)
def test_two_scales_without_latents_are_the_weighted_likelihood(objective):
    w = torch.tensor(0.3, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=2.0):
                pyro.sample("x", normal(w), obs=x[:, 0])
            pyro.sample("y", normal(2 * w), obs=x[:, 1])

    loss, grads = seeded_loss(objective, model, lambda x: None, X, params=[w])
    by_hand = -(2 * normal(w).log_prob(X[:, 0]) + normal(2 * w).log_prob(X[:, 1])).sum()
    assert loss == pytest.approx(by_hand.item())
    torch.testing.assert_close(grads, torch.autograd.grad(by_hand, [w]))


@pytest.mark.parametrize("make", [pv.ELBO, pv.IWAE, pv.PIWAE, pv.CIWAE, pv.Renyi])
@pytest.mark.parametrize("gradient", ["total", "stl", "dreg"])
def test_a_guide_of_another_precision_than_the_data_has_the_same_gradient(make, gradient):
    w = torch.tensor(0.5, dtype=torch.float32, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(len(x), dtype=torch.float32)))
            pyro.sample("x", normal(z, 0.7), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(w * x.float(), 0.8))

    objective = make(num_particles=3, gradient=gradient)
    found, same = (seeded_loss(objective, model, guide, x, params=[w]) for x in (X[:, 0], X[:, 0].float()))
    assert found[0] == pytest.approx(same[0], rel=1e-5)
    torch.testing.assert_close(found[1], same[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [pv.IWAE, pv.MIWAE])
def test_a_scale_for_each_datum_is_one_for_each_where_particles_are_folded_into_the_batch(make):
    theta, weights = torch.tensor(0.6, requires_grad=True), torch.tensor([0.5, 3.0])

    def model(x, labels):
        with pyro.plate("data", len(x)), poutine.scale(scale=weights[labels]):
            pyro.sample("x", normal(theta * pyro.sample("z", normal(0.0))), obs=x)

    def guide(x, labels):
        with pyro.plate("data", len(x)), poutine.scale(scale=weights[labels]):
            pyro.sample("z", normal(theta * x, 0.8))

    batch = X[:, 0], torch.arange(len(X)) % 2
    plain, folded = (
        seeded_loss(make(num_particles=3, fold_particles=fold), model, guide, *batch, params=[theta])
        for fold in (False, True)
    )
    assert folded[0] == pytest.approx(plain[0], rel=1e-12)
    torch.testing.assert_close(folded[1], plain[1])


def test_a_scale_by_what_folded_particles_draw_is_refused():
    def program(x, observe):
        with pyro.plate("data", len(x)), poutine.scale(scale=1 + torch.arange(len(x)) // 3):
            z = pyro.sample("z", normal(0.0))
            if observe:
                pyro.sample("x", normal(z), obs=x)

    x = torch.arange(3.0)
    with pytest.raises(ValueError, match="varies with the particles"):
        pv.ELBO(2, fold_particles=True).loss(lambda x: program(x, True), lambda x: program(x, False), x)
