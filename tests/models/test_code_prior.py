"""The prior over codes: a normalised distribution, causal, without a blind spot, sampled as it is scored."""

import math
from itertools import product

import pytest
import torch
from pyro import poutine

import pyrovae as pv
from pyrovae.errors import DataError
from pyrovae.models import CodePrior
from tests.state import refused

pytestmark = pytest.mark.double(5)


def lively(grid, num_codes, **options):
    """A prior whose logits vary: as it starts they hardly do."""
    prior = CodePrior(grid, num_codes, **{"channels": 6, "num_layers": 3, **options})
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return prior


def every_grid():
    return torch.tensor(list(product(range(2), repeat=4))).view(16, 2, 2)


def test_probabilities_of_all_grids_sum_to_one():
    log_prob = lively((2, 2), 2).distribution().log_prob(every_grid())
    torch.testing.assert_close(log_prob.logsumexp(0), torch.tensor(0.0), atol=1e-12, rtol=0)
    assert log_prob.std() > 0.3


def test_draws_have_the_frequencies_that_log_prob_says():
    prior = lively((2, 2), 2).distribution()
    expected = 4000 * prior.log_prob(every_grid()).exp()
    draws = prior.sample((4000,)).flatten(1) @ torch.tensor([8, 4, 2, 1])
    found = torch.bincount(draws, minlength=16)
    # Chi-squared with 15 degrees of freedom: above 44 with probability 1e-4.
    assert ((found - expected).square() / expected).sum() < 44


@pytest.mark.parametrize(("grid", "kernel_size"), [((3, 4), 3), ((4, 3), 5), ((1, 5), 3), ((5, 1), 3)])
def test_going_code_by_code_gives_the_logits_of_one_pass(grid, kernel_size):
    network = lively(grid, 7, kernel_size=kernel_size).network
    codes = torch.randint(7, (5, *grid))
    coming, logits = iter(codes.flatten(1).T), []
    written = network.generate(5, lambda found: logits.append(found) or next(coming))
    assert torch.equal(written, codes)
    torch.testing.assert_close(torch.stack(logits, -1).view(5, 7, *grid), network(codes))


@pytest.mark.parametrize(("grid", "options"), [((3, 3), {}), ((7, 7), {"num_layers": 6}), ((5, 4), {"kernel_size": 5})])
def test_a_code_is_seen_by_every_position_after_it_and_by_no_other(grid, options):
    network = lively(grid, 3, **options).network
    codes, size = torch.randint(3, grid).flatten(), math.prod(grid)
    changed = codes.repeat(size, 1)
    changed[range(size), range(size)] = (codes + 1) % 3
    difference = (network(changed.view(size, *grid)) - network(codes.view(1, *grid))).abs().sum(1).flatten(1)
    assert torch.equal(difference != 0, torch.ones(size, size).triu(1).bool())


def test_causality_by_gradients():
    network = lively((3, 3), 4).network
    seen = torch.randn(1, 3, 3, 6, requires_grad=True)
    network.embedding.forward = lambda codes: seen
    logits = network(torch.zeros(1, 3, 3, dtype=torch.long)).flatten(2)
    for i in range(9):
        gradient = torch.autograd.grad(logits[..., i].sum(), seen, retain_graph=True)[0].view(9, 6)
        assert (gradient[i:] == 0).all()
        assert (gradient[:i] != 0).any(-1).all()


def test_temperature_divides_logits():
    prior = lively((2, 3), 4)
    codes = torch.randint(4, (6, 2, 3))
    warm = prior.distribution().tempered(0.5).tempered(1.4)
    logits = prior.network(codes) / 0.7
    expected = -torch.nn.functional.cross_entropy(logits, codes, reduction="none").sum((-2, -1))
    torch.testing.assert_close(warm.log_prob(codes), expected)
    cold = prior.distribution().tempered(1e-6).sample((3,))
    best = prior.network(cold).argmax(1)
    assert torch.equal(cold, best)
    refused(ValueError, "temperature must be above 0, got 0", prior.distribution().tempered, 0)


def test_shapes_of_the_distribution():
    fn = lively((2, 3), 4).distribution().expand((5, 2))
    assert fn.sample((3,)).shape == (3, 5, 2, 2, 3)
    assert fn.event_shape == (2, 3)
    assert fn.log_prob(torch.zeros(2, 2, 3)).shape == (5, 2)
    assert fn.support.is_discrete
    assert fn.support.check(torch.tensor([[0.0, 3.0, 1.0], [0.0, 0.0, 0.0]]))
    for wrong in (0.5, 4.0, -1.0):
        refused(ValueError, "support", fn.log_prob, torch.full((2, 2, 3), wrong))


def test_the_log_weight_is_log_p_exactly():
    prior = lively((2, 3), 4)
    codes = torch.randint(4, (6, 2, 3))
    exact = prior.distribution().log_prob(codes)
    torch.testing.assert_close(
        pv.log_weights(prior.model, prior.guide, codes.double(), num_particles=3), exact.expand(3, 6)
    )
    found = pv.log_likelihood(prior.model, prior.guide, codes, num_samples=1)
    torch.testing.assert_close(found.log_prob, exact)
    assert (found.std_error == 0).all()
    assert pv.ELBO(2).loss(prior.model, prior.guide, codes) == pytest.approx(-exact.sum().item())
    assert not poutine.trace(prior.guide).get_trace(codes).stochastic_nodes
    assert prior.likelihood_is == "exact"


def test_training_and_generation():
    """Rows of one code each: a row costs log 3 nats, what follows its first code nothing."""
    codes = torch.randint(3, (300, 2, 1)).expand(-1, -1, 3)
    prior = CodePrior((2, 3), 3, channels=8, num_layers=2).double()
    fit = pv.fit(prior.model, prior.guide, codes, objective=pv.ELBO(), epochs=15, batch_size=30, lr=0.02, compile=False)
    assert 2 * math.log(3) * 0.95 < -fit.history[-1]["bound"] < 2 * math.log(3) + 0.2
    drawn = pv.sample(prior, 50, returns="draws", seed=0)
    assert drawn.shape == (50, 2, 3)
    assert (drawn == drawn[..., :1]).all((-2, -1)).float().mean() > 0.9


def test_it_starts_at_the_frequencies_of_the_codes():
    prior = CodePrior((2, 2), 3, channels=4)
    codes = torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])
    assert prior.initialise(codes) is prior
    torch.testing.assert_close(prior.network.output.bias.softmax(0), torch.tensor([4 / 7, 1 / 7, 2 / 7]))
    refused(DataError, r"integers among 0 \.\.\. 2", prior.initialise, codes + 1)


def test_what_is_refused():
    prior = CodePrior((2, 2), 4, channels=4)
    with pytest.raises(DataError, match=r"data\[0, 0, 0\] = 4"):
        pv.fit(prior.model, prior.guide, torch.full((5, 2, 2), 4), objective=pv.ELBO(), epochs=1)
    refused(ValueError, "CodePrior has no encode", prior.encode, torch.zeros(5, 2, 2))
