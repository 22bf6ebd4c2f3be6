"""Pyro's own objectives, where they are right: equal on the same seed, or in the mean."""

import pyro
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

import pyrovae as pv
from tests.laws.exact import expected, mean
from tests.laws.gradients import draws, exact
from tests.laws.objectives import OBJECTIVES
from tests.laws.pairs import GAUSSIAN, HIERARCHY, MIXED, MIXED_LIVE, MIXTURE, MULTIVARIATE, NET, POSTERIOR

R = 10_000
VECTOR = {"vectorize_particles": True, "max_plate_nesting": 1}


def name(value):
    return value.name


def registered(pair, params):
    """The pair with its parameters as Pyro's param sites, for Pyro's objectives train nothing else."""
    model, guide = pair.programs(params)

    def noted(x):
        for n, p in params.items():
            pyro.param(n, p)
        model(x)

    return noted, guide


def gradients_of(objective, pair, repetitions=None):
    """(loss, gradients) from one seed; with repetitions, many independent gradients ``[R]`` of the bound."""
    size = len(pair.data) * (repetitions or 1)
    params = pair.params(size if repetitions else None, grad=True)
    pyro.clear_param_store()
    torch.manual_seed(7)
    x = pair.data.repeat(repetitions or 1, *[1] * (pair.data.dim() - 1))
    loss = objective.loss_and_grads(*registered(pair, params), x)
    if repetitions is None:
        return float(loss), {n: p.grad for n, p in params.items()}
    return float(loss), {n: -p.grad.view(repetitions, -1).sum(1) for n, p in params.items()}


def assert_equal(pair, ours, theirs):
    (our_loss, our_grads), (their_loss, their_grads) = gradients_of(ours, pair), gradients_of(theirs, pair)
    assert our_loss == pytest.approx(their_loss, rel=1e-12)
    for n in our_grads:
        torch.testing.assert_close(our_grads[n], their_grads[n], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("pair", "num"),
    [(pair, num) for pair in (GAUSSIAN, POSTERIOR, MULTIVARIATE, HIERARCHY) for num in (1, 4)]
    + [(pair, 1) for pair in (MIXTURE, NET, MIXED, MIXED_LIVE)],  # several particles have a baseline, Pyro's have none
    ids=lambda value: getattr(value, "name", value),
)
def test_elbo_is_trace_elbo_seed_by_seed(pair, num):
    assert_equal(pair, pv.ELBO(num), Trace_ELBO(num_particles=num, **VECTOR))


@pytest.mark.parametrize("pair", [MIXTURE, NET, MIXED, MIXED_LIVE], ids=name)
def test_elbo_loss_is_trace_elbo_seed_by_seed_on_discrete_pairs(pair):
    torch.manual_seed(7)
    ours = pv.ELBO(4).loss(*pair.programs(pair.params()), pair.data)
    torch.manual_seed(7)
    theirs = Trace_ELBO(num_particles=4, **VECTOR).loss(*pair.programs(pair.params()), pair.data)
    assert ours == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("pair", [GAUSSIAN, MULTIVARIATE, HIERARCHY], ids=name)
@pytest.mark.parametrize("alpha", [0.0, 0.5, -0.5])
def test_renyi_is_renyi_elbo_seed_by_seed(pair, alpha):
    assert_equal(pair, pv.Renyi(alpha, 4), RenyiELBO(alpha=alpha, num_particles=4, **VECTOR))


@pytest.mark.parametrize("pair", [MIXTURE, NET, MIXED, MIXED_LIVE], ids=name)
def test_elbo_gradient_mean_is_trace_graph_elbos(pair, agree):
    _, theirs = gradients_of(TraceGraph_ELBO(max_plate_nesting=1), pair, R)
    ours = draws(pv.ELBO(2), pair, R)
    for n in theirs:
        agree("ELBO(2) - TraceGraph_ELBO", pair.name, f"d/d{n}", ours[n] - theirs[n], 0.0)


@pytest.mark.parametrize("pair", [MIXTURE, NET], ids=name)
def test_enumeration_agrees_with_the_exact_answers_and_with_the_mean(pair, agree):
    params = pair.params(grad=True)
    model, guide = pair.programs(params)
    enumerated = pyro.infer.config_enumerate(guide, "parallel")
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, enumerated, pair.data)
    loss.backward()
    value, gradients = expected(pair, mean, 1)
    assert -loss.item() == pytest.approx(float(value), rel=1e-12)
    found = draws(pv.ELBO(3), pair, R)
    for n, p in params.items():
        torch.testing.assert_close(-p.grad, gradients[n], rtol=1e-9, atol=1e-12)
        agree("ELBO(3) - TraceEnum_ELBO", pair.name, f"d/d{n}", found[n], -p.grad)


@pytest.mark.parametrize("pair", [GAUSSIAN, POSTERIOR, MULTIVARIATE], ids=name)
def test_closed_form_kl_agrees_in_the_mean(pair, agree):
    _, theirs = gradients_of(TraceMeanField_ELBO(max_plate_nesting=1), pair, R)
    row = next(r for r in OBJECTIVES if r.name == "ELBO(num_particles=1)")
    truth, ours = exact(row, pair), draws(pv.ELBO(1), pair, R)
    for n in theirs:
        agree("TraceMeanField_ELBO", pair.name, f"d/d{n}", theirs[n], truth[n])
        agree("ELBO(1) - TraceMeanField_ELBO", pair.name, f"d/d{n}", ours[n] - theirs[n], 0.0)


def test_masks_count_as_pyro_counts_them():
    kept = torch.tensor([True, False])
    model, guide = (poutine.mask(program, kept) for program in GAUSSIAN.programs(GAUSSIAN.params()))
    losses = []
    for objective in (pv.ELBO(3), Trace_ELBO(num_particles=3, **VECTOR)):
        torch.manual_seed(7)
        losses.append(objective.loss(model, guide, GAUSSIAN.data))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
