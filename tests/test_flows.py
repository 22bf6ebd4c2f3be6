"""Flows: inverses, Jacobians, densities that integrate to one, the right gradient for every way to ask for log q."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.autograd.functional import jacobian

from pyrovae.parts import Autoregressive, Coupling, FlowNormal
from tests.state import grid, scrambled

pytestmark = pytest.mark.double(7)

STEPS = {
    "coupling": lambda dim, context, flip: Coupling(dim, context, (9,), flip),
    "autoregressive": lambda dim, context, flip: Autoregressive(dim, context, (max(9, dim),) * 2, flip),
}
each_step = pytest.mark.parametrize("kind", STEPS)


def flow(kind, dim=3, batch=(5,), context=4, steps=3):
    """A flow of a batch, with a context of each of its data; all of its parameters."""
    modules = scrambled(torch.nn.ModuleList(STEPS[kind](dim, context, i % 2 == 1) for i in range(steps)))
    loc, h = torch.randn(*batch, dim, requires_grad=True), torch.randn(*batch, context, requires_grad=True)
    log_scale = (0.3 * torch.randn(*batch, dim)).requires_grad_()
    q = FlowNormal(dist.Normal(loc, log_scale.exp()).to_event(1), modules, h)
    return q, [loc, log_scale, h, *modules.parameters()]


def gradients(value, parameters, **options):
    found = torch.autograd.grad(value.sum(), parameters, allow_unused=True, **options)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@each_step
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("dim", [2, 5])
def test_a_steps_inverse_and_jacobian(kind, flip, dim):
    step, h = scrambled(STEPS[kind](dim, 2, flip)), torch.randn(2)
    x = torch.randn(dim)
    y, log_det = step(x, h)
    back, again = step.inverse(y, h)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(again, log_det)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian(lambda v: step(v, h)[0], x))[1])
    assert (y - x).abs().max() > 1e-3
    assert not torch.allclose(step(x, h + 1)[0], y)


@each_step
def test_a_step_starts_as_the_identity(kind):
    x = torch.randn(6, 4)
    y, log_det = STEPS[kind](4, 2, False)(x, torch.randn(6, 2))
    assert torch.equal(y, x)
    assert torch.equal(log_det, torch.zeros(6))


def test_a_coupling_needs_no_context():
    step, x = scrambled(Coupling(5, hidden=(4,))), torch.randn(7, 2, 5)
    y, log_det = step(x)
    assert torch.equal(y[..., :2], x[..., :2])
    assert log_det.shape == (7, 2)
    torch.testing.assert_close(step.inverse(y)[0], x)


@each_step
def test_inverses_stay_finite_where_networks_run_wild(kind):
    """Scales within e^2 either way: 30 units, large weights, float32."""
    step, h = scrambled(STEPS[kind](30, 2, True), std=3.0).float(), torch.randn(50, 2).float()
    x = torch.randn(50, 30).float()
    y, log_det = step(x, h)
    back, again = step.inverse(y, h)
    assert back.isfinite().all()
    assert again.isfinite().all()
    assert log_det.abs().max() <= 2 * 30


@each_step
def test_the_density_integrates_to_one(kind):
    q, _ = flow(kind, dim=2, batch=())
    points, cell = grid()
    # The trapezoid rule on a smooth density that has died out at the border.
    assert (q.log_prob(points).exp().sum() * cell).item() == pytest.approx(1, abs=1e-4)


@each_step
def test_draws_have_the_density(kind):
    """Moments of 20,000 draws against those of the density on a grid; 5 standard errors, false alarm 2e-6 each."""
    q, _ = flow(kind, dim=2, batch=())
    points, cell = grid()
    mass = (q.log_prob(points).exp() * cell).detach()
    z = q.sample((20_000,))
    for moment in (lambda v: v, torch.square, torch.tanh, lambda v: v.prod(-1, keepdim=True)):
        expected, draws = mass @ moment(points), moment(z)
        assert ((draws.mean(0) - expected).abs() < 5 * draws.std(0) / 20_000**0.5).all()


@each_step
@pytest.mark.parametrize("particles", [(), (4,)])
def test_the_remembered_density_is_the_inverted_one(kind, particles):
    q, _ = flow(kind)
    q = q.expand((*particles, 5))
    z = q.rsample()
    log_q = q.log_prob(z)
    assert log_q.shape == (*particles, 5)
    for other in (z.detach(), z.clone(), z.view_as(z)):
        torch.testing.assert_close(q.log_prob(other), log_q)
    q.rsample()
    torch.testing.assert_close(q.log_prob(z), log_q)  # no longer the last draw


@each_step
def test_gradients_at_a_draw_are_total_and_at_a_copy_those_at_fixed_z(kind):
    """d/dphi log q(z(phi)) = d/dphi log q at fixed z + grad_z log q . dz/dphi, exactly, on one draw."""
    q, parameters = flow(kind)
    z = q.rsample()
    fixed = z.detach().requires_grad_()
    log_q = q.log_prob(fixed)
    at_fixed = gradients(log_q, parameters, retain_graph=True)
    (slope,) = torch.autograd.grad(log_q.sum(), fixed)
    along = gradients((slope * z), parameters, retain_graph=True)
    total = gradients(q.log_prob(z), parameters)
    for whole, a, b in zip(total, at_fixed, along, strict=True):
        torch.testing.assert_close(whole, a + b, rtol=1e-7, atol=1e-8)
    assert sum(g.abs().sum() for g in at_fixed) > 1


@each_step
def test_the_score_has_mean_zero(kind):
    """The integral of q d/dphi log q at fixed z is the derivative of one."""
    q, parameters = flow(kind, dim=2, batch=())
    points, cell = grid()
    log_q = q.log_prob(points)
    for score in gradients((log_q.detach().exp() * log_q * cell), parameters):
        assert score.abs().max() < 1e-3


@each_step
@pytest.mark.parametrize("cut", ["sample", "detach_"])
def test_a_draw_that_was_cut_off_has_the_gradient_at_fixed_z(kind, cut):
    q, parameters = flow(kind)
    z = q.sample() if cut == "sample" else q.rsample().detach_()
    expected = gradients(q.log_prob(z.clone()), parameters, retain_graph=True)
    for found, right in zip(gradients(q.log_prob(z), parameters), expected, strict=True):
        torch.testing.assert_close(found, right)


def test_without_gradients_no_draw_is_inverted(monkeypatch):
    q, _ = flow("autoregressive")
    with torch.no_grad():
        z = q.sample()
        expected = q.log_prob(z.clone())  # by the inverse
        monkeypatch.setattr(Autoregressive, "inverse", None)
        torch.testing.assert_close(q.log_prob(z), expected)


@each_step
def test_frozen_parameters_change_nothing(kind):
    q, parameters = flow(kind)
    for p in parameters:
        p.requires_grad_(False)
    q = FlowNormal(dist.Normal(parameters[0], 1.0).to_event(1), q.steps, q.context)
    z = q.rsample()
    assert not z.requires_grad
    (slope,) = torch.autograd.grad(q.log_prob(z.requires_grad_()).sum(), z)
    (expected,) = torch.autograd.grad(q.log_prob(other := z.detach().clone().requires_grad_()).sum(), other)
    torch.testing.assert_close(slope, expected)


@each_step
def test_modules_keep_nothing_of_a_draw(kind):
    """Steps can be copied after a draw whose graph is alive (transforms that remember their values cannot)."""
    step = scrambled(STEPS[kind](3, 4, False))
    q = FlowNormal(dist.Normal(torch.zeros(3), 1.0).to_event(1), [step], torch.zeros(4))
    q.rsample()
    torch.testing.assert_close(copy.deepcopy(step)(torch.ones(3), torch.zeros(4)), step(torch.ones(3), torch.zeros(4)))


def test_centre_is_the_image_of_the_bases_mean():
    q, _ = flow("coupling")
    narrow = FlowNormal(dist.Normal(q.base.base_dist.loc, 1e-9).to_event(1), q.steps, q.context)
    torch.testing.assert_close(q.centre, narrow.rsample(), rtol=0, atol=1e-6)
    with pytest.raises(NotImplementedError):
        _ = q.mean


def test_values_are_validated():
    q, _ = flow("coupling")
    with pytest.raises(ValueError, match="within the support"), pyro.validation_enabled():
        FlowNormal(q.base, q.steps, q.context, validate_args=True).log_prob(torch.full((5, 3), torch.nan))


@pytest.mark.parametrize("hidden", [(), (4,), (9, 4)])
def test_a_narrow_autoregressive_network_is_refused(hidden):
    with pytest.raises(ValueError, match="of 5 or more units each, got"):
        Autoregressive(5, 2, hidden)
