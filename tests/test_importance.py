"""Shapes and Pyro semantics: what a pair's log-weights are, sentence by sentence of the contract."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO, autoguide
from torch import nn

import pyrovae as pv
from tests.laws.programs import B, X, lp, normal, plain_guide, plain_model, run_of, seeded_loss, weights_and_values
from tests.pairs import guide_of, model_of
from tests.state import refused

pytestmark = pytest.mark.double(7)


# --- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [1, 4])
def test_log_weights_are_particles_by_data(num):
    log_w, seen = weights_and_values(plain_model, plain_guide, X, num_particles=num)
    z = seen["z"].view(num, B, 2)
    assert log_w.shape == (num, B)
    by_hand = lp(normal(0.0), z, 1) + lp(normal(z, 0.7), X, 1) - lp(normal(0.5 * X, 0.8), z, 1)
    torch.testing.assert_close(log_w, by_hand)


def test_several_latents_and_plates_inside_the_data_plate():
    def model(x):
        with pyro.plate("data", B, dim=-1):
            h = pyro.sample("h", normal(0.0))
            with pyro.plate("pixels", 2, dim=-2):
                z = pyro.sample("z", normal(h, 0.5))
                pyro.sample("x", normal(z, 0.7), obs=x.T)
            pyro.sample("y", normal(h, 0.3), obs=x[:, 0])

    def guide(x):
        with pyro.plate("data", B, dim=-1):
            with pyro.plate("pixels", 2, dim=-2):
                z = pyro.sample("z", normal(0.5 * x.T, 0.8))
            pyro.sample("h", normal(z.sum(-2, keepdim=True), 0.6))

    log_w, seen = weights_and_values(model, guide, X)
    z, h = seen["z"], seen["h"].view(4, B)
    assert log_w.shape == (4, B)
    inner = lp(normal(h.unsqueeze(1), 0.5), z) + lp(normal(z, 0.7), X.T) - lp(normal(0.5 * X.T, 0.8), z)
    outer = lp(normal(0.0), h) + lp(normal(h, 0.3), X[:, 0]) - lp(normal(z.sum(-2), 0.6), h)
    torch.testing.assert_close(log_w, inner.sum(1) + outer)


def global_model(x):
    g = pyro.sample("g", normal(0.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", normal(g))
        pyro.sample("x", normal(z), obs=x)


def global_guide(x):
    g = pyro.sample("g", normal(0.1, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", normal(0.5 * x + g, 0.7))


def test_global_latents_have_joint_weights():
    x = X[:, 0]
    log_w, seen = weights_and_values(global_model, global_guide, x)
    g, z = seen["g"].view(4, 1), seen["z"]
    assert log_w.shape == (4,)
    each = lp(normal(g), z) + lp(normal(z), x) - lp(normal(0.5 * x + g, 0.7), z)
    torch.testing.assert_close(log_w, each.sum(1) + (lp(normal(0.0), g) - lp(normal(0.1, 0.5), g)).squeeze(1))
    pyro.set_rng_seed(3)
    again = pv.log_weights(global_model, global_guide, x, num_particles=4)
    loss, _ = seeded_loss(pv.IWAE(4), global_model, global_guide, x)
    assert loss == pytest.approx(-float(again.logsumexp(0) - math.log(4)))


def test_a_global_guide_of_an_observed_only_plate():
    # The latent is outside of the data plate, every observation inside: one weight for the data set.
    def model(x):
        g = pyro.sample("g", normal(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", normal(g), obs=x)

    log_w, seen = weights_and_values(model, lambda x: pyro.sample("g", normal(0.3, 0.5)), X[:, 0])
    g = seen["g"].view(4, 1)
    by_hand = lp(normal(g), X[:, 0]).sum(1, keepdim=True) + lp(normal(0.0), g) - lp(normal(0.3, 0.5), g)
    torch.testing.assert_close(log_w, by_hand.squeeze(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_losses_and_gradients_keep_their_dtype(dtype):
    torch.set_default_dtype(dtype)
    slope = torch.tensor(0.5, requires_grad=True)

    guide = guide_of(lambda x: normal(slope * x, 0.8).to_event(1))

    assert pv.log_weights(plain_model, guide, X.to(dtype), num_particles=2).dtype == dtype
    for objective in (pv.ELBO(2), pv.IWAE(2, gradient="dreg"), pv.PIWAE(2, 3), pv.ELBO(free_bits=0.1)):
        loss = objective.differentiable_loss(plain_model, guide, X.to(dtype))
        assert loss.dtype == dtype
        assert torch.autograd.grad(loss, slope)[0].dtype == dtype


# --- masks, factors, marks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["poutine", "distribution"])
def test_masked_sites_count_as_zero(where):
    kept = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)).to_event(1))
            fn = normal(z, 0.7).to_event(1)
            if where == "distribution":
                pyro.sample("x", fn.mask(kept), obs=x)
            else:
                with poutine.mask(mask=kept):
                    pyro.sample("x", fn, obs=x)

    log_w, seen = weights_and_values(model, plain_guide, X)
    z = seen["z"]
    kl = lp(normal(0.0), z, 1) - lp(normal(0.5 * X, 0.8), z, 1)
    torch.testing.assert_close(log_w, kl + lp(normal(z, 0.7), X, 1) * kept)
    loss, _ = seeded_loss(pv.IWAE(4), poutine.mask(plain_model, kept), poutine.mask(plain_guide, kept), X)
    pyro.set_rng_seed(3)
    whole = pv.log_weights(plain_model, plain_guide, X, num_particles=4)
    assert loss == pytest.approx(-float(((whole.logsumexp(0) - math.log(4)) * kept).sum()))


def test_factors_are_likelihood_in_the_model_and_are_subtracted_in_the_guide():
    strength = torch.tensor(0.7, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(torch.zeros(2)).to_event(1))
            pyro.factor("energy", -z.square().sum(-1))

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(0.5 * x, 0.8).to_event(1))
            pyro.factor("loss", strength * z[..., 0], has_rsample=True)

    log_w, seen = weights_and_values(model, guide, X)
    z = seen["z"]
    q = lp(normal(0.5 * X, 0.8), z, 1) + 0.7 * z[..., 0]
    torch.testing.assert_close(log_w, lp(normal(0.0), z, 1) - z.square().sum(-1) - q)
    objective = pv.ELBO(4, likelihood_weight=3.0, kl_weight=0.5)
    (loss, (grad,)), seen = run_of(lambda *a: seeded_loss(objective, *a, params=[strength]), model, guide, X)
    z = seen["z"]
    q = lp(normal(0.5 * X, 0.8), z, 1) + 0.7 * z[..., 0]
    weighted = -3 * z.square().sum(-1) + 0.5 * (lp(normal(0.0), z, 1) - q)
    assert loss == pytest.approx(-float(weighted.mean(0).sum()))
    assert grad == pytest.approx(float(0.5 * z[..., 0].mean(0).sum()))


def test_enumeration_marks_are_ignored_in_weights_and_refused_in_gradients():
    logit = torch.tensor(0.3, requires_grad=True)

    model = model_of(lambda c: normal(c, 0.7), lambda x: dist.Bernoulli(0.4), site="c")

    guide = pyro.infer.config_enumerate(guide_of(lambda x: dist.Bernoulli(logits=logit * x), "c"))
    log_w, seen = weights_and_values(model, guide, X[:, 0])
    c, x = seen["c"], X[:, 0]
    assert log_w.shape == (4, B)
    by_hand = lp(dist.Bernoulli(0.4), c) + lp(normal(c, 0.7), x) - lp(dist.Bernoulli(logits=0.3 * x), c)
    torch.testing.assert_close(log_w, by_hand)
    assert math.isfinite(pv.IWAE(4).loss(model, guide, x))
    for objective in (pv.RWS(2), pv.IWAE(4), pv.VIMCO(2)):
        refused(ValueError, '"c"', objective.differentiable_loss, model, guide, x)


def test_guides_without_latents_and_deterministic_sites():
    def model(x):
        with pyro.plate("data", len(x)):
            loc = pyro.deterministic("loc", x.new_tensor(0.2).expand(len(x)))
            pyro.sample("x", normal(loc.unsqueeze(-1), 0.7).to_event(1), obs=x)

    def guide(x):
        pass

    exact = lp(normal(0.2, 0.7), X, 1)
    torch.testing.assert_close(pv.log_weights(model, guide, X, num_particles=3), exact.expand(3, B))
    for objective in (pv.ELBO(), pv.IWAE(5), pv.PIWAE(2, 3), pv.VRMax(2)):
        assert objective.loss(model, guide, X) == pytest.approx(-float(exact.sum()))


# --- autoguides -----------------------------------------------------------------------------------------------------


def auto_model(x):
    g = pyro.sample("g", normal(0.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("x", normal(g, s), obs=x)


def structured(model, **options):
    conditionals = {"g": "normal", "s": "normal"}
    return autoguide.AutoStructured(model, conditionals=conditionals, dependencies={"s": {"g": "linear"}}, **options)


AUTOGUIDES = {
    "AutoNormal": autoguide.AutoNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
    "AutoStructured": structured,
}


@pytest.mark.parametrize("kind", AUTOGUIDES)
def test_autoguides_have_true_weights(kind):
    x = X.flatten()
    guide = AUTOGUIDES[kind](auto_model, init_scale=0.8)  # wider than the posterior: bounded weights
    guide(x)
    log_w = pv.log_weights(auto_model, guide, x, num_particles=20_000).detach()
    assert log_w.shape == (20_000,)
    # The evidence by quadrature over (g, log s); |z| < 5 has a false-alarm rate of 6e-7.
    g, t = torch.linspace(-6, 6, 601), torch.linspace(-1.8, 1.8, 361)
    joint = lp(normal(0.0), g)[:, None] + lp(normal(0.0, 0.3), t)
    joint = joint + sum(lp(normal(g[:, None], t.exp()), xi) for xi in x)
    evidence = joint.flatten().logsumexp(0) + math.log(0.02 * 0.01)
    w = (log_w - evidence).exp()
    assert abs(w.mean() - 1) < 5 * w.std() / len(w) ** 0.5
    loss, _ = seeded_loss(pv.ELBO(), auto_model, guide, x)
    theirs, _ = seeded_loss(Trace_ELBO(), auto_model, guide, x)
    assert loss == pytest.approx(theirs, rel=1e-10)


@pytest.mark.parametrize("kind", AUTOGUIDES)
@pytest.mark.parametrize("gradient", ["total", "stl", "dreg"])
def test_autoguides_train(kind, gradient):
    x = X.flatten()
    guide = AUTOGUIDES[kind](auto_model)
    guide(x)
    objective = pv.IWAE(3, gradient=gradient)
    objective.differentiable_loss(auto_model, guide, x).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.parameters())


@pytest.mark.parametrize("kind", [autoguide.AutoDelta, autoguide.AutoLaplaceApproximation])
def test_point_estimates_are_map_under_total_and_refused_under_stl(kind):
    x = X.flatten()
    guide = kind(auto_model)
    guide(x)
    ours = seeded_loss(pv.ELBO(), auto_model, guide, x, params=list(guide.parameters()))
    theirs = seeded_loss(Trace_ELBO(), auto_model, guide, x, params=list(guide.parameters()))
    assert ours[0] == pytest.approx(theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])
    for gradient in ("stl", "dreg"):
        refused(ValueError, r'".*" is a Delta', pv.ELBO(gradient=gradient).differentiable_loss, auto_model, guide, x)


def test_autodiscreteparallel_is_drawn_and_scored():
    means, weights, x = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([0.5, 0.3, 0.2]), torch.full((4000,), 0.7)
    model = model_of(lambda c: normal(means[c]), lambda x: dist.Categorical(weights), "c")
    joint = weights.log() + lp(normal(means), x[0])
    guide = autoguide.AutoDiscreteParallel(model)
    guide(x)
    guide.c_probs = joint.softmax(-1).expand(len(x), 3).clone()
    torch.testing.assert_close(pv.log_weights(model, guide, x), joint.logsumexp(0).expand(1, len(x)))
    guide.c_probs = torch.tensor([0.6, 0.1, 0.3]).expand(len(x), 3).clone()
    (parameter,) = guide.parameters()  # one of each datum: as many estimates
    _, (found,) = seeded_loss(pv.ELBO(2), model, guide, x, params=[parameter])
    one = parameter.detach()[0].requires_grad_()
    q = torch.distributions.transform_to(dist.constraints.simplex)(one)
    (exact,) = torch.autograd.grad(-(q * (joint - q.log())).sum(), one)
    assert ((found.mean(0) - exact).abs() < 5 * found.std(0) / len(x) ** 0.5).all()  # false alarms: 2e-6


# --- folding --------------------------------------------------------------------------------------------------------


class OneBatchDimension(nn.Module):
    """A user's network, which takes one batch dimension only; at loc = x / 2 the guide is the posterior."""

    def forward(self, z):
        if z.dim() != 2:
            raise RuntimeError(f"expected [batch, features], got {tuple(z.shape)}")
        return z.clone()


@pytest.mark.parametrize("objective", [pv.IWAE, pv.PIWAE, pv.ELBO])
def test_folded_particles_reach_networks_of_one_batch_dimension(objective):
    network = OneBatchDimension()

    model = model_of(lambda z: normal(network(z)).to_event(1), lambda x: normal(x.new_zeros(len(x), 2)).to_event(1))
    guide = guide_of(lambda x: normal(network(x) / 2, 0.5**0.5).to_event(1))

    exact = lp(normal(0.0, 2**0.5), X, 1)
    torch.testing.assert_close(
        pv.log_weights(model, guide, X, num_particles=4, fold_particles=True), exact.expand(4, B)
    )
    assert objective(num_particles=4, fold_particles=True).loss(model, guide, X) == pytest.approx(-float(exact.sum()))
    with pytest.warns(UserWarning, match=r"RuntimeError: expected.*fold_particles=True is faster"):
        assert objective(num_particles=4).loss(model, guide, X) == pytest.approx(-float(exact.sum()))


def test_folding_is_refused_with_a_subsample_and_with_joint_weights():
    def subsampled(program):
        def run(x):
            with pyro.plate("data", 6, subsample=torch.arange(B)):
                program(x)

        return run

    def site(x):
        pyro.sample("z", normal(torch.zeros(B, 2)).to_event(1))

    def observed(x):
        site(x)
        pyro.sample("x", normal(torch.zeros(B, 2)).to_event(1), obs=x)

    refused(ValueError, '"data"', pv.IWAE(3, fold_particles=True).loss, subsampled(observed), subsampled(site), X)
    with pytest.raises(ValueError, match="fold_particles"):
        pv.log_weights(global_model, global_guide, X[:, 0], num_particles=3, fold_particles=True)


def mapped_model(x, matrix, labels=None):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", normal(x.new_zeros(2)).to_event(1))
        shift = 0.0 if labels is None else labels.unsqueeze(-1)
        pyro.sample("x", normal(z @ matrix[:2] + shift, 0.7).to_event(1), obs=x)


def mapped_guide(x, matrix, labels=None):
    with pyro.plate("data", len(x)):
        pyro.sample("z", normal(0.5 * x if labels is None else 0.5 * x + labels.unsqueeze(-1), 0.8).to_event(1))


def test_folding_repeats_what_has_a_row_for_each_datum_and_asks_where_it_cannot_know():
    matrix, labels = torch.tensor([[1.0, 0.3], [-0.2, 0.8], [0.0, 0.0]]), torch.tensor([0.0, 1.0, 2.0])
    for keywords in (False, True):
        args, more = ((X,), {"matrix": matrix, "labels": labels}) if keywords else ((X, matrix, labels), {})
        second = "matrix" if keywords else 1
        refused(
            ValueError, rf"argument {second!r} has as many rows, \[3, 2\]",
            pv.IWAE(4, fold_particles=True).loss, mapped_model, mapped_guide, *args, **more,
        )  # fmt: skip
        along = (0, "labels") if keywords else (0, 2)
        values = []
        for fold in (False, along):
            pyro.set_rng_seed(3)
            values.append(
                pv.log_weights(mapped_model, mapped_guide, *args, num_particles=4, fold_particles=fold, **more)
            )
        torch.testing.assert_close(*values)
    # without another argument of three rows, nothing need be said
    folded = pv.IWAE(4, fold_particles=True)
    assert math.isfinite(folded.loss(mapped_model, mapped_guide, X, matrix[:2], labels))
    assert eval(repr(pv.IWAE(4, fold_particles=(0, "y"))), vars(pv)).fold_particles == (0, "y")
    refused(
        ValueError, "names argument 5", pv.IWAE(4, fold_particles=(0, 5)).loss, mapped_model, mapped_guide, X, matrix
    )


def test_folding_refuses_data_that_do_not_come_first():
    def turned(program):
        return lambda rates, x: program(x)

    refused(
        ValueError, r"has 8 rows, but its data plate has size 3.*fold_particles=\(1,\)",
        pv.IWAE(2, fold_particles=True).loss, turned(plain_model), turned(plain_guide), torch.ones(4), X,
    )  # fmt: skip
    by_name = pv.IWAE(2, fold_particles=(1,)).loss(turned(plain_model), turned(plain_guide), torch.ones(4), X)
    assert math.isfinite(by_name)


def test_pyros_own_check_of_a_program_is_heard():
    """Without Pyro's checks such a program fails otherwise, further on."""

    def model():
        with pyro.plate("rows", 10, 5):
            pyro.sample("x", dist.Bernoulli(0.5))

    def guide():
        with pyro.plate("rows", 10, 5):
            pyro.param("p", torch.ones(3), event_dim=0)
            pyro.sample("x", dist.Bernoulli(0.5))

    refused(ValueError, "invalid shape of pyro.param", pv.ELBO().loss, model, guide)
