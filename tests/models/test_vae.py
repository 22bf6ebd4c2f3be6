"""The VAE: the paper's network, posteriors as they say, the linear case in closed form, the start, errors."""

import json
import math

import pytest
import torch
from scipy.linalg import subspace_angles

import pyrovae as pv
from pyrovae.models import VAE


def small(shape=(1, 8, 8), **variant):
    return VAE(shape, 5, **{"hidden": (16,), **variant})


def test_defaults_are_the_papers_one_layer_network():
    vae = VAE((784,))
    encoder = 784 * 200 + 200 + 200 * 200 + 200 + 2 * (200 * 50 + 50)
    decoder = 50 * 200 + 200 + 200 * 200 + 200 + 200 * 784 + 784
    assert sum(p.numel() for p in vae.parameters()) == encoder + decoder
    assert [tuple(p.shape) for p in vae.decoder.parameters() if p.ndim == 2] == [(200, 50), (200, 200), (784, 200)]
    mean, log_sigma = vae.encoder.output.weight.split(50)
    bound = (6 / 250) ** 0.5
    # 10,000 uniforms all below 0.99 of their bound: probability 2e-44.
    assert 0.99 * bound < mean.abs().max() <= bound
    assert 0.99 * bound < log_sigma.abs().max() <= bound
    x = torch.rand(3, 784)
    torch.testing.assert_close(vae.posterior(x).base_dist.scale, vae.encoder(x)[:, 50:].exp())
    assert all((p == 0).all() for p in vae.parameters() if p.ndim == 1)


@pytest.mark.parametrize("posterior", ["diagonal", "full"])
def test_posterior_is_the_normal_it_says(posterior):
    vae, x = small(posterior=posterior).double(), torch.rand(4, 1, 8, 8).double()
    torch.nn.init.normal_(vae.encoder.output.bias)
    q, params = vae.posterior(x), vae.encoder(x)
    scale_tril = torch.diag_embed(params[:, 5:10].exp())
    if posterior == "full":
        rows, columns = torch.tril_indices(5, 5, -1)
        scale_tril[:, rows, columns] = params[:, 10:]
        assert (scale_tril.tril(-1) != 0).any()
    z = q.rsample()
    oracle = torch.distributions.MultivariateNormal(params[:, :5], scale_tril=scale_tril)
    torch.testing.assert_close(q.log_prob(z), oracle.log_prob(z))
    assert torch.equal(vae.encode(x), params[:, :5])


def test_full_posterior_starts_as_the_diagonal_one():
    vae, x = small(posterior="full"), torch.rand(4, 1, 8, 8)
    q = vae.posterior(x)
    assert torch.equal(q.scale_tril, q.scale_tril.diagonal(dim1=-2, dim2=-1).diag_embed())
    assert small(posterior="full").encoder.output.out_features == 5 + 5 + 10
    assert VAE((6,), 1, (), posterior="full").posterior(torch.rand(3, 6)).rsample().shape == (3, 1)


def linear_vae(scale):
    """A linear Gaussian VAE whose guide is its exact posterior, and the exact log p(x)."""
    vae = VAE((7,), 3, hidden=(), likelihood="gaussian", scale=scale, posterior="full").double()
    torch.nn.init.normal_(vae.decoder.output_bias)
    loading, offset = vae.decoder.output.weight.detach(), vae.decoder.output_bias.detach()
    eye = torch.eye(3).double()
    covariance = torch.linalg.inv(eye + loading.T @ loading / scale**2)
    root = torch.linalg.cholesky(covariance)
    below = root[tuple(vae.posterior_family.below)]
    regression = covariance @ loading.T / scale**2
    with torch.no_grad():
        vae.encoder.output.weight.copy_(torch.cat([regression, torch.zeros(6, 7).double()]))
        vae.encoder.output.bias.copy_(torch.cat([-regression @ offset, root.diagonal().log(), below]))
    marginal = loading @ loading.T + scale**2 * torch.eye(7).double()
    return vae, torch.distributions.MultivariateNormal(offset, marginal)


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_linear_vae_has_its_exact_marginal(scale):
    """At the exact posterior every importance weight is p(x) itself: no statistical error is left."""
    vae, marginal = linear_vae(scale)
    x = torch.randn(6, 7).double()
    log_w = pv.log_weights(vae.model, vae.guide, x, num_particles=20)
    torch.testing.assert_close(log_w, marginal.log_prob(x).expand(20, 6), rtol=1e-9, atol=1e-9)


def test_the_linear_vae_finds_probabilistic_pcas_maximum(digits):
    """Trained by ``fit``, its log p(x) is Tipping and Bishop's maximum, its decoder spans the first components."""
    units, x = 3, torch.nn.functional.avg_pool2d(digits[:400], 2).flatten(1).double()
    variances, axes = torch.linalg.eigh(torch.cov(x.T, correction=0))
    noise = variances[:-units].mean()
    log_det = variances[-units:].log().sum() + (16 - units) * noise.log()
    maximum = -0.5 * (16 * math.log(2 * math.pi) + log_det + 16)
    vae = VAE((16,), units, hidden=(), likelihood="gaussian").double().initialise(x)
    objective = pv.ELBO(gradient="stl")  # a diagonal posterior is exact at the maximum, where this has no variance
    pv.fit(vae.model, vae.guide, x, objective=objective, epochs=600, batch_size=len(x), lr=0.03, schedule="cosine")
    with torch.no_grad():
        offset = vae.decode(torch.zeros(units).double())
        loading = (vae.decode(torch.eye(units).double()) - offset).T
        scale = vae.likelihood(torch.zeros(units).double()).base_dist.scale
        marginal = loading @ loading.T + torch.diag(scale.square().expand(16))
        found = torch.distributions.MultivariateNormal(offset, marginal).log_prob(x).mean()
    assert maximum - 0.01 < found < maximum + 1e-9
    assert subspace_angles(loading.numpy(), axes[:, -units:].numpy()).max() < 0.02


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_initialise_sets_the_bias_and_gains_nats(network, digits):
    vae, x = small(network=network), digits.round()
    before = vae.likelihood(torch.zeros(5)).log_prob(x).mean()
    assert vae.initialise(x) is vae
    expected = torch.logit(x.mean(0).clamp(0.001, 0.999))
    torch.testing.assert_close(vae.decoder.output_bias.view(1, 8, 8), expected, rtol=1e-4, atol=1e-4)
    pixels = torch.distributions.Bernoulli(x.mean(0)).entropy().sum()
    after = vae.likelihood(torch.zeros(5)).log_prob(x).mean()
    if network == "mlp":
        torch.testing.assert_close(before, torch.tensor(-64 * math.log(2)))
        torch.testing.assert_close(after, -pixels, rtol=0, atol=0.2)
    assert after > before + 10


def test_initialise_accepts_bytes():
    data = torch.randint(0, 2, (50, 1, 8, 8), dtype=torch.uint8)
    bias = small().initialise(data).decoder.output_bias
    assert torch.equal(bias, small().initialise(data.float()).decoder.output_bias)


def test_config_holds_plain_numbers():
    numpy = pytest.importorskip("numpy")
    vae = VAE(numpy.array([1, 8, 8]), numpy.int64(3), numpy.array([4]))
    assert json.loads(json.dumps(vae.config)) == vae.config
