"""log p(x) by importance sampling: exact on solvable pairs, honest about its error, the same for every kind of data."""

import math
import subprocess
import sys
import warnings
from functools import partial

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import scipy.stats
import torch
from pyro.infer import autoguide, config_enumerate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyrovae as pv
from pyrovae.engine.probe import checked_look
from pyrovae.engine.weights import Tally, pareto_k, tail_size
from pyrovae.errors import NumericalError
from pyrovae.evaluate import posterior_gap
from pyrovae.evaluate.kept import Resampler
from pyrovae.memory import WORKING_SET, PeakBytes
from tests import arviz_names
from tests.pairs import guide_of, model_of
from tests.state import refused

pytestmark = pytest.mark.double(17)

X = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
NOISE = 0.8
EXACT = dist.Normal(torch.zeros(3, dtype=torch.float64), math.sqrt(1 + NOISE**2)).log_prob(X)
Z = 4.9  # two-sided false-alarm rate 1e-6
model = model_of(lambda z: dist.Normal(z, NOISE))
guide = guide_of(lambda x: dist.Normal(0.4 * x + 0.1, x.new_tensor(0.9)))
posterior = guide_of(lambda x: dist.Normal(x / (1 + NOISE**2), x.new_tensor(math.sqrt(NOISE**2 / (1 + NOISE**2)))))


def columns(estimate):
    return torch.stack([estimate.log_prob, estimate.std_error, estimate.ess, estimate.pareto_k])


# --- the number itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "chunk"), [(1, None), (7, 3), (100, 100), (101, 50), (5, 1000), (1000, None)])
def test_exactly_the_number_asked_for_is_used(num, chunk):
    draws = []

    def recorded(x):
        guide(x)
        draws.append(None)

    def weighed(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), x.new_ones(())))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)
        draws[-1] = z.expand(*z.shape[:-1], 3).reshape(-1, 3)

    estimate = pv.log_likelihood(weighed, recorded, X, num_samples=num, chunk_size=chunk, seed=0)
    z = draws.pop()
    while len(z) < num:  # what was drawn before are trials, of one particle and of two
        assert len(draws[-1]) <= (chunk or num)
        z = torch.cat([draws.pop(), z])
    assert max(map(len, draws)) <= 2
    assert len(z) == num == estimate.num_samples
    log_w = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, NOISE).log_prob(X)
    log_w = log_w - dist.Normal(0.4 * X + 0.1, 0.9).log_prob(z)
    w = log_w.exp()
    torch.testing.assert_close(estimate.log_prob, w.mean(0).log())
    torch.testing.assert_close(estimate.ess, w.sum(0) ** 2 / (w**2).sum(0))
    if num > 1:
        torch.testing.assert_close(estimate.std_error, w.std(0) / w.mean(0) / math.sqrt(num))
    largest = log_w.T.topk(min(tail_size(num) + 1, num), 1).values
    expected = pareto_k(largest, num).numpy() if num > 20 else [math.inf] * 3
    np.testing.assert_allclose(estimate.pareto_k.numpy(), expected, rtol=1e-6)


def test_p_hat_is_unbiased_and_its_error_calibrated():
    """4000 repetitions of S = 50: p-hat, not its log, has mean p(x); the standard error is the spread it predicts."""
    found = pv.log_likelihood(model, guide, X.repeat(4000), num_samples=50, seed=1)
    p_hat = found.log_prob.exp().view(4000, 3)
    z = (p_hat.mean(0) - EXACT.exp()) / (p_hat.std(0) / math.sqrt(4000))
    assert z.abs().max() < Z
    # Relative SE of a standard deviation of 4000: 1.1%, fatter tails and the delta method aside: 10%.
    ratio = found.std_error.view(4000, 3).square().mean(0).sqrt() / found.log_prob.view(4000, 3).std(0)
    assert ((ratio - 1).abs() < 0.1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_guide_equal_to_the_posterior_is_exact(dtype):
    torch.set_default_dtype(dtype)
    estimate = pv.log_likelihood(model, posterior, X.to(dtype), num_samples=500, seed=0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(estimate.log_prob, EXACT, atol=20 * eps, rtol=20 * eps)
    assert estimate.log_prob.dtype == torch.float64
    assert estimate.dtype == str(dtype).removeprefix("torch.")
    torch.testing.assert_close(estimate.ess, torch.full((3,), 500.0).double(), rtol=1e-6, atol=0)
    assert estimate.std_error.max() < 1e-6
    assert estimate.warning() is None


def test_a_pair_without_latents_is_exact_even_with_one_sample():
    def direct(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, math.sqrt(1 + NOISE**2)), obs=x)

    for num in (1, 3, 100):
        estimate = pv.log_likelihood(direct, lambda x: None, X, num_samples=num)
        torch.testing.assert_close(estimate.log_prob, EXACT)
        assert estimate.std_error.tolist() == [0.0] * 3
        assert estimate.ess.tolist() == pytest.approx([num] * 3)
        assert estimate.warning() is None


# --- numbers that are not numbers ------------------------------------------------------------------------------------


def test_a_datum_that_cannot_be_is_minus_infinity_and_never_nan():
    bounded = model_of(lambda z: dist.Uniform(z.sigmoid() - 5, z.sigmoid() + 5, validate_args=False))

    with pyro.validation_enabled(False):
        estimate = pv.log_likelihood(bounded, guide, torch.tensor([0.0, 50.0]), num_samples=100, seed=0)
    assert estimate.log_prob[1] == -math.inf
    assert torch.isfinite(estimate.log_prob[0])
    assert not columns(estimate).isnan().any()
    assert (estimate.ess[1], estimate.std_error[1]) == (0, math.inf)
    assert "-inf for 1 of 2 data" in estimate.warning()
    assert estimate.nll == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_nan_or_infinite_are_one_clear_error(value):
    def broken(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)
            pyro.factor("broken", torch.where(x > 1.9, value, 0.0))

    for batch_size in (None, 1):
        with pyro.validation_enabled(False), pytest.raises(NumericalError, match=r"datum 2 are NaN or \+inf"):
            pv.log_likelihood(broken, guide, X, num_samples=10, batch_size=batch_size)


# --- joint weights, scales, marks ------------------------------------------------------------------------------------


def global_model(x, size=None, **plate):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size or len(x), **plate):
        pyro.sample("x", dist.Normal(w, NOISE), obs=x)


def global_model_prior(x):
    pyro.sample("w", dist.Normal(x.new_zeros(()), x.new_ones(())))


def global_exact():
    covariance = torch.ones(3, 3) + NOISE**2 * torch.eye(3)
    return dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(X)


@pytest.mark.parametrize("kind", [autoguide.AutoNormal, autoguide.AutoMultivariateNormal, autoguide.AutoDiagonalNormal])
def test_global_latents_have_one_joint_weight(kind):
    guide = kind(global_model, init_scale=0.5)
    estimate = pv.log_likelihood(global_model, guide, X, num_samples=4000, seed=0)
    assert {c.shape for c in (estimate.log_prob, estimate.std_error, estimate.ess, estimate.pareto_k)} == {torch.Size()}
    assert abs(estimate.log_prob - global_exact()) < Z * estimate.std_error
    assert 0 < estimate.std_error < 0.1
    assert estimate.nll == -estimate.log_prob.item()
    assert math.isnan(estimate.nll_data_std_error)
    assert estimate.to_arviz().log_likelihood.log_prob.shape == (1, 100, 1)


def test_joint_weights_take_no_batches():
    guide = autoguide.AutoNormal(global_model)
    for data, options in ((X, {"batch_size": 2}), (DataLoader(TensorDataset(X), batch_size=2), {})):
        with pytest.raises(ValueError, match="cannot come in batches"):
            pv.log_likelihood(global_model, guide, data, num_samples=10, **options)


def test_subsampled_global_latents_are_refused():
    def subsampled(x):
        return global_model(x, size=30, subsample=torch.arange(len(x)))

    with pytest.raises(ValueError, match='plate "data" is subsampled'):
        pv.log_likelihood(subsampled, lambda x: pyro.sample("w", dist.Normal(0.0, 1.0)), X, num_samples=10)


def test_scales_and_subsampling_of_local_latents_are_ignored():
    def subsampled(program):
        def run(x):
            with pyro.plate("data", 300, subsample=torch.arange(len(x))):
                program(x)

        return run

    def inner_model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    def inner_guide(x):
        pyro.sample("z", dist.Normal(0.4 * x + 0.1, 0.9))

    options = {"num_samples": 50, "seed": 0, "chunk_size": 50}
    plain = columns(pv.log_likelihood(model, guide, X, **options))
    scaled = pv.log_likelihood(poutine.scale(model, scale=0.1), poutine.scale(guide, scale=7.0), X, **options)
    assert torch.equal(columns(scaled), plain)
    sub = pv.log_likelihood(subsampled(inner_model), subsampled(inner_guide), X, **options)
    torch.testing.assert_close(columns(sub), plain)


def test_enumeration_marks_are_ignored():
    mixture = config_enumerate(
        model_of(lambda c: dist.Normal(2 * c - 1, 1.0), lambda x: dist.Bernoulli(0.3)), "parallel"
    )
    pick = config_enumerate(guide_of(lambda x: dist.Bernoulli(0.5)))
    exact = torch.logaddexp(
        math.log(0.3) + dist.Normal(1.0, 1.0).log_prob(X), math.log(0.7) + dist.Normal(-1.0, 1.0).log_prob(X)
    )
    estimate = pv.log_likelihood(mixture, pick, X, num_samples=2000, seed=0)
    assert ((estimate.log_prob - exact).abs() < Z * estimate.std_error).all()


# --- pairs without a density -----------------------------------------------------------------------------------------


def codes_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.full((len(x), 4), 0.25)))
        pyro.sample("x", dist.Normal(z.to(x.dtype), 1.0), obs=x)


delta_guide = guide_of(lambda x: dist.Delta(0.5 * x))


def random_delta_guide(x):
    with pyro.plate("data", len(x)):
        h = pyro.sample("h", dist.Normal(x, 1.0))
        pyro.sample("z", dist.Delta(0.5 * h))


def two_layers(x):
    with pyro.plate("data", len(x)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(h, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_bare_delta_on_a_continuous_latent_has_no_density():
    flat = poutine.mask(model, mask=False)
    for pair in (
        (model, autoguide.AutoDelta(model)), (model, delta_guide), (flat, delta_guide), (two_layers, random_delta_guide)
    ):  # fmt: skip
        for options in ({}, {"fold_particles": True}):
            if options and isinstance(pair[1], nn.Module):
                continue
            with pytest.raises(ValueError, match=r'no log p\(x\): guide site "z" is a bare Delta'):
                pv.log_likelihood(*pair, X, num_samples=10, **options)


def test_a_delta_on_a_discrete_code_is_a_bound():
    quantized = guide_of(lambda x: dist.Delta(x.round().clamp(0, 3).long()))

    estimate = pv.log_likelihood(codes_model, quantized, X, num_samples=10)
    expected = math.log(0.25) + dist.Normal(X.round().clamp(0, 3), 1.0).log_prob(X)
    torch.testing.assert_close(estimate.log_prob, expected)


def test_a_deterministic_relation_in_both_programs_is_no_autoencoder():
    def relation(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        return pyro.sample("twice", dist.Delta(2 * z))

    def full_model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(relation(x) / 2, NOISE), obs=x)

    def full_guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.4 * x + 0.1, 0.9))
            pyro.sample("twice", dist.Delta(2 * z))

    same = {"num_samples": 20, "seed": 0, "chunk_size": 20}
    found = pv.log_likelihood(full_model, full_guide, X, **same)
    torch.testing.assert_close(columns(found), columns(pv.log_likelihood(model, guide, X, **same)))


# --- data, seeds, modes ----------------------------------------------------------------------------------------------

SOURCES = {
    "tensor": (X, {}),
    "tensor in batches": (X, {"batch_size": 2}),
    "Dataset": (TensorDataset(X), {"batch_size": 2}),
    "Dataset, whole": (TensorDataset(X), {}),
    "DataLoader": (DataLoader(TensorDataset(X), batch_size=2), {}),
    "Images": (pv.data.Images(X), {"batch_size": 1}),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_of_data_gives_the_same_answer(source):
    data, options = SOURCES[source]
    estimate = pv.log_likelihood(model, guide, data, num_samples=3000, seed=0, **options)
    assert ((estimate.log_prob - EXACT).abs() < Z * estimate.std_error).all()
    assert estimate.log_prob.shape == (3,)
    torch.testing.assert_close(pv.log_likelihood(model, posterior, data, num_samples=5, **options).log_prob, EXACT)


def by_name(program):
    return lambda *, x: program(x)


def closed(program):
    return lambda: program(X)


def single(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def single_posterior(x):
    pyro.sample("z", dist.Normal(x / (1 + NOISE**2), math.sqrt(NOISE**2 / (1 + NOISE**2))))


CALLS = {
    "no arguments": (closed(model), closed(posterior), (), {}, EXACT),
    "by keyword": (by_name(model), by_name(posterior), (), {"x": X}, EXACT),
    "0-d": (single, single_posterior, (X[0],), {}, EXACT[0]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "options", [{}, {"compile": True}, {"batch_size": 2}, {"refine_steps": 1}, {"num_draws": 3}], ids=str
)
def test_programs_are_called_as_they_are_defined(call, options, interpreted):
    model, guide, args, kwargs, exact = CALLS[call]
    found = pv.log_likelihood(model, guide, *args, num_samples=10, **options, **kwargs)
    torch.testing.assert_close(found.log_prob, exact)
    assert found.path == ("compiled" if "compile" in options else "eager")
    if options == {}:
        exact = exact.mean().item()
        assert posterior_gap(model, guide, *args, num_samples=64, **kwargs).log_p == pytest.approx(exact)
        few = {"num_temperatures": 2, "leapfrog_steps": 1, "compile": False}
        assert pv.ais_log_likelihood(model, *args, guide=guide, **few, **kwargs).nll == pytest.approx(-exact)


def test_a_dynamic_set_is_drawn_once_per_seed():
    grey = pv.data.Images(torch.full((20, 40), 0.5), binarization="dynamic")
    vae = pv.models.VAE((40,), latent_dim=2, hidden=())

    def bits(seed):
        return pv.log_likelihood(vae.model, vae.guide, grey, num_samples=10, seed=seed, batch_size=7).log_prob

    assert torch.equal(bits(1), bits(1))
    assert not torch.equal(bits(1), bits(2))


def test_another_seed_is_another_estimate_and_none_the_global_generators():
    before = torch.get_rng_state()
    first = columns(pv.log_likelihood(model, guide, X, num_samples=10, seed=3))
    assert not torch.equal(columns(pv.log_likelihood(model, guide, X, num_samples=10, seed=4)), first)
    pv.log_likelihood(model, guide, X, num_samples=10)
    assert not torch.equal(torch.get_rng_state(), before)


# --- memory ----------------------------------------------------------------------------------------------------------


def limited(error, particles, runs=math.inf):
    """The exact guide on a device for so many particles, so many times; and how many it has drawn."""
    sizes = []

    def guide(x):
        with pyro.plate("data", len(x)):
            mean, scale = x / (1 + NOISE**2), math.sqrt(NOISE**2 / (1 + NOISE**2))
            z = pyro.sample("z", dist.Normal(mean, x.new_tensor(scale)))
        if z.numel() // len(x) > particles or len(sizes) >= runs:
            raise error
        sizes.append(z.numel() // len(x))

    return guide, sizes


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_running_out_of_memory_halves_the_pass(error):
    guide, sizes = limited(error, 6)
    estimate = pv.log_likelihood(model, guide, X, num_samples=50, chunk_size=40)
    assert sizes == [1, 2, *[5] * 10]
    torch.testing.assert_close(estimate.ess, torch.full((3,), 50.0))
    with pytest.raises(type(error)):
        pv.log_likelihood(model, limited(error, 6, runs=2)[0], X, num_samples=1)


def test_other_errors_are_not_taken_for_want_of_memory():
    guide, sizes = limited(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 6)
    refused(RuntimeError, "mat1", pv.log_likelihood, model, guide, X, num_samples=50, chunk_size=40)
    assert max(sizes) == 2  # and looks of one, but no pass of fewer


@pytest.mark.parametrize(("megabytes", "size", "num"), [(40, 20, 500), (2048, 10, 5000)])
def test_the_peak_stays_below_the_memory_given(megabytes, size, num):
    torch.set_default_dtype(torch.float32)
    vae = pv.models.VAE((1, 28, 28), latent_dim=50, hidden=(200, 200))
    x = torch.rand(size, 1, 28, 28).round()
    with PeakBytes() as used:
        pv.log_likelihood(vae.model, vae.guide, x, num_samples=num, seed=0, memory=megabytes * 2**20)
    assert 0.2 * min(megabytes * 2**20, WORKING_SET["cpu"]) < used.peak < megabytes * 2**20


def test_a_whole_evaluation_fits_in_two_gigabytes_of_process():
    script = """if True:
        import resource, torch, pyrovae as pv
        vae = pv.models.VAE((1, 28, 28), latent_dim=50, hidden=(200, 200))
        x = torch.rand(100, 1, 28, 28).round()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pv.log_likelihood(vae.model, vae.guide, pv.data.Images(x), num_samples=200, seed=0)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2.0


# --- what it says ----------------------------------------------------------------------------------------------------


def estimate_of(log_prob, std_error, k):
    tensors = [torch.tensor(v, dtype=torch.float64) for v in (log_prob, std_error, [9.0] * len(k), k)]
    return pv.LikelihoodEstimate(*tensors, num_samples=100, seed=None, dtype="float32")


def test_means_errors_and_warning():
    estimate = estimate_of([-1.0, -3.0], [0.3, 0.4], [0.1, 0.9])
    assert estimate.nll == 2.0
    assert estimate.nll_std_error == pytest.approx(0.25)
    assert estimate.nll_data_std_error == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert estimate.unreliable == 0.5
    assert "50.0% of the data" in estimate.warning()
    assert estimate_of([-1.0, -3.0], [0.3, 0.4], [0.1, 0.7]).warning() is None
    assert estimate_of([-1.0, -3.0], [0.0, 1e-9], [math.inf, math.inf]).warning() is None
    assert str(estimate).startswith("NLL 2.00 ± 0.25 nats (± 1 over data), 100 samples")


def test_arviz_receives_every_number():
    estimate = pv.log_likelihood(model, guide, X, num_samples=100, seed=4)
    table = estimate.to_arviz()
    assert isinstance(table, arviz_names.KEPT)
    assert table.log_likelihood.log_prob.dims == ("chain", "draw", "datum")
    assert np.allclose(table.log_likelihood.log_prob.values[0], estimate.log_prob.numpy(), rtol=0, atol=1e-8)
    for name in ("std_error", "ess", "pareto_k"):
        assert np.array_equal(table.sample_stats[name].values, getattr(estimate, name).numpy())
    assert table.attrs["num_samples"] == 100
    assert table.attrs["seed"] == 4


def test_leaving_a_datum_out_gives_its_own_log_density():
    def conjugate(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def posterior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.linspace(-2, 2, 30)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).double()
    found = pv.log_likelihood(conjugate, posterior, x, num_samples=10, num_draws=3, seed=0)
    annealed = pv.ais_log_likelihood(conjugate, x, num_temperatures=10, num_chains=5, seed=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Estimated shape parameter")
        loo, other = arviz.loo(found.to_arviz(), pointwise=True), arviz.loo(annealed.to_arviz())
    elpd, each = ("elpd_loo", "loo_i") if arviz_names.OLD else ("elpd", "elpd_i")
    assert getattr(loo, elpd) == pytest.approx(exact.sum().item(), abs=1e-3)
    spread = exact.var(correction=0 if arviz_names.OLD else 1)
    assert loo.se == pytest.approx((30 * spread).sqrt().item(), rel=1e-4)
    assert np.allclose(getattr(loo, each).values, exact.numpy(), atol=1e-4)
    assert getattr(other, elpd) == pytest.approx(annealed.log_prob.sum().item(), abs=1e-6)
    assert annealed.to_arviz().sample_stats.acceptance.shape == (30,)


def test_intervals_are_students():
    estimate = estimate_of([-1.0, -math.inf], [0.5, math.inf], [0.1, math.inf])
    low, high = estimate.interval(0.9)
    reach = scipy.stats.t.ppf(0.95, 99) * 0.5
    assert (low[0].item(), high[0].item()) == pytest.approx((-1 - reach, -1 + reach))
    assert (low[1].item(), high[1].item()) == (-math.inf, math.inf)
    assert estimate_of([-1.0], [0.0], [0.1]).interval(1.0) == (torch.tensor([-1.0]), torch.tensor([-1.0]))
    refused(ValueError, "level", estimate.interval, 95)


# --- posterior draws -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 700}, {"compile": True}, {"batch_size": 2}, {"fold_particles": True}]
)
def test_kept_draws_come_from_the_posterior(options):
    found = pv.log_likelihood(model, guide, X, num_samples=20_000, num_draws=2000, seed=0, **options)
    draws, deviation = found.draws["z"], math.sqrt(NOISE**2 / (1 + NOISE**2))
    assert draws.shape == (2000, 3)
    error = deviation * (1 / 2000 + 1 / found.ess.min()) ** 0.5
    assert ((draws.mean(0) - X / (1 + NOISE**2)).abs() < Z * error).all()
    assert (draws.std(0) / deviation - 1).abs().max() < 0.1
    without = pv.log_likelihood(model, guide, X, num_samples=20_000, seed=0, **options)
    assert torch.equal(without.log_prob, found.log_prob)  # the guide's noise is not touched
    assert without.draws == {}


@pytest.mark.parametrize(
    ("data", "options"),
    [(-1, {}), (-2, {}), (-1, {"batch_size": 2}), (-2, {"batch_size": 2}), (-1, {"fold_particles": True})],
)
def test_draws_have_their_data_first_and_share_a_particle(data, options):
    """One site per way of lying in plates; u is z and a little noise, so that a mixture of particles would show."""

    def program(x, scale, observe):
        with pyro.plate("data", len(x), dim=data):
            at = x if data == -1 else x.unsqueeze(-1)
            z = pyro.sample("z", dist.Normal(0 * at.unsqueeze(-1) + x.new_zeros(4), scale).to_event(1))
            if observe:
                pyro.sample("x", dist.Normal(0 * at, 1.0), obs=at)
            with pyro.plate("inner", 3, dim=-3 - data):
                pyro.sample("u", dist.Normal(z[..., 0], 1e-3))

    observed, prior = partial(program, scale=1.0, observe=True), partial(program, scale=0.8, observe=False)
    found = pv.log_likelihood(observed, prior, X, num_samples=50, num_draws=7, chunk_size=20, seed=0, **options)
    z, u = found.draws["z"], found.draws["u"]
    assert z.shape == (7, 3, 4)
    assert u.shape == (7, 3, 3)  # data before the inner plate
    assert (u - z[..., :1]).abs().max() < 0.01
    assert len(z.unique(dim=0)) > 3
    assert found.to_arviz().posterior.u.dims[:3] == ("chain", "draw", "datum")


def test_draws_of_joint_weights():
    found = pv.log_likelihood(global_model, global_model_prior, X, num_samples=60, num_draws=9, chunk_size=20, seed=0)
    assert found.log_prob.shape == ()
    assert found.draws["w"].shape == (9,)
    assert found.to_arviz().posterior.w.dims == ("chain", "draw")


def test_draws_are_proportional_to_the_weights_of_all_passes():
    """Passes of very unequal weight, one of them impossible, against exact frequencies; two batches."""
    log_w = torch.tensor([[0.0, -2.0], [-3.0, 1.0], [-math.inf, -1.0], [-math.inf, 2.0], [4.0, 0.0], [3.0, -math.inf]])
    checked = checked_look(model, guide, (X[:2],), {})
    resampler = Resampler(40_000, 0, checked)
    for _ in range(2):
        for rows in log_w.split(2):
            number = (log_w == rows[:1]).all(1).nonzero()[0]
            resampler.add(rows, [(number + torch.arange(2.0)).unsqueeze(-1).expand(2, 2)])
        resampler.finish()
    draws, shares = resampler.results()["z"], log_w.softmax(0)
    assert draws.shape == (40_000, 4)
    for particle, share in enumerate(shares):
        error = (share * (1 - share) / 40_000).sqrt()
        assert ((draws == particle).double().mean(0) - share.repeat(2)).abs().le(Z * error.repeat(2)).all()


def test_draws_of_a_datum_without_weights_are_the_guides():
    def impossible(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.factor("x", torch.where(x > 0, -z, -math.inf))

    found = pv.log_likelihood(impossible, guide, X, num_samples=2000, num_draws=2000, chunk_size=300, seed=0)
    assert torch.isneginf(found.log_prob[1])
    assert torch.isfinite(found.draws["z"]).all()
    draws = found.draws["z"][:, 1]
    assert abs(draws.mean() - (0.4 * X[1] + 0.1)) < Z * 0.9 * math.sqrt(2 / 2000)  # drawn, then drawn from
    assert draws.std() == pytest.approx(0.9, rel=0.1)


def test_arviz_receives_the_draws_and_draws_them():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    table = pv.log_likelihood(model, guide, X, num_samples=500, num_draws=50, seed=0).to_arviz()
    assert table.posterior.z.dims[:3] == ("chain", "draw", "datum")
    density = arviz.plot_density if arviz_names.OLD else arviz.plot_dist
    density(table.sel(datum=0), var_names=["z"])
    arviz.plot_pair(table, var_names=["z"], coords={"datum": [0, 1]})
    matplotlib.pyplot.close("all")


def test_no_data():
    refused(pv.data.DataError, "at least one datum", pv.log_likelihood, model, guide, DataLoader(TensorDataset(X[:0])))


def test_the_tally_agrees_with_one_pass():
    log_w = 3 * torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    tally = Tally(1000)
    for part in log_w.split(7):
        tally.add(part)
    expected = pareto_k(log_w.T.topk(tail_size(1000) + 1, 1).values, 1000)
    sums, k, draws = tally.results()
    torch.testing.assert_close(k, expected)
    torch.testing.assert_close(sums.log_mean, log_w.logsumexp(0) - math.log(1000))
    assert draws.isnan().all()
