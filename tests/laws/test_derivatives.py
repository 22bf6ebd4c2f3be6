"""Derivatives of a bound in its log-weights: closed forms against autograd, their precision, their size in memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pyrovae as pv
from pyrovae.objectives import derivatives
from tests.laws.objectives import Pessimist

GROUPED = {"num_groups": 2, "num_particles": 3}
SHIPPED = [
    pv.ELBO(6), pv.IWAE(6), pv.VIMCO(6), pv.Renyi(0.5, 6), pv.Renyi(-2.0, 6), pv.Renyi(1.5, 6), pv.Renyi(0.999, 6),
    pv.Renyi(1.0001, 6), pv.VRMax(6), pv.MIWAE(**GROUPED), pv.MIWAE(6, 1), pv.PIWAE(**GROUPED), pv.PIWAE(6, 1),
    pv.CIWAE(0.3, 6), pv.CIWAE(0.0, 6), pv.CIWAE(1.0, 6), pv.IWAE(1),
]  # fmt: skip


def by_autograd(bound):
    """The same bound as a function of which nothing is known."""
    return lambda log_w: bound(log_w)


@pytest.mark.parametrize("objective", SHIPPED, ids=repr)
@pytest.mark.parametrize("which", ["bound", "path_bound"])
def test_closed_forms_are_what_autograd_finds(objective, which, monkeypatch):
    monkeypatch.setattr(derivatives, "PORTION", 100)  # a few portions
    bound, log_w = getattr(objective, which), 2 * torch.randn(objective.total_particles, 4, 3)
    for found, wanted in zip(
        derivatives.slope(bound, log_w), derivatives.slope(by_autograd(bound), log_w), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    if not isinstance(objective, pv.VRMax):
        torch.testing.assert_close(
            derivatives.curvature(bound, log_w), derivatives.curvature(by_autograd(bound), log_w)
        )
    for group in {objective.num_particles, objective.total_particles}:
        torch.testing.assert_close(
            *(derivatives.learning_signal(b, log_w, group) for b in (bound, by_autograd(bound))), atol=1e-9, rtol=1e-9
        )
    target = torch.randn(len(log_w), 4, 3, 2)  # several alternatives to each particle
    torch.testing.assert_close(
        *(derivatives.change(b, log_w.unsqueeze(-1), target) for b in (bound, by_autograd(bound))), atol=1e-9, rtol=1e-9
    )


@pytest.mark.parametrize(
    "bound", [o.bound for o in SHIPPED[:12]] + [Pessimist(6).bound], ids=[*map(repr, SHIPPED[:12]), "Pessimist"]
)
def test_single_precision_is_precise_where_one_particle_has_all_the_weight(bound):
    # The others share 1e-8 of the weight: less than float32 can take from 1.
    log_w = torch.tensor([[0.0], [-19.0], [-21.5], [-20.25], [-26.0], [-22.0]]) - 3.0
    assert 1 - log_w.softmax(0)[0] == pytest.approx(1e-8, abs=5e-9)
    exact = derivatives.learning_signal(bound, log_w, 6)
    found = derivatives.learning_signal(bound, log_w.float(), 6)
    torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("power", [1e-2, -1e-2, 3e-3, 1e-3, -1e-4, 1e-5, 1e-6, -1e-7])
@pytest.mark.parametrize("spread", [0.1, 5.0, 300.0, 1e5])
def test_renyi_is_precise_in_single_precision_near_alpha_one(power, spread):
    log_w = (-70.0 + spread * torch.randn(20, 50)).float()
    below = power * (log_w.double() - log_w.double().mean(0))
    exact = (
        log_w.double().mean(0) + torch.logsumexp(below, 0).sub(math.log(20)) / power
    )  # float64 has 9 digits to spare
    if abs(power) * spread < 1e-3:
        exact = log_w.double().mean(0) + below.expm1().mean(0).log1p() / power
    found = pv.Renyi(1 - power, 20).bound(log_w).double()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6 * spread)


def test_renyi_is_precise_near_alpha_one_where_one_of_many_has_all_the_weight():
    log_w = torch.full((100_000, 1), -1e5)
    log_w[0] = -3.0
    found = pv.Renyi(0.99, len(log_w)).bound(log_w.float())
    assert float(found) == pytest.approx(-3 - 100 * math.log(len(log_w)), rel=1e-6)


def test_wake_sleep_reports_the_bound_of_iwae():
    log_w = torch.randn(4, 3)
    torch.testing.assert_close(pv.RWS(4).bound(log_w), log_w.exp().mean(0).log())


@pytest.mark.parametrize("objective", SHIPPED[:-1], ids=repr)
def test_particles_without_weight_are_replaced_like_others(objective):
    log_w = torch.randn(objective.total_particles, 4)
    log_w[1, 0] = log_w[0, 1] = log_w[:2, 2] = -math.inf
    found, wanted = (
        derivatives.learning_signal(b, log_w, objective.num_particles)
        for b in (objective.path_bound, by_autograd(objective.path_bound))
    )
    known = objective.path_bound(log_w).isfinite()
    torch.testing.assert_close(found[:, known], wanted[:, known])


@pytest.mark.parametrize("objective", [*SHIPPED, Pessimist(6)], ids=repr)
def test_particles_and_data_without_weight_give_no_nan(objective):
    log_w = torch.randn(objective.total_particles, 3)
    log_w[:2, 1] = log_w[:, 2] = -math.inf
    weights = objective.weights(log_w)
    assert all(w.isfinite().all() for w in weights)
    assert all((w[:, 2] == 0).all() for w in weights)
    if objective.path_bound(log_w)[1].isfinite():
        assert (weights.reinforce[:, 1] != 0).any()


class Largest(TorchDispatchMode):
    """The largest number of elements that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("gradient", ["total", "dreg"])
def test_no_tensor_of_all_pairs_of_particles_is_made(gradient):
    number, data = 3000, 2
    log_w = torch.randn(number, data)
    for make in (pv.ELBO, pv.IWAE, pv.Renyi, pv.MIWAE, pv.PIWAE, pv.CIWAE):
        grouped = {"num_groups": 2, "num_particles": number // 2}
        objective = make(**grouped if make in (pv.MIWAE, pv.PIWAE) else {"num_particles": number}, gradient=gradient)
        with Largest() as seen:
            objective.weights(log_w)
        assert seen.elements <= (number + 2) * data


def test_a_bound_of_ones_own_is_differentiated_in_portions_that_are_bounded(monkeypatch):
    log_w = torch.randn(300, 2)
    whole = Pessimist(300, gradient="dreg").weights(log_w)
    monkeypatch.setattr(derivatives, "PORTION", 6000)
    with Largest() as seen:
        portions = Pessimist(300, gradient="dreg").weights(log_w)
    assert seen.elements == 6000
    torch.testing.assert_close(portions, whole)
