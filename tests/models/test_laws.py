"""What is true of every model of the zoo, over its list of variants; what one family alone does stands in its own file.

Double precision, one seed. Pairs are away from their start, except where that is what a law is about.
"""

import copy
import json
import pickle
import re

import pyro
import pytest
import torch
from pyro import poutine

import pyrovae as pv
from pyrovae import runs
from pyrovae.data import DataError
from pyrovae.models import MODELS
from tests.zoo import ZOO, Variant

pytestmark = pytest.mark.double(31)


def each(which=lambda variant: True):
    return pytest.mark.parametrize("variant", list(filter(which, ZOO)), ids=lambda variant: variant.name)


def weights(pair, batch, num_particles=3, **options):
    """Log-weights on one seed, in the mode that evaluations use."""
    pyro.set_rng_seed(2)
    return pv.log_weights(pair.eval().model, pair.guide, *batch, num_particles=num_particles, **options)


def scored(program, batch, **values):
    """A trace of one program, with the log-densities of its sites; at given values of latents."""
    trace = poutine.trace(poutine.condition(program, values)).get_trace(*batch)
    trace.compute_log_prob()
    return trace


def total(guide, model):
    """log w from what the sites of both traces say."""
    sites = [(1, model.nodes[name]) for name in model.nodes] + [(-1, guide.nodes[name]) for name in guide.nodes]
    return sum(sign * site["log_prob"] for sign, site in sites if "log_prob" in site and site["name"] not in PLATES)


PLATES = ("k", "data")


# --- the programs ----------------------------------------------------------------------------------------------------


def test_every_model_of_the_package_is_in_the_zoo():
    assert {variant.family for variant in ZOO} == MODELS.keys()


@each()
def test_k_particles_are_k_runs(variant: Variant):
    """Sites of [K, B], data as they are; each particle weighs what its latents weigh alone; folding changes nothing."""
    pair, batch = variant.used().eval(), variant.batch()
    pyro.set_rng_seed(2)
    with pyro.plate("k", 3, dim=-2):
        q = scored(pair.guide, batch)
    with poutine.replay(trace=q), pyro.plate("k", 3, dim=-2):
        p = scored(pair.model, batch)
    draws = {name: site["value"] for name, site in q.nodes.items() if name in q.stochastic_nodes and name not in PLATES}
    latents = {name for name in p.stochastic_nodes if name not in PLATES}
    assert draws.keys() == latents
    for name in latents:
        assert q.nodes[name]["fn"].batch_shape == p.nodes[name]["fn"].batch_shape == (3, 7)
        assert draws[name].shape == (3, 7, *p.nodes[name]["fn"].event_shape)
    x = p.nodes["x"]
    assert x["value"] is batch[0]
    assert x["fn"].batch_shape == (3, 7)
    assert x["fn"].event_shape == pair.input_shape
    assert "data" in [frame.name for frame in x["cond_indep_stack"] if frame.dim == -1]
    log_w = total(q, p).expand(3, 7)
    assert log_w.dtype == torch.float64
    assert log_w.isfinite().all()
    for k in range(3):
        alone = {name: value[k] for name, value in draws.items()}
        torch.testing.assert_close(
            total(scored(pair.guide, batch, **alone), scored(pair.model, batch, **alone)), log_w[k]
        )
    torch.testing.assert_close(weights(pair, batch), log_w)
    along = tuple(range(len(batch)))  # of attributes, [B, A], True could not know
    torch.testing.assert_close(weights(pair, batch, fold_particles=along), log_w)
    assert not pyro.get_param_store().keys()


@each(lambda variant: variant.family in ("vae", "conditional"))
def test_programs_are_made_of_their_parts(variant: Variant):
    """Labels given are observed as they are, and cost nothing."""
    pair, (x, *labels) = variant.used(), variant.batch()
    q = scored(pair.guide, (x, *labels))
    z, code = q.nodes["z"]["value"], [pair.labels.encode(y, x) for y in labels]
    p = scored(pair.model, (x, *labels), z=z)
    torch.testing.assert_close(q.nodes["z"]["log_prob"], pair.posterior(x, *code).log_prob(z))
    torch.testing.assert_close(p.nodes["z"]["log_prob"], pair.prior(*code or [x]).log_prob(z))
    torch.testing.assert_close(p.nodes["x"]["log_prob"], pair.likelihood(z, *code).log_prob(x))
    for y in labels:
        assert p.nodes["y"]["value"] is y
        assert not p.nodes["y"]["log_prob"].any()


@each()
def test_weights_are_of_the_data_s_dtype(variant: Variant):
    pair, (x, *labels) = variant.used(), variant.batch()
    labels = [y.float() if y.is_floating_point() else y for y in labels]
    torch.set_default_dtype(torch.float32)
    exact, rounded = weights(pair, (x, *variant.batch()[1:])), weights(pair.float(), (x.float(), *labels))
    assert (exact.dtype, rounded.dtype) == (torch.float64, torch.float32)


LEARNING = [(variant, pv.ELBO(2)) for variant in ZOO if variant.family != "pca"]  # which has no parameters
LEARNING += [(variant, pv.IWAE(2, gradient="dreg")) for variant, _ in LEARNING if not variant.codes]


@pytest.mark.parametrize(("variant", "objective"), LEARNING, ids=lambda value: getattr(value, "name", repr(value)))
def test_every_parameter_learns(variant: Variant, objective):
    pair = variant.used()
    objective.differentiable_loss(pair.model, pair.guide, *variant.batch(20)).backward()
    for name, parameter in pair.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


# --- use -------------------------------------------------------------------------------------------------------------


@each(lambda variant: variant.family != "pca")
def test_a_start_from_the_data_explains_them_better(variant: Variant):
    """It depends on data and weights alone, and leaves the generator as it was."""
    pair, batch = variant.make(), variant.batch(55)
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.mul_(0.1)  # so that latents matter little
    before, twin = weights(pair, batch).mean(), copy.deepcopy(pair)
    state = torch.get_rng_state()
    assert pair.initialise(batch[0]) is pair
    assert torch.equal(torch.get_rng_state(), state)
    pyro.set_rng_seed(99)
    torch.testing.assert_close(twin.initialise(batch[0]).state_dict(), pair.state_dict(), rtol=0, atol=0)
    assert weights(pair, batch).mean() > before


def known(pair, x, labels):
    """Labels without a gap."""
    return [pair.completed(x, *labels)] if isinstance(pair, MODELS["semi_supervised"]) else labels


def layers(pair):
    return [{"layer": i + 1} for i in range(getattr(pair, "num_layers", 0))] or [{}]


@each(lambda variant: variant.family not in ("code_prior", "vqvae"))
def test_verbs(variant: Variant):
    pair, (x, *labels) = variant.used(), variant.batch(3)
    labels = known(pair, x, labels)
    assert pair.training
    for where in layers(pair):
        code, again = pair.encode(x, *labels, **where), pair.reconstruct(x, *labels, **where)
        assert again.shape == x.shape
        torch.testing.assert_close(again, pair.decode(code, *labels, **where))
        between = pair.interpolate(x, x.flip(0), *labels, steps=3, **where)
        middle = pair.decode((code + pair.encode(x.flip(0), *labels, **where)) / 2, *labels, **where)
        torch.testing.assert_close(between[:, 1], middle)
        torch.testing.assert_close(between[:, 0], again)
        if variant.family != "rbm":  # its units are 0 or 1
            moved = pair.traverse(x[:1], *(y[:1] for y in labels), units=[0, 1], span=2.0, steps=5, **where)
            by_hand = code[:1].index_fill(1, torch.tensor([1]), 1.0)
            assert moved.shape == (2, 5, *pair.input_shape)
            torch.testing.assert_close(moved[1, 3:4], pair.decode(by_hand, *(y[:1] for y in labels), **where))
    assert pair.training


@each(lambda variant: variant.family != "deep" and variant.family != "code_prior")
def test_codes_of_any_leading_dimensions(variant: Variant):
    pair, (x, *labels) = variant.used().eval(), variant.batch(3)
    labels = known(pair, x, labels)
    code = pair.encode(x, *labels)
    wide = pair.encode(x.expand(2, *x.shape), *labels)
    torch.testing.assert_close(wide, code.expand(2, *code.shape))
    torch.testing.assert_close(pair.decode(wide, *labels)[1], pair.decode(code, *labels))
    torch.testing.assert_close(pair.reconstruct(x, *labels), pair.decode(code, *labels))


@each()
def test_samples_are_data_of_the_seed(variant: Variant):
    pair, (x, *labels) = variant.used(), variant.batch()
    labels = labels if pair.conditional else []
    modes, state = [module.training for module in pair.modules()], torch.get_rng_state()
    drawn = pv.sample(pair, 7, *labels, returns="draws", seed=0)
    assert drawn.shape == x.shape
    assert torch.equal(drawn, pv.sample(pair, 7, *labels, returns="draws", seed=0))
    assert not torch.equal(drawn, pv.sample(pair, 7, *labels, returns="draws", seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in pair.modules()] == modes
    support = poutine.trace(pair.eval().model).get_trace(*variant.batch()).nodes["x"]["fn"].support
    assert support.check(drawn).all()


# --- round trips -----------------------------------------------------------------------------------------------------


@each()
def test_config_and_state_build_the_same_again(variant: Variant, tmp_path):
    """By hand, by copying, and from a run's directory: equal weights and equal samples, bit by bit."""
    pair, batch = variant.used(), variant.batch()
    config = json.loads(json.dumps(pair.config))
    assert config == pair.config
    twin = type(pair)(**config)
    twin.load_state_dict(pair.state_dict())
    run = runs.Run(tmp_path / "run")
    run.start({"model": runs.describe(pair)})
    run.save("last", pair.state_dict())
    expected, labels = weights(pair, batch), batch[1:] if pair.conditional else ()
    for other in (twin, pv.load(run.path), copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert type(other) is type(pair)
        assert other.config == config
        assert torch.equal(weights(other, batch), expected)
        drawn, again = (pv.sample(p, 7, *labels, returns="draws", seed=0) for p in (pair, other))
        assert torch.equal(drawn, again)


@each()
def test_repr_shows_the_arguments(variant: Variant):
    pair = variant.make()
    text = repr(pair)
    assert text.startswith(f"{type(pair).__name__}(")
    for name in variant.options:
        assert f"{name}={pair.config[name]!r}" in text


# --- errors ----------------------------------------------------------------------------------------------------------


@each()
def test_data_of_another_shape_are_refused(variant: Variant):
    pair, (x, *labels) = variant.used(), variant.batch()
    flat = x.new_zeros(7, x[0].numel() + 1)
    programs = [pair.model, pair.guide, lambda x, *_: pair.initialise(x)]
    for program in programs if variant.family != "pca" else programs[:2]:  # it starts from nothing
        for wrong in (flat, x[0], x.unsqueeze(0)):
            with pytest.raises(DataError, match=re.escape(f"{pair.input_shape}, got {tuple(wrong.shape)}")):
                program(wrong, *labels)
