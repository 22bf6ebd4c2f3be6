"""The deep VAE: its start, its scales, one path for both programs, codes by layer, training, errors and round trips."""

import math

import pytest
import torch
from pyro import poutine

import pyrovae as pv
from pyrovae.data import DataError
from pyrovae.models import DeepVAE
from pyrovae.models.deep import LIMIT, StochasticLayer
from pyrovae.nn import PatchDecoder, PyramidEncoder, ResidualBlock, fold
from tests.zoo import ZOO

each_variant = pytest.mark.parametrize("variant", [v for v in ZOO if v.family == "deep"], ids=lambda v: v.name)
X = torch.randint(256, (4, 2, 8, 12), generator=torch.Generator().manual_seed(2)).double() / 255


def small(shape=(2, 8, 12), **variant):
    return DeepVAE(shape, **{"channels": (4, 6), "latent_channels": (1, 2), "blocks": (2, 1), **variant})


def stirred(**variant):
    """A model away from its start, where most of it is silent."""
    vae = small(**variant).double()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return vae


def test_layers_and_their_scales():
    vae = DeepVAE((3, 32, 48), channels=(4, 5, 6), latent_channels=(1, 2, 3), blocks=(1, 3, 2))
    assert vae.num_layers == 6
    shapes = [vae.layer_shape(layer) for layer in range(1, 7)]
    assert shapes == [(1, 16, 24), *[(2, 8, 12)] * 3, *[(3, 4, 6)] * 2]
    assert DeepVAE((1, 32, 32), (4,) * 5, (1,) * 5, (1,) * 5).layer_shape(5) == (1, 1, 1)


# --- the start -------------------------------------------------------------------------------------------------------


@each_variant
def test_it_starts_as_its_prior_and_at_its_bias(variant):
    """KL 0 in every layer, standard normal latents, and a likelihood that is the mean image's."""
    vae, (x,) = variant.make().double(), variant.batch()
    vae.initialise(x)
    q = poutine.trace(vae.guide).get_trace(x)
    p = poutine.trace(poutine.replay(vae.model, trace=q)).get_trace(x)
    for layer in range(1, vae.num_layers + 1):
        for normal in (q.nodes[f"z{layer}"]["fn"].base_dist, p.nodes[f"z{layer}"]["fn"].base_dist):
            assert (normal.loc == 0).all()
            assert (normal.scale == 1).all()
    expected = vae.observation.distribution(vae.observation.initial_bias(x.mean(0))).log_prob(x)
    torch.testing.assert_close(pv.log_weights(vae.model, vae.guide, x)[0], expected)


@each_variant
def test_every_parameter_gets_a_gradient_within_three_steps(variant):
    """What starts silent wakes: first the output, then what leads to it."""
    vae, (x,) = variant.make().double(), variant.batch()
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        pv.ELBO(2).loss_and_grads(vae.model, vae.guide, x)
        optimizer.step()
    for name, parameter in vae.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


# --- layers ----------------------------------------------------------------------------------------------------------


def test_a_stochastic_layer_by_hand():
    layer = StochasticLayer(4, 2, depth=9).double()
    torch.nn.init.normal_(layer.prior_head.weight, std=0.3)
    torch.nn.init.normal_(layer.change.weight, std=0.3)
    torch.nn.init.normal_(layer.block.narrow.weight, std=0.3)
    h, e, z = torch.randn(3, 4, 5, 6).double(), torch.randn(3, 4, 5, 6).double(), torch.randn(3, 2, 5, 6).double()
    silu = torch.nn.functional.silu
    mean, raw = layer.prior_head(silu(h)).split(2, 1)
    shift, stretch = layer.change(silu(layer.path_head(silu(h)) + layer.data_head(e))).split(2, 1)
    p, q = layer.prior(h).base_dist, layer.posterior(h, e).base_dist
    torch.testing.assert_close(p.loc, mean)
    torch.testing.assert_close(p.scale, (LIMIT * (raw / LIMIT).tanh()).exp())
    torch.testing.assert_close(q.loc, mean + shift)
    torch.testing.assert_close(q.scale / p.scale, (LIMIT * (stretch / LIMIT).tanh()).exp())
    y = h + layer.enter(z)
    torch.testing.assert_close(layer(h, z), y + layer.block.narrow(silu(layer.block.wide(silu(y)))))
    assert layer.enter.weight.abs().max() <= (6 / (2 + 4)) ** 0.5 / 3


def test_scales_cannot_run_away():
    layer = StochasticLayer(4, 2).double()
    for head in (layer.prior_head, layer.change):
        torch.nn.init.normal_(head.weight, std=1e4)
    h = torch.randn(3, 4, 5, 6).double()
    scales = layer.posterior(h, h).base_dist.scale
    assert math.exp(-2 * LIMIT) <= scales.min()
    assert scales.max() <= math.exp(2 * LIMIT)


def test_a_layer_sees_all_those_above_it():
    """Moving the highest latents moves the prior of every layer below, and the data; nothing else is moved by z1."""
    vae = stirred()
    moved = {}
    for top in (0.0, 1.0):
        priors = []

        def draw(layer, path, top=top, priors=priors):
            priors.append(vae.prior(layer, path).base_dist.loc)
            return torch.full(vae.layer_shape(layer), top if layer == vae.num_layers else 0.0).double()

        path, z = vae.descend(draw)
        moved[top] = [*priors, vae.likelihood(path, z).mean]
    same = [torch.equal(a, b) for a, b in zip(*moved.values(), strict=True)]
    assert same == [True, False, False, False]


# --- codes -----------------------------------------------------------------------------------------------------------


@each_variant
def test_a_code_down_to_a_layer_begins_the_whole_one(variant):
    vae, (x,) = variant.used(), variant.batch(4)
    vae, x = vae.double(), x.double()
    units = [math.prod(vae.layer_shape(layer)) for layer in range(1, vae.num_layers + 1)]
    for layer in range(1, vae.num_layers + 1):
        code = vae.encode(x, layer=layer)
        assert code.shape == (4, sum(units[layer - 1 :]))
        assert torch.equal(code, vae.encode(x)[:, : code.shape[1]])


def test_a_code_is_the_way_that_the_programs_go():
    """The guide at the code's values has them for its means; the model decodes them to the mean of x."""
    vae = stirred()
    shapes = {layer: vae.layer_shape(layer) for layer in range(3, 0, -1)}
    parts = vae.encode(X).split([math.prod(shape) for shape in shapes.values()], -1)
    values = {f"z{layer}": part.view(4, *shapes[layer]) for layer, part in zip(shapes, parts, strict=True)}
    q = poutine.trace(poutine.condition(vae.guide, values)).get_trace(X)
    p = poutine.trace(poutine.condition(vae.model, values)).get_trace(X)
    for name, value in values.items():
        torch.testing.assert_close(q.nodes[name]["fn"].mean, value)
    torch.testing.assert_close(vae.reconstruct(X), p.nodes["x"]["fn"].mean)
    below = poutine.trace(poutine.condition(vae.model, {"z3": values["z3"]}))
    means = {"z3": values["z3"]}
    for name in ("z2", "z1"):
        means[name] = poutine.trace(poutine.condition(vae.model, means)).get_trace(X).nodes[name]["fn"].mean
    below = poutine.trace(poutine.condition(vae.model, means)).get_trace(X)
    torch.testing.assert_close(vae.reconstruct(X, layer=3), below.nodes["x"]["fn"].mean)


def test_a_code_of_another_layer_is_refused():
    vae = small()
    with pytest.raises(DataError, match=r"a code down to layer 2 has 36 units, got \(4, 60\): pass what encode gives"):
        vae.decode(torch.zeros(4, 60), layer=2)
    for verb in (vae.encode, vae.decode):
        with pytest.raises(ValueError, match="layer must be at most 3, got 4"):
            verb(X.float(), layer=4)


# --- use -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (pv.ELBO(), {"kl_warmup": 2, "clip_norm": 100.0}),
        (pv.ELBO(free_bits=0.01), {}),
        (pv.IWAE(3, gradient="dreg"), {"precision": "bfloat16"}),
    ],
    ids=repr,
)
def test_it_trains(objective, options, digits):
    """From 146 nats, those of the mean image, to about 105, with latents in use."""
    vae, x = DeepVAE((1, 8, 8), (8, 8), (2, 4), (1, 2), levels=17).initialise(digits), digits[:300]
    result = pv.fit(vae.model, vae.guide, x, objective=objective, epochs=6, lr=1e-2, batch_size=50, **options)
    assert pv.log_likelihood(vae.model, vae.guide, x, num_samples=20, seed=0).nll < 120
    last = result.history[-1]
    assert last["kl"] > 2
    sites = {"z1": 2 * 4 * 4, "z2": 4 * 2 * 2, "z3": 4 * 2 * 2}
    assert {name: len(kl) for name, kl in last["kl_per_unit"].items()} == sites
    units = pv.active_units(vae.guide, x, samples=2)
    assert {name: u.variances.shape for name, u in units.items()} == {z: vae.layer_shape(int(z[1])) for z in sites}


def test_a_code_of_data_of_another_shape_is_refused():
    with pytest.raises(DataError, match=r"input_shape=\(2, 8, 12\), got \(4, 2, 8, 8\)"):
        small().encode(torch.zeros(4, 2, 8, 8))


# --- its network parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
def test_pyramids_and_patches_take_any_leading_dimensions(leading):
    x = torch.rand(*leading, 3, 8, 16)
    grids = PyramidEncoder((3, 8, 16), (4, 5, 6), (1, 1, 2))(x)
    assert [y.shape for y in grids] == [(*leading, 4, 4, 8), (*leading, 5, 2, 4), (*leading, 6, 1, 2)]
    assert PatchDecoder(4, (3, 8, 16), heads=2)(grids[0]).shape == (*leading, 6, 8, 16)


def test_a_patch_decoder_writes_each_head_as_an_image():
    """Channel c of head j is channel 3 j + c, each made of its own patch of channels."""
    decoder = PatchDecoder(4, (3, 8, 16), patch=2, heads=2)
    with torch.no_grad():
        decoder.layers[-1].weight[4 * 4 : 5 * 4].normal_()
    image = decoder(torch.randn(5, 4, 4, 8))
    assert [bool((image[:, c] != 0).any()) for c in range(6)] == [False, False, False, False, True, False]


def test_a_silent_block_is_the_identity():
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(ResidualBlock(8, "silu", silent=True)(x), x)
    assert not torch.equal(ResidualBlock(8)(x), x)
    assert torch.equal(fold(ResidualBlock(8, silent=True), x.expand(3, 2, 8, 5, 5), 3), x.expand(3, 2, 8, 5, 5))
