"""Data whose bound is -inf count in a training step as if they had no scale, and are counted; all else is as it is."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyrovae as pv
from pyrovae.engine.left_out import leaving_out
from pyrovae.engine.randomness import isolated_rng

X = torch.linspace(-2, 2, 6)
DEAD = torch.tensor([False, True, False, False, True, False])
OBJECTIVES = [
    pv.ELBO(2), pv.ELBO(gradient="stl"), pv.IWAE(3), pv.IWAE(3, gradient="dreg"), pv.Renyi(0.5, 3), pv.VRMax(3),
    pv.MIWAE(2, 2), pv.PIWAE(2, 2), pv.CIWAE(0.5, 3), pv.VIMCO(3), pv.RWS(3), pv.RWS(3, gradient="dreg"), pv.TVO(3),
]  # fmt: skip


class Pair(nn.Module):
    """A latent each, and a factor of ``value`` for the dead."""

    def __init__(self, value, scale=None):
        super().__init__()
        self.m, self.w = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.7))
        self.value, self.scale, self.dead = value, scale, DEAD

    def weighed(self):
        return poutine.scale(scale=1.0 if self.scale is None else self.scale)

    def guide(self, x):
        with self.weighed(), pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.m * x, 0.8))

    def model(self, x):
        with self.weighed(), pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.w * z, 0.5), obs=x)
            pyro.factor("f", torch.where(self.dead, self.value, 0.0))


def outcome(pair, objective):
    with isolated_rng(3), leaving_out() as counts:
        loss = objective.differentiable_loss(pair.model, pair.guide, X)
        loss.backward()
    return loss.item(), [p.grad for p in pair.parameters()], [int(count) for count in counts]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_they_count_as_if_they_had_no_scale(objective):
    loss, gradients, counts = outcome(Pair(-math.inf), objective)
    expected, right, none = outcome(Pair(0.0, torch.where(DEAD, 1e-30, 1.0)), objective)
    assert counts == [2]
    assert none == [0]
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradients, right)
    assert all(g.abs() > 1e-4 for g in gradients)


@pytest.mark.parametrize("objective", [pv.ELBO(2), pv.IWAE(3), pv.ELBO(2, free_bits=0.1)], ids=repr)
def test_only_in_a_step_and_only_where_others_are_left(objective):
    pair = Pair(-math.inf)
    assert objective.loss(pair.model, pair.guide, X) == math.inf
    loss, _, counts = outcome(pair, objective)
    assert math.isfinite(loss)
    assert counts == [2]
    pair.dead = torch.ones(6, dtype=torch.bool)
    assert math.isnan(outcome(pair, objective)[0])
    for value in (math.nan, math.inf):
        with pyro.validation_enabled(False):
            loss, _, counts = outcome(Pair(value), objective)
        assert not math.isfinite(loss)
        assert counts == [0]


def test_a_datum_in_several_plates_counts_once():
    """A bound is of each cell; a datum is the last plate's."""
    m = torch.tensor(0.0, requires_grad=True)

    def model(x):
        with pyro.plate("times", 4, dim=-2), pyro.plate("data", 6, dim=-1):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)
            pyro.factor("f", torch.where(DEAD, -math.inf, 0.0).expand(4, 6))

    with leaving_out() as counts:
        loss = pv.ELBO().differentiable_loss(model, lambda x: None, X.expand(4, 6))
    assert [int(count) for count in counts] == [2]
    assert loss.item() == pytest.approx(-4 * dist.Normal(0.0, 1.0).log_prob(X[~DEAD]).sum().item(), rel=1e-5)
