"""The losses under torch.func: a gradient is that of backward(), and vmap gives one for each set of parameters."""

import pyro
import pytest
import torch
from torch.func import grad, vmap

import pyrovae as pv
from tests.laws.gradients import seeded
from tests.laws.objectives import OBJECTIVES, Pessimist
from tests.laws.pairs import GAUSSIAN, HIERARCHY, MIXED_LIVE

MEMBERS = [
    *(row.objective() for row in OBJECTIVES if not isinstance(row.objective(), pv.PIWAE | Pessimist)),
    *(pv.RWS(3), pv.RWS(3, gradient="dreg"), pv.TVO(3), pv.SleepPhi(2), pv.ELBO(2, free_bits=0.1)),
]


def loss_of(objective, pair):
    return lambda params: objective.differentiable_loss(*pair.programs(params), pair.data)


@pytest.mark.parametrize("objective", MEMBERS, ids=repr)
def test_gradients_are_those_of_backward(objective):
    for pair in (GAUSSIAN, HIERARCHY, MIXED_LIVE):
        if objective.gradient != "total" and not pair.reparameterised:
            continue
        _, same = seeded(objective, pair)
        pyro.set_rng_seed(1)
        found = grad(loss_of(objective, pair))(pair.params())
        for name, gradient in same.items():
            torch.testing.assert_close(found[name], torch.zeros(()) if gradient is None else gradient)


def test_many_parameters_at_a_time_share_their_noise():
    objective, params = pv.IWAE(3, gradient="dreg"), GAUSSIAN.params()
    several = {name: torch.stack([p, 1.1 * p, p - 0.2]) for name, p in params.items()}
    pyro.set_rng_seed(1)
    found = vmap(grad(loss_of(objective, GAUSSIAN)), randomness="same")(several)
    for i in range(3):
        pyro.set_rng_seed(1)
        each = grad(loss_of(objective, GAUSSIAN))({name: p[i] for name, p in several.items()})
        for name, gradient in each.items():
            torch.testing.assert_close(found[name][i], gradient)


@pytest.mark.parametrize("objective", [pv.PIWAE(2, 2), Pessimist(3)], ids=repr)
def test_what_takes_derivatives_inside_is_refused(objective):
    with pytest.raises(ValueError, match="finds derivatives inside of its loss"):
        grad(loss_of(objective, GAUSSIAN))(GAUSSIAN.params())


def test_noise_that_differs_is_refused():
    several = {name: torch.stack([p, p]) for name, p in GAUSSIAN.params().items()}
    with pytest.raises(ValueError, match="in place, which vmap cannot do differently"):
        vmap(loss_of(pv.ELBO(2), GAUSSIAN), randomness="different")(several)
