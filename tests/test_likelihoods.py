"""Likelihoods against closed forms, quadrature and float64; finite gradients; support, expansion, errors."""

import math

import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from torch.autograd import grad

from pyrovae.parts import (
    BernoulliPixels,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    GaussianLikelihood,
    make_likelihood,
)

LOGITS = [0.0, 1e-8, -1e-4, 3e-3, -0.02, 0.1, 0.499, -0.5, 0.501, 1.0, -5.0, 16.0, -40.0, 100.0]
LOGISTICS = [
    (0.5, 0.1, 256), (0.0, 0.02, 256), (1.3, 0.05, 256), (0.37, 1 / (8 * 255), 256), (-0.2, 1.0, 16), (0.6, 0.2, 2),
]  # fmt: skip
OPTIONS = [
    ("bernoulli", {}), ("continuous_bernoulli", {}), ("gaussian", {"scale": 0.3}), ("gaussian", {"scale": "learned"}),
    ("gaussian", {"scale": "per_pixel"}), ("discretized_logistic", {"scale": 0.05}),
    ("discretized_logistic", {"scale": "learned"}), ("discretized_logistic", {"scale": "per_pixel", "levels": 16}),
]  # fmt: skip
PIXELS = [
    lambda dtype=torch.float32: Gaussian(torch.randn(3, 1, dtype=dtype), torch.rand(4, dtype=dtype) + 0.1),
    lambda dtype=torch.float32: ContinuousBernoulli(torch.randn(3, 4, dtype=dtype)),
    lambda dtype=torch.float32: DiscretizedLogistic(torch.rand(3, 1, dtype=dtype), torch.rand(4, dtype=dtype) + 0.01),
]
each_option = pytest.mark.parametrize(("name", "options"), OPTIONS)
each_pixel = pytest.mark.parametrize("pixel", PIXELS)


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


def unit_quadrature(n=200):
    """Nodes and weights of Gauss-Legendre on [0, 1]: exact to rounding for exp(100 x)."""
    nodes, weights = scipy.special.roots_legendre(n)
    return f64(nodes) / 2 + 0.5, f64(weights) / 2


def test_gaussian_is_scipys():
    x, loc, scale = torch.randn(3, 5).double(), torch.randn(5).double(), torch.rand(5).double() + 0.1
    expected = scipy.stats.norm(loc.numpy(), scale.numpy()).logpdf(x.numpy())
    torch.testing.assert_close(Gaussian(loc, scale).log_prob(x), torch.from_numpy(expected))
    torch.testing.assert_close(Gaussian(loc, 0.3).log_prob(x), Gaussian(loc, torch.full_like(loc, 0.3)).log_prob(x))


def test_bernoulli_is_scipys():
    logits, x = torch.randn(5).double(), (torch.rand(5) < 0.5).double()
    expected = scipy.stats.bernoulli(scipy.special.expit(logits.numpy())).logpmf(x.numpy()).sum()
    log_prob = make_likelihood("bernoulli", (5,)).distribution(logits).log_prob(x)
    torch.testing.assert_close(log_prob.item(), expected)


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 4), (127,), (131,), (1, 28, 28), (3, 32, 32)])
def test_bernoulli_is_exact_in_float32(shape):
    """Groups of every size, a prime number of pixels included; all factors at their smallest, and logits far out."""
    for logits in (torch.zeros(2, *shape), 20 * torch.randn(2, *shape), torch.full((2, *shape), 100.0)):
        x = torch.bernoulli(torch.full(shape, 0.4))
        exact = torch.distributions.Bernoulli(logits=logits.double()).log_prob(x.double()).flatten(1).sum(-1)
        found = make_likelihood("bernoulli", shape).distribution(logits).log_prob(x)
        assert (found - exact).abs().max() <= 4e-7 * (exact.abs().max() + x.numel())


def test_bernoulli_has_both_derivatives_twice_and_a_batched_form():
    logits = torch.randn(3, 130, dtype=torch.float64, requires_grad=True)
    x = torch.rand(3, 130, dtype=torch.float64, requires_grad=True)

    def log_prob(logits, x):
        return BernoulliPixels(dist.Bernoulli(logits=logits), 1, validate_args=False).log_prob(x)

    assert torch.autograd.gradcheck(log_prob, (logits, x))
    assert torch.autograd.gradgradcheck(log_prob, (logits, x))
    torch.testing.assert_close(torch.vmap(log_prob)(logits, x), log_prob(logits, x))
    rows, forward = (make(log_prob, argnums=(0, 1))(logits, x) for make in (torch.func.jacrev, torch.func.jacfwd))
    torch.testing.assert_close(forward, rows)


def test_bernoulli_of_half_precision_logits_is_float32():
    logits = torch.randn(5, 784).bfloat16()
    found = make_likelihood("bernoulli", (784,)).distribution(logits).log_prob(torch.ones(784))
    exact = make_likelihood("bernoulli", (784,)).distribution(logits.double()).log_prob(torch.ones(784).double())
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-4)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("logit", LOGITS)
def test_continuous_bernoulli_integrates_to_one_and_has_its_mean(logit):
    x, w = unit_quadrature()
    pixel = ContinuousBernoulli(f64(logit))
    density = pixel.log_prob(x).exp()
    torch.testing.assert_close((w * density).sum(), f64(1.0), rtol=1e-12, atol=0)
    torch.testing.assert_close((w * x * density).sum(), pixel.mean, rtol=1e-12, atol=0)


@pytest.mark.parametrize("logit", LOGITS)
@pytest.mark.parametrize("x", [0.0, 0.3, 1.0])
def test_continuous_bernoulli_is_exact_in_float32(logit, x):
    results = []
    for dtype in (torch.float32, torch.float64):
        logits = torch.tensor(logit, dtype=torch.float32).to(dtype).requires_grad_()
        value = torch.tensor(x, dtype=torch.float32).to(dtype)
        log_prob = ContinuousBernoulli(logits).log_prob(value)
        results.append((log_prob.double(), grad(log_prob, logits)[0].double()))
    (low, low_grad), (high, high_grad) = results
    torch.testing.assert_close(low, high, rtol=1e-6, atol=3e-7)
    torch.testing.assert_close(low_grad, high_grad, rtol=1e-6, atol=1e-6)
    mean = ContinuousBernoulli(logits.detach()).mean
    torch.testing.assert_close(high_grad, value - mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("logit", LOGITS)
def test_continuous_bernoulli_sample_path(logit):
    """The inverse distribution function: F(x(u)) = u, and dx/dl is the finite difference at the same noise."""

    def draw(logits):
        torch.manual_seed(1)
        return ContinuousBernoulli(logits).rsample((50,))

    torch.manual_seed(1)
    u = torch.rand(50, dtype=torch.float64)
    logits = f64(logit).requires_grad_()
    x = draw(logits)
    assert x.min() >= 0
    assert x.max() <= 1
    if abs(logit) > 1e-6:
        # At positive logits the draw is one minus that of 1 - u at the negative one.
        level = torch.expm1(logits * x) / torch.expm1(logits)
        torch.testing.assert_close(level, 1 - u if logit > 1e-2 else u, rtol=1e-6, atol=1e-8)
    slope = torch.stack([grad(value, logits, retain_graph=True)[0] for value in x])
    h = 1e-5
    difference = (draw(f64(logit + h)) - draw(f64(logit - h))) / (2 * h)
    if abs(abs(logit) - 1e-2) > h:
        torch.testing.assert_close(slope, difference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("loc", "scale", "levels"), LOGISTICS)
def test_discretized_logistic_is_a_distribution_on_its_grid(loc, scale, levels):
    grid = torch.arange(levels).double() / (levels - 1)
    pixel = DiscretizedLogistic(f64(loc), f64(scale), levels)
    mass = pixel.log_prob(grid).exp()
    torch.testing.assert_close(mass.sum(), f64(1.0), rtol=1e-12, atol=0)
    edges = (grid[:-1] + grid[1:]) / 2
    below = torch.cat([f64([0.0]), torch.from_numpy(scipy.stats.logistic(loc, scale).cdf(edges.numpy())), f64([1.0])])
    torch.testing.assert_close(mass, below.diff(), rtol=1e-6, atol=1e-14)
    assert abs((mass * grid).sum() - pixel.mean) < 0.15 / (levels - 1)


@pytest.mark.parametrize(("loc", "scale", "levels"), LOGISTICS)
def test_discretized_logistic_is_exact_in_float32(loc, scale, levels):
    grid = torch.arange(levels) / (levels - 1)
    parameters = [torch.tensor(loc), torch.tensor(scale)]
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [p.to(dtype).requires_grad_() for p in parameters]
        log_prob = DiscretizedLogistic(*leaves, levels).log_prob(grid.to(dtype))
        results.append([log_prob.double(), *(g.double() for g in grad(log_prob.mean(), leaves))])
    for low, high in zip(*results, strict=True):
        torch.testing.assert_close(low, high, rtol=1e-4, atol=1e-4)


def test_discretized_logistic_samples_follow_their_masses():
    """Counts of 16 levels in 20,000 draws by chi-squared, false alarm 1e-6; every draw is exactly on the grid."""
    levels, n = 16, 20_000
    pixel = DiscretizedLogistic(torch.tensor(0.8), torch.tensor(0.15), levels)
    x = pixel.sample((n,))
    grid = torch.arange(levels) / (levels - 1)
    assert torch.isin(x, grid).all()
    counts = torch.bincount((x * (levels - 1)).round().long(), minlength=levels)
    expected = n * pixel.log_prob(grid).exp()
    chi2 = ((counts - expected).square() / expected).sum().item()
    assert scipy.stats.chi2(levels - 1).sf(chi2) > 1e-6


@each_pixel
def test_sample_mean_is_the_mean(pixel):
    """20,000 draws of 12 pixels, each within 5.5 standard errors: false alarm 12 * 4e-8 = 5e-7."""
    pixel = pixel()
    x = pixel.sample((20_000,))
    error = x.std(0) / math.sqrt(len(x)) * 5.5
    grid_error = 0.15 / 255 if isinstance(pixel, DiscretizedLogistic) else 0.0
    assert ((x.mean(0) - pixel.mean).abs() < error + grid_error).all()


@each_option
@pytest.mark.parametrize("extreme", [-100.0, 0.0, 100.0])
@pytest.mark.parametrize("x", [0.0, 1.0])
def test_finite_at_extreme_values(name, options, extreme, x):
    likelihood = make_likelihood(name, (2, 3, 3), **options)
    params = torch.full((4, 2 * likelihood.outputs, 3, 3), extreme, requires_grad=True)
    pixels = likelihood.distribution(params)
    log_prob = pixels.log_prob(torch.full((4, 2, 3, 3), x))
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert pixels.mean.isfinite().all()
    assert pixels.sample().isfinite().all()
    assert all(p.grad.isfinite().all() for p in [params, *likelihood.parameters()])


@each_option
@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 4, 4)])
def test_distribution_shapes(name, options, shape):
    likelihood = make_likelihood(name, shape, **options)
    params = torch.randn(5, 2, likelihood.outputs * shape[0], *shape[1:])
    pixels = likelihood.distribution(params)
    assert pixels.batch_shape == (5, 2)
    assert pixels.event_shape == shape
    assert pixels.mean.shape == pixels.sample().shape == (5, 2, *shape)
    assert pixels.log_prob(torch.ones(2, *shape)).shape == (5, 2)
    assert pixels.expand((7, 5, 2)).log_prob(torch.ones(2, *shape)).shape == (7, 5, 2)


@each_pixel
def test_expand_keeps_values_gradients_and_validation(pixel):
    pixel = pixel()
    wide = pixel.expand((2, 3, 4))
    x = pixel.sample()
    assert type(wide) is type(pixel)
    assert wide.batch_shape == wide.mean.shape == wide.sample().shape == (2, 3, 4)
    assert torch.equal(wide.log_prob(x), pixel.log_prob(x).expand(2, 3, 4))
    assert wide._validate_args == pixel._validate_args
    assert pixel.to_event(2).expand((5,)).log_prob(x).shape == (5,)


@each_pixel
def test_float64_stays_float64(pixel):
    pixel = pixel(torch.float64)
    x = pixel.sample()
    assert x.dtype == pixel.log_prob(x).dtype == pixel.mean.dtype == torch.float64


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize(
    "make",
    [
        lambda check: ContinuousBernoulli(torch.zeros(3), validate_args=check),
        lambda check: DiscretizedLogistic(torch.zeros(3), torch.tensor(0.1), validate_args=check),
    ],
)
def test_values_outside_the_support_are_refused(make, value):
    x = torch.tensor([0.0, value, 1.0])
    with pytest.raises(ValueError, match="support"):
        make(True).log_prob(x)
    assert make(False).log_prob(x).shape == (3,)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ContinuousBernoulli(torch.tensor(math.nan), validate_args=True),
        lambda: DiscretizedLogistic(torch.zeros(3), -1.0, validate_args=True),
        lambda: Gaussian(torch.zeros(3), 0.0, validate_args=True),
    ],
)
def test_parameters_outside_their_range_are_refused(make):
    with pytest.raises(ValueError, match="constraint"):
        make()


@each_option
def test_initial_bias_is_the_datas_mean(name, options):
    likelihood = make_likelihood(name, (2, 3, 3), **options)
    mean = torch.rand(2, 3, 3) * 0.8 + 0.1
    bias = likelihood.initial_bias(mean)
    assert bias.shape == (2 * likelihood.outputs, 3, 3)
    if "bernoulli" in name:
        assert torch.equal(bias, torch.logit(mean))
    else:
        assert torch.equal(bias[:2], mean)
        assert (bias[2:] == 0).all()
    if name in ("bernoulli", "gaussian"):
        torch.testing.assert_close(likelihood.distribution(bias).mean, mean)


def test_initial_bias_of_a_bernoulli_is_clipped():
    bias = make_likelihood("bernoulli", (3,)).initial_bias(torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(bias, torch.tensor([-math.log(999), 0.0, math.log(999)]), rtol=1e-4, atol=1e-6)


def test_scales_start_where_they_say_and_stay_positive():
    shape = (3, 4, 4)
    gaussian = make_likelihood("gaussian", shape)
    logistic = make_likelihood("discretized_logistic", shape)
    assert gaussian.raw_scale.shape == ()
    assert logistic.raw_scale.shape == (3, 1, 1)
    assert make_likelihood("discretized_logistic", (16,)).raw_scale.shape == ()
    step = 1 / (8 * 255)
    for likelihood, start, floor in [(gaussian, 1.0, 1e-3), (logistic, 0.1 + step, step)]:
        scale = likelihood.distribution(torch.zeros(shape)).base_dist.scale
        torch.testing.assert_close(scale, torch.full_like(scale, start))
        torch.nn.init.constant_(likelihood.raw_scale, -1e3)
        scale = likelihood.distribution(torch.zeros(shape)).base_dist.scale
        torch.testing.assert_close(scale, torch.full_like(scale, floor))


def test_per_pixel_scale_is_the_second_output():
    likelihood = GaussianLikelihood((3, 2, 2), scale="per_pixel")
    params = torch.cat([torch.full((3, 2, 2), 0.7), torch.arange(12.0).reshape(3, 2, 2)])
    pixels = likelihood.distribution(params).base_dist
    assert (pixels.loc == 0.7).all()
    assert list(likelihood.parameters()) == []
    torch.testing.assert_close(pixels.scale[0, 0, 0], torch.tensor(1.0))
    assert (pixels.scale.flatten().diff() > 0).all()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("bernoulli", 0.1), ValueError, "has no scale, got scale=0.1: leave it out, or use 'gaussian'"),
        (("gaussian", "learned", 256), ValueError, "has no levels, got levels=256.*'discretized_logistic'"),
        (("gaussian", 0.0), ValueError, "scale must be positive and finite, got 0.0"),
        (("gaussian", True), TypeError, "scale must be a number"),
    ],
)
def test_errors_name_the_rule_the_value_and_the_fix(arguments, error, match):
    name, *options = arguments
    with pytest.raises(error, match=match):
        make_likelihood(name, (1, 8, 8), *options)


@each_option
def test_repr_shows_the_options(name, options):
    text = repr(make_likelihood(name, (2, 3, 3), **options))
    assert "event_shape=(2, 3, 3)" in text
    for option, value in options.items():
        assert f"{option}={value!r}" in text
