"""log p(x) through a compiled graph: the eager estimate, pass by pass, or a warning and the eager path."""

import warnings
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrovae as pv
from pyrovae.compile import checked
from pyrovae.compile import graph as graphs
from tests.pairs import Noisy, guide_of, model_of, units

pytestmark = pytest.mark.double(53)

X = torch.bernoulli(torch.full((25, 6), 0.4), generator=torch.Generator().manual_seed(0)).double()


class Modules(Noisy):
    """With BatchNorm and dropout, both off while evaluating, and a learned prior."""

    def __init__(self):
        super().__init__()
        self.prior = nn.Parameter(torch.randn(2))
        self.encoder[1].running_mean.normal_()

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.prior, 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


def functions():
    """That close over tensors."""
    loading, reading = torch.randn(2, 6), torch.randn(6, 2)
    model = model_of(lambda z: dist.Bernoulli(logits=z @ loading).to_event(1), units(2))
    return SimpleNamespace(model=model, guide=guide_of(lambda x: dist.Normal(x @ reading, 0.8).to_event(1)))


def bits():
    """Discrete latents."""
    encoder, decoder = nn.Linear(6, 3), nn.Linear(3, 6)
    prior = dist.Bernoulli(torch.full((3,), 0.4)).to_event(1)
    model = model_of(lambda z: dist.Bernoulli(logits=decoder(z)).to_event(1), lambda x: prior)
    return SimpleNamespace(model=model, guide=guide_of(lambda x: dist.Bernoulli(logits=encoder(x)).to_event(1)))


PAIRS = {
    "vae": lambda: pv.models.VAE((6,), latent_dim=2, hidden=(4,)),
    "vae, full": lambda: pv.models.VAE((6,), latent_dim=2, hidden=(), posterior="full"),
    "modules": Modules,
    "plain": functions,
}
COLUMNS = ("log_prob", "std_error", "ess", "pareto_k")


def estimate(pair, compile, data=X, **options):
    """An estimate; a warning that it was not compiled is an error."""
    options = {"num_samples": 70, "chunk_size": 30, "seed": 3} | options
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "cannot compile")
        return pv.log_likelihood(pair.model, pair.guide, data, compile=compile, **options)


def assert_same(one, other, **tolerance):
    for column in COLUMNS:
        torch.testing.assert_close(getattr(other, column), getattr(one, column), **tolerance)


BATCHES = {
    "whole": (X, {}),
    "batches": (X, {"batch_size": 10}),
    "Images": (pv.data.Images(X), {"batch_size": 10}),
    "one batch": (pv.data.Images(X), {}),
    "folded": (X, {"fold_particles": True}),
}


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("pair", PAIRS)
def test_the_compiled_estimate_is_the_eager_one_on_the_same_seed(pair, batches, interpreted):
    """Chunks of 30, 30 and 10 draws for batches of 10, 10 and 5 data: what has another shape runs eagerly."""
    data, options = BATCHES[batches]
    made = PAIRS[pair]()
    eager, compiled = (estimate(made, how, data, **options) for how in (False, True))
    assert (eager.path, compiled.path) == ("eager", "compiled")
    assert_same(eager, compiled, rtol=1e-9, atol=1e-9)
    assert len(interpreted) == 1
    assert compiled.num_samples == 70


@pytest.mark.parametrize("pair", ["vae", "modules"])
def test_so_it_is_through_inductor(pair):
    made = PAIRS[pair]()
    eager, compiled = (estimate(made, how, batch_size=10) for how in (False, True))
    assert (eager.path, compiled.path) == ("eager", "compiled")
    assert_same(eager, compiled, rtol=1e-8, atol=1e-8)


def test_discrete_latents_agree_in_law(interpreted):
    """Their draws are others, of the same law: |z| < 6 for 25 data, false alarm below 1e-7."""
    made = bits()
    eager, compiled = (estimate(made, how, num_samples=3000, chunk_size=1000) for how in (False, True))
    assert compiled.path == "compiled"
    error = (eager.std_error**2 + compiled.std_error**2).sqrt()
    assert ((eager.log_prob - compiled.log_prob).abs() < 6 * error).all()


def test_without_a_seed_it_draws_from_the_global_generator(interpreted):
    made, results = PAIRS["vae"](), []
    for how in (False, True):
        torch.manual_seed(11)
        results.append((estimate(made, how, seed=None), torch.get_rng_state()))
    assert_same(results[0][0], results[1][0], rtol=1e-9, atol=1e-9)
    assert torch.equal(results[0][1], results[1][1])


def test_equal_evaluations_share_the_compilation_and_read_the_parameters_as_they_are(interpreted):
    made = PAIRS["vae"]()
    first = estimate(made, True)
    with torch.no_grad():
        made.decoder.output_bias.add_(0.5)
    second = estimate(made, True)
    assert len(interpreted) == 1
    assert not torch.equal(first.log_prob, second.log_prob)
    assert_same(estimate(made, False), second, rtol=1e-9, atol=1e-9)


def test_memory_that_runs_out_halves_the_chunk_and_compiles_again(interpreted, monkeypatch):
    made, sizes = PAIRS["vae"](), []
    original = graphs.Graph.compiled

    def limited(self):
        run = original(self)

        def call(*inputs, **options):
            (log_w,) = run(*inputs, **options)
            sizes.append(len(log_w))
            if len(log_w) > 20 and len(sizes) > 1:  # the check before goes well
                raise torch.OutOfMemoryError("out of memory")
            return [log_w]

        return call

    monkeypatch.setattr(graphs.Graph, "compiled", limited)
    found = estimate(made, True, num_samples=60, chunk_size=30)
    assert found.path == "compiled"
    assert sizes == [30, 30, 15, 15, 15, 15, 15]
    assert len(interpreted) == 2
    eager = estimate(made, False, num_samples=60, chunk_size=15)  # on other draws: the pass that failed took some
    error = (eager.std_error**2 + found.std_error**2).sqrt()
    assert ((eager.log_prob - found.log_prob).abs() < 6 * error).all()


# --- what is not compiled --------------------------------------------------------------------------------------------


class Reading(Modules):
    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc = self.encoder(x)
            pyro.sample("z", dist.Normal(loc / max(1.0, loc.abs().max().item()), 0.9).to_event(1))


class Drawing(Modules):
    def guide(self, x):
        import random

        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x) + 0 * random.random(), 0.9).to_event(1))


FALLBACKS = {
    "item": (Reading, "reads a tensor's value on the host"),
    "Python's generator": (Drawing, "draws from Python's or numpy's generator"),
}


def warned(made, **options):
    with pytest.warns(UserWarning, match="cannot compile") as caught:
        found = pv.log_likelihood(
            made.model, made.guide, X, compile=True, **{"num_samples": 70, "chunk_size": 30, "seed": 3} | options
        )
    (warning,) = [w for w in caught if "cannot compile" in str(w.message)]
    message = str(warning.message)
    assert warning.filename == __file__
    assert found.path == "eager"
    assert message.endswith("; running eagerly")
    return found, message


@pytest.mark.parametrize("what", FALLBACKS)
@pytest.mark.parametrize("batch_size", [None, 10])
def test_what_cannot_be_compiled_runs_eagerly_after_one_warning(what, batch_size, interpreted):
    """To the bits of an eager evaluation."""
    make, reason = FALLBACKS[what]
    made = make()
    found, message = warned(made, batch_size=batch_size)
    assert reason in message
    assert_same(estimate(made, False, batch_size=batch_size), found, rtol=0, atol=0)


def test_a_graph_that_computes_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(
        graphs.Graph, "compiled", lambda self: lambda *inputs, **options: [r * (1 + 1e-4) for r in self(*inputs)]
    )
    made = PAIRS["vae"]()
    found, message = warned(made)
    assert "compiled and eager results differ" in message
    assert_same(estimate(made, False), found, rtol=0, atol=0)


def test_auto_compiles_the_larger_evaluations(monkeypatch, interpreted):
    """From the number of data, samples and parameters alone."""
    pair = pv.models.VAE((6,), latent_dim=2, hidden=(100,))
    for num_samples, data in ((10, X), (10, pv.data.Images(X)), (70, X)):
        assert estimate(pair, "auto", data, num_samples=num_samples).path == "eager"
    weights = sum(p.numel() for p in pair.parameters())
    saved = checked.SAVED * weights * len(X) * 70
    for data in (X, pv.data.Images(X)):
        for factor, path in ((1.001, "eager"), (0.999, "compiled"), (0.5, "compiled")):
            monkeypatch.setattr(checked, "COMPILATION", factor * saved)
            assert estimate(pair, "auto", data, batch_size=len(X)).path == path
    assert estimate(pair, False).path == "eager"
    assert len(interpreted) == 1


def test_the_default_of_a_small_evaluation_is_eager_and_says_so(interpreted):
    found = pv.log_likelihood(*(getattr(PAIRS["vae"](), name) for name in ("model", "guide")), X, num_samples=100)
    assert found.path == "eager"
    assert not interpreted


def test_many_batches_of_one_pass_each_are_compiled_as_well(interpreted):
    found = estimate(PAIRS["vae"](), True, batch_size=5, num_samples=30)
    assert found.path == "compiled"
