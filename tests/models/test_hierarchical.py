"""The hierarchical VAE: the paper's network, the ladder, exact posteriors, gradients by hand, layers by verb."""

import math
from itertools import pairwise

import pyro
import pytest
import torch
from pyro import poutine

import pyrovae as pv
from pyrovae.models import HierarchicalVAE
from pyrovae.models.hierarchical import GUIDES, product

each_guide = pytest.mark.parametrize("guide", GUIDES)


def small(shape=(1, 8, 8), **variant):
    return HierarchicalVAE(shape, **{"latent_dims": (5, 3), "hidden": ((16,), (8,)), **variant})


def traces(vae, x, num_particles=1):
    """Traces of the guide and of the model replayed on it."""
    plate = pyro.plate("k", num_particles, dim=-2)
    with plate:
        q = poutine.trace(vae.guide).get_trace(x)
    with poutine.replay(trace=q), plate:
        return q, poutine.trace(vae.model).get_trace(x)


# --- architecture ----------------------------------------------------------------------------------------------------


def dense(*widths):
    return sum(a * b + b for a, b in pairwise(widths))


@each_guide
def test_defaults_are_the_papers_two_layer_network(guide):
    vae = HierarchicalVAE((784,), guide=guide)
    up = dense(784, 200, 200, 200) + dense(100, 100, 100, 100)
    down = dense(50, 100, 100, 200) + dense(100, 200, 200, 784)
    # The ladder's second layer reads the 200 features of the first one's network, not the 100 units of z1.
    ladder = 100 * 100 if guide == "top_down" else 0
    assert sum(p.numel() for p in vae.parameters()) == up + ladder + down
    shapes = [tuple(p.shape) for p in vae.generative[0].parameters() if p.ndim == 2]
    assert shapes == [(100, 50), (100, 100), (200, 100)]
    mean, log_sigma = vae.generative[0].output.weight.split(100)
    for head in (mean, log_sigma):  # 10,000 uniforms all below 0.99 of their bound: probability 2e-44
        assert 0.99 * (6 / 200) ** 0.5 < head.abs().max() <= (6 / 200) ** 0.5
    assert all((p == 0).all() for p in vae.parameters() if p.ndim == 1)


def test_top_down_multiplies_what_the_encoder_and_the_model_say():
    vae, x = small(guide="top_down").double(), torch.rand(4, 1, 8, 8).double().round()
    q, p = traces(vae, x)
    assert list(q.stochastic_nodes) == ["data", "z2", "z1"]
    first, second = vae.read(x)
    assert q.nodes["z2"]["fn"].base_dist.loc[0].equal(second.base_dist.loc)
    assert second.base_dist.loc.equal(vae.inference[1](vae.inference[0].features(x)).chunk(2, -1)[0])
    prior = p.nodes["z1"]["fn"]
    z = torch.randn(50, 4, 5).double()
    unnormalised = first.log_prob(z) + prior.log_prob(z)
    constant = q.nodes["z1"]["fn"].log_prob(z) - unnormalised
    torch.testing.assert_close(constant, constant[:1].expand(50, 4))


def test_a_product_of_extreme_scales_is_finite():
    scales = torch.tensor([1e-15, 1e-3, 1.0, 1e3, 1e15])
    a, b = torch.cartesian_prod(scales, scales).T
    normals = [torch.distributions.Independent(torch.distributions.Normal(m, s), 0) for m, s in ((1.0, a), (3.0, b))]
    both = product(*normals)
    precision = a.double() ** -2 + b.double() ** -2
    torch.testing.assert_close(both.stddev.double(), precision.rsqrt(), rtol=1e-5, atol=0)
    expected = (a.double() ** -2 + 3 * b.double() ** -2) / precision
    torch.testing.assert_close(both.mean.double(), expected, rtol=1e-5, atol=0)


# --- programs --------------------------------------------------------------------------------------------------------


# --- exactness -------------------------------------------------------------------------------------------------------

SCALE, NOISE = 0.6, 0.8  # of z1 given z2, and of x given z1


def chain(guide):
    """A linear Gaussian chain of two layers whose guide is its exact posterior, and the exact log p(x).

    Three units of z1 lie on orthogonal axes of x with gains g, and hang on those of z2 with slopes s: given x they are
    independent, so that diagonal normals are exact.
    """
    vae = HierarchicalVAE((4,), (3, 3), ((), ()), "gaussian", NOISE, guide=guide).double()
    axes = torch.linalg.qr(torch.randn(4, 4).double())[0][:, :3]
    g, s = torch.tensor([0.7, 1.5, 2.0]).double(), torch.tensor([1.2, -0.4, 2.0]).double()
    offset, shift = torch.randn(4).double(), torch.randn(3).double()
    loading = axes * g
    y = (axes / g).T  # y @ (x - offset) is z1 plus noise of standard deviation NOISE / g
    prior = s.square() + SCALE**2  # variance of z1
    with torch.no_grad():
        write(vae.decoder.output, loading, offset)
        write(vae.generative[0].output, s.diag(), shift, math.log(SCALE))
        if guide == "bottom_up":
            variance = 1 / (1 / prior + (g / NOISE).square())
            gain = variance * (g / NOISE).square()
            write(vae.inference[0].output, gain[:, None] * y, shift - gain * (y @ offset + shift), variance.log() / 2)
            above = SCALE**2 / prior  # variance of z2 given z1
            slope = s / prior
            write(vae.inference[1].output, slope.diag(), -slope * shift, above.log() / 2)
        else:
            write(vae.inference[0].output, y, -y @ offset, (NOISE / g).log())
            noise = SCALE**2 + (NOISE / g).square()  # of y given z2
            slope = s / (s.square() + noise)
            write(vae.inference[1].output, slope[:, None] * y, -slope * (y @ offset + shift), (1 - slope * s).log() / 2)
    covariance = (loading * prior) @ loading.T + NOISE**2 * torch.eye(4).double()
    return vae, torch.distributions.MultivariateNormal(offset + loading @ shift, covariance)


def write(output, weight, bias, log_sigma=None):
    """Set a linear layer to a mean, and to constant logarithms of sigma where it has a second head."""
    rows = len(weight)
    output.weight.zero_()
    output.weight[:rows], output.bias[:rows] = weight, bias
    if log_sigma is not None:
        output.bias[rows:] = log_sigma


@each_guide
def test_with_the_exact_posterior_every_weight_is_log_p(guide):
    vae, marginal = chain(guide)
    x = 3 * torch.randn(6, 4).double()
    log_w = pv.log_weights(vae.model, vae.guide, x, num_particles=20)
    torch.testing.assert_close(log_w, marginal.log_prob(x).expand(20, 6), rtol=1e-9, atol=1e-9)


@each_guide
def test_the_verbs_of_a_linear_chain(guide):
    """At the exact posterior the mean of z1 is the known regression, and so is what it decodes to."""
    vae, marginal = chain(guide)
    x = 3 * torch.randn(6, 4).double()
    gap = x - marginal.mean
    precision = torch.linalg.inv(marginal.covariance_matrix)
    posterior_mean = marginal.mean + gap @ precision @ (marginal.covariance_matrix - NOISE**2 * torch.eye(4).double())
    torch.testing.assert_close(vae.reconstruct(x), posterior_mean)
    z2 = vae.encode(x, layer=2)
    shift, slope = vae.generative[0].output.bias[:3], vae.generative[0].output.weight[:3].diagonal()
    z1 = z2 * slope + shift
    torch.testing.assert_close(vae.decode(z2, layer=2), vae.decode(z1))
    torch.testing.assert_close(vae.decode(z1), z1 @ vae.decoder.output.weight.T + vae.decoder.output_bias)


# --- richer parts ----------------------------------------------------------------------------------------------------


@each_guide
def test_a_rich_prior_has_its_exact_marginal(guide):
    """The linear chain with a mixture of normals on top: p(x) is one as well. 5 standard errors of each datum."""
    plain, _ = chain(guide)
    vae = HierarchicalVAE(**plain.config | {"prior": "mixture", "components": 3}).double()
    vae.load_state_dict(plain.state_dict(), strict=False)
    top, down, out = vae.prior_family, vae.generative[0].output, vae.decoder.output
    with torch.no_grad():
        top.logits.copy_(torch.tensor([0.0, 1.0, -1.0]))
        top.loc.mul_(0.5)
        top.log_scale.copy_(0.2 * torch.randn(3, 3) - 0.2)
    slope, loading = down.weight[:3], out.weight
    loc = (top.loc @ slope.T + down.bias[:3]) @ loading.T + out.bias
    eye = torch.eye(3).double()
    middle = slope @ (2 * top.log_scale).exp().diag_embed() @ slope.T + SCALE**2 * eye
    normals = torch.distributions.MultivariateNormal(
        loc, loading @ middle @ loading.T + NOISE**2 * torch.eye(4).double()
    )
    x = normals.sample((10,)).flatten(0, 1)
    exact = (normals.log_prob(x[:, None]) + top.logits.log_softmax(-1)).logsumexp(-1)
    found = pv.log_likelihood(vae.model, vae.guide, x, num_samples=2000, seed=0, progress=None)
    assert found.std_error.max() > 0
    assert found.std_error.median() < 0.05
    assert ((found.log_prob - exact).abs() < 5 * found.std_error + 1e-3).double().mean() > 0.95


@each_guide
def test_pseudo_inputs_start_from_what_the_top_posterior_reads(guide, digits):
    vae = small(prior="vamp", components=3, guide=guide).initialise(digits)
    chosen = digits[[0, 898, 1796]]
    expected = vae.encode(chosen, layer=1) if guide == "bottom_up" else chosen.clamp(0.01, 0.99)
    torch.testing.assert_close(vae.prior_family.pseudo_inputs, expected)
    prior = vae.prior(digits)
    top = vae.posterior(2, expected) if guide == "bottom_up" else vae.read(expected)[1]
    torch.testing.assert_close(prior.loc, top.base_dist.loc)
    torch.testing.assert_close(prior.scale, top.base_dist.scale)


# --- gradients of the ladder, whose guide has the generative parameters as well ---------------------------------------


def by_hand(vae, x, noise, gradient):
    """Gradients of the K-sample ELBO or IWAE of a two-layer ladder, written out without Pyro."""
    params = list(vae.parameters())
    z, q = {}, {}
    said = vae.read(x)
    q[2] = said[1].base_dist
    z[2] = q[2].loc + q[2].scale * noise[2]
    q[1] = product(said[0], vae.layer_prior(1, z[2])).base_dist
    z[1] = q[1].loc + q[1].scale * noise[1]

    def log_q(fixed):
        """log q; with the samples fixed as well, what z1's distribution makes of the fixed z2."""
        at = {layer: value.detach() for layer, value in z.items()} if fixed else z
        under = product(said[0], vae.layer_prior(1, at[2])) if fixed else None
        lower = under.base_dist if fixed else q[1]
        return q[2].log_prob(at[2]).sum(-1) + lower.log_prob(at[1]).sum(-1)

    def log_p(at):
        normal = torch.distributions.Normal
        top = normal(0.0, 1.0).log_prob(at[2]).sum(-1)
        return top + vae.layer_prior(1, at[2]).log_prob(at[1]) + vae.likelihood(at[1]).log_prob(x)

    log_w = log_p(z) - log_q(fixed=False)
    weights = log_w.detach().softmax(0)
    if gradient == "elbo, stl":  # the path derivative: all of log w but the score of q
        surrogate = (log_w + log_q(fixed=True)).mean(0).sum()
        return torch.autograd.grad(-surrogate, params)
    if gradient == "iwae":
        return torch.autograd.grad(-(log_w.logsumexp(0) - math.log(len(log_w))).sum(), params)
    # dreg: w of the model at fixed samples, and along the samples w^2, the guide's distributions held.
    fixed = {layer: value.detach() for layer, value in z.items()}
    model = torch.autograd.grad(-(weights * log_p(fixed)).sum(), params, allow_unused=True, retain_graph=True)
    leaves = {layer: value.detach().requires_grad_() for layer, value in z.items()}
    frozen = [torch.distributions.Normal(d.base_dist.loc.detach(), d.base_dist.scale.detach()) for d in said]
    prior = vae.layer_prior(1, leaves[2])
    lower = product(torch.distributions.Independent(frozen[0], 1), prior).base_dist
    log_w = log_p(leaves) - frozen[1].log_prob(leaves[2]).sum(-1) - lower.log_prob(leaves[1]).sum(-1)
    along = torch.autograd.grad((weights.square() * log_w).sum(), list(leaves.values()))
    path = torch.autograd.grad(
        -sum((g * z[layer]).sum() for g, layer in zip(along, leaves, strict=True)), params, allow_unused=True
    )
    zeros = [torch.zeros_like(p) for p in params]
    parts = [[z0 if g is None else g for g, z0 in zip(part, zeros, strict=True)] for part in (model, path)]
    return [a + b for a, b in zip(*parts, strict=True)]


@pytest.mark.parametrize(
    ("objective", "name"),
    [(pv.ELBO(3, gradient="stl"), "elbo, stl"), (pv.IWAE(3), "iwae"), (pv.IWAE(3, gradient="dreg"), "dreg")],
    ids=repr,
)
def test_gradients_of_a_shared_generative_path(objective, name):
    """Theta moves the ladder's guide too: each row treats it there as a parameter of q."""
    vae, x = small((6,), guide="top_down").double(), torch.rand(4, 6).double().round()
    pyro.set_rng_seed(3)
    drawn, _ = traces(vae, x, 3)
    noise = {}
    for layer in (1, 2):
        site = drawn.nodes[f"z{layer}"]
        normal = site["fn"].base_dist
        noise[layer] = ((site["value"] - normal.loc) / normal.scale).detach()
    expected = by_hand(vae, x, noise, name)
    pyro.set_rng_seed(3)
    objective.loss_and_grads(vae.model, vae.guide, x)
    for (label, parameter), gradient in zip(vae.named_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, msg=lambda m, label=label: f"{label}: {m}")


# --- use -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "match"), [(0, "at least 1, got 0"), (3, "at most 2, got 3"), (1.5, "got 1.5")])
@pytest.mark.parametrize("verb", ["encode", "decode"])
def test_a_layer_that_is_not_there(verb, layer, match):
    with pytest.raises(ValueError, match=f"layer must be .*{match}"):
        getattr(small(), verb)(torch.rand(4, 1, 8, 8), layer=layer)


def test_means_of_the_parents_lead_to_a_layers_mean():
    """With samples whose noise is zero, the guide and the model go through what encode and decode give."""
    x = torch.rand(4, 1, 8, 8)
    for guide in GUIDES:
        vae = small(guide=guide)
        with poutine.trace() as tr, poutine.condition(data={f"z{i}": vae.encode(x, layer=i) for i in (1, 2)}):
            vae.guide(x)
        for i in (1, 2):
            assert torch.equal(tr.trace.nodes[f"z{i}"]["fn"].mean, vae.encode(x, layer=i))
        z1 = vae.layer_prior(1, vae.encode(x, layer=2)).mean
        assert torch.equal(vae.reconstruct(x, layer=2), vae.likelihood(z1).mean)


@each_guide
@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (pv.ELBO(), {"kl_warmup": 2}),
        (pv.ELBO(free_bits=0.1), {}),
        (pv.IWAE(3, gradient="dreg"), {"precision": "bfloat16"}),
        (pv.IWAE(3, gradient="stl"), {}),
        (pv.MIWAE(2, 3), {}),
    ],
    ids=repr,
)
def test_it_trains(guide, objective, options, digits):
    vae = small(guide=guide).initialise(digits)
    data = pv.data.Images(digits[:400], binarization="dynamic")
    result = pv.fit(vae.model, vae.guide, data, objective=objective, epochs=12, lr=1e-2, batch_size=50, **options)
    measured = pv.log_likelihood(vae.model, vae.guide, data.fixed(0), num_samples=50, seed=0)
    independent = torch.distributions.Bernoulli(digits[:400].mean(0)).entropy().sum()
    assert measured.nll < independent - 0.5
    last = result.history[-1]
    assert last["kl_per_unit"].keys() == last["active_units"].keys() == {"z1", "z2"}
    assert [len(last["kl_per_unit"][z]) for z in ("z1", "z2")] == [5, 3]
    assert last["kl"] == pytest.approx(sum(map(sum, last["kl_per_unit"].values())), rel=1e-5)


def test_linear_layers_start_with_a_constant_scale():
    for guide in GUIDES:
        vae = small(latent_dims=(5, 4, 3), hidden=((), (), ()), guide=guide)
        scales = vae.layer_prior(1, 100 * torch.randn(50, 4)).base_dist.scale
        assert (scales == 1).all()
