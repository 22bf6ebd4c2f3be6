"""Autoencoders: their losses by hand, PCA's subspace, penalties, noise, and what they must refuse."""

import copy
import math

import pyro
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import pyrovae as pv
from pyrovae.data import DataError
from pyrovae.models import MODELS, Autoencoder, DenoisingAutoencoder, SparseAutoencoder
from pyrovae.models.autoencoders import CORRUPTIONS
from tests.laws.objectives import OBJECTIVES
from tests.state import refused
from tests.zoo import ZOO

FAMILIES = [Autoencoder, SparseAutoencoder, DenoisingAutoencoder]
VARIANTS = [variant for variant in ZOO if "autoencoder" in variant.family]
each_family = pytest.mark.parametrize("family", FAMILIES)
SETTINGS = {"epochs": 2, "compile": False}


@pytest.fixture(scope="module")
def digits():
    return pv.data.load("digits").train


def small(family=Autoencoder, shape=(1, 8, 8), **variant):
    return family(shape, 5, **{"hidden": (16,), "density_components": 3, **variant})


def some(digits, count=20):
    return digits.x[:count].round()


def gradient(pair, loss):
    return torch.autograd.grad(loss, [p for p in pair.parameters() if p.requires_grad], allow_unused=True)


def assert_same_gradients(pair, loss, by_hand):
    torch.testing.assert_close(loss, by_hand)
    for one, other in zip(gradient(pair, loss), gradient(pair, by_hand), strict=True):
        torch.testing.assert_close(one, other)
        assert one.any()


# --- losses by hand --------------------------------------------------------------------------------------------------


def cross_entropy(pair, z, x):
    return binary_cross_entropy_with_logits(pair.decoder(z), x, reduction="sum")


def test_the_loss_is_the_cross_entropy(digits):
    pair, x = small().double(), some(digits).double()
    loss = pv.ELBO().differentiable_loss(pair.model, pair.guide, x)
    assert_same_gradients(pair, loss, cross_entropy(pair, pair.encoder(x), x))


def test_the_loss_is_the_squared_error(digits):
    pair, x = small(likelihood="gaussian", scale=0.3).double(), digits.x[:20].double()
    loss = pv.ELBO().differentiable_loss(pair.model, pair.guide, x)
    error = (pair.decoder(pair.encoder(x)) - x).square().sum() / (2 * 0.3**2)
    assert_same_gradients(pair, loss, error + x.numel() * math.log(0.3 * math.sqrt(2 * math.pi)))


@pytest.mark.parametrize("kl_weight", [1.0, 0.5])
def test_the_l1_penalty(kl_weight, digits):
    pair, x = small(SparseAutoencoder, weight=0.3).double(), some(digits).double()
    loss = pv.ELBO(kl_weight=kl_weight).differentiable_loss(pair.model, pair.guide, x)
    z = pair.encoder(x).relu()
    assert_same_gradients(pair, loss, cross_entropy(pair, z, x) + kl_weight * 0.3 * z.abs().sum())


def bernoulli_kl(rho, mean):
    p, q = (torch.distributions.Bernoulli(torch.as_tensor(probs)) for probs in (rho, mean))
    return torch.distributions.kl_divergence(p, q).sum()


@pytest.mark.parametrize("kl_weight", [1.0, 0.5])
def test_the_kl_penalty_is_borne_by_every_datum(kl_weight, digits):
    pair, x = small(SparseAutoencoder, penalty="kl", weight=2.0, rho=0.2).double(), some(digits).double()
    loss = pv.ELBO(kl_weight=kl_weight).differentiable_loss(pair.model, pair.guide, x) / len(x)
    z = pair.encoder(x).sigmoid()
    by_hand = cross_entropy(pair, z, x) / len(x) + kl_weight * 2.0 * bernoulli_kl(torch.tensor(0.2).double(), z.mean(0))
    assert_same_gradients(pair, loss, by_hand)


def test_the_kl_penalty_is_finite_where_sigmoids_saturate():
    pair = small(SparseAutoencoder, penalty="kl")
    z = torch.tensor([0.0, 1.0, 0.05, 0.5, 1e-30]).expand(4, 5).clone().requires_grad_()
    value = pair.log_prior(z)
    value.sum().backward()
    assert value.isfinite().all()
    assert z.grad.isfinite().all()


def test_the_default_rho_is_a_twentieth():
    pair = small(SparseAutoencoder, penalty="kl")
    assert pair.log_prior(torch.full((4, 5), 0.05)).abs().max() < 1e-6
    assert pair.log_prior(torch.full((4, 5), 0.06)).max() < -1e-4


@pytest.mark.parametrize("noise", CORRUPTIONS)
def test_the_denoising_loss_reads_noisy_data_and_wants_clean_ones(noise, digits):
    pair, x = small(DenoisingAutoencoder, noise=noise, level=0.4).double(), some(digits).double()
    objective = pv.ELBO()
    objective.loss(pair.model, pair.guide, x)  # a pair is checked once
    pyro.set_rng_seed(1)
    loss = objective.differentiable_loss(pair.model, pair.guide, x)
    pyro.set_rng_seed(1)
    noisy = pair.corrupt(x)
    assert not torch.equal(noisy, x)
    assert_same_gradients(pair, loss, cross_entropy(pair, pair.encoder(noisy), x))
    clean = objective.loss(pair.eval().model, pair.guide, x)
    assert clean == pytest.approx(cross_entropy(pair, pair.encoder(x), x).item())


def test_the_three_kinds_of_noise():
    x = torch.full((100_000,), 0.25)
    noisy = {noise: small(DenoisingAutoencoder, noise=noise, level=0.3).corrupt(x) for noise in CORRUPTIONS}
    # Five standard errors of 100,000 draws.
    added = noisy["gaussian"] - x
    assert abs(added.mean()) < 5 * 0.3 / 1e5**0.5
    assert abs(added.std() - 0.3) < 5 * 0.3 / 2e5**0.5

    def share(noise, value):
        return (noisy[noise] == value).double().mean().item()

    assert abs(share("masking", 0.0) - 0.3) < 5 * (0.21 / 1e5) ** 0.5
    assert share("masking", 0.0) + share("masking", 0.25) == 1
    for value in (0.0, 1.0):
        assert abs(share("salt_and_pepper", value) - 0.15) < 5 * (0.1275 / 1e5) ** 0.5
    assert sum(share("salt_and_pepper", value) for value in (0.0, 0.25, 1.0)) == pytest.approx(1)


@pytest.mark.parametrize("noise", CORRUPTIONS)
def test_no_noise_leaves_the_data(noise):
    x = torch.rand(50, 4)
    assert torch.equal(small(DenoisingAutoencoder, noise=noise, level=0.0).corrupt(x), x)


# --- as Pyro programs ------------------------------------------------------------------------------------------------


@each_family
def test_pyros_own_elbo_is_ours(family, digits):
    pair, x = small(family).double().eval(), some(digits).double()
    for theirs in (pyro.infer.Trace_ELBO(), pyro.infer.TraceMeanField_ELBO()):
        assert theirs.loss(pair.model, pair.guide, x) == pytest.approx(pv.ELBO().loss(pair.model, pair.guide, x))


TOTAL = [row for row in OBJECTIVES if row.gradient == "total" and not row.weighted]


@pytest.mark.parametrize("row", TOTAL, ids=lambda row: row.name)
@pytest.mark.parametrize("variant", [{}, {"penalty": "kl"}], ids=str)
def test_every_bound_is_the_elbo_as_all_particles_are_alike(row, variant, digits):
    pair, x = small(SparseAutoencoder if variant else Autoencoder, **variant).double(), some(digits).double()
    ours, elbo = (o.differentiable_loss(pair.model, pair.guide, x) for o in (row.objective(), pv.ELBO()))
    assert_same_gradients(pair, ours, elbo)


@pytest.mark.parametrize(
    "objective", [pv.ELBO(gradient="stl"), pv.IWAE(3, gradient="dreg"), pv.RWS(3), pv.TVO(3)], ids=repr
)
@each_family
def test_gradients_at_fixed_codes_are_refused(family, objective, digits):
    pair = small(family)
    with pytest.raises(ValueError, match=r'"z" is a Delta that carries parameters.*use an objective with gradient='):
        objective.differentiable_loss(pair.model, pair.guide, some(digits))


@each_family
def test_free_bits_are_refused(family, digits):
    pair = small(family)
    with pytest.raises(ValueError, match='guide site "z" is a Delta, which has none'):
        pv.ELBO(free_bits=0.5).loss(pair.model, pair.guide, some(digits))


# --- training and generation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_training_lowers_the_loss(variant, digits):
    pair, x = MODELS[variant.family](**variant.options | {"input_shape": (1, 8, 8)}), some(digits, 200)
    result = pv.fit(pair.model, pair.guide, x, objective=pv.ELBO(), batch_size=20, epochs=3, lr=1e-2, compile=False)
    assert result.history[-1]["bound"] > result.history[0]["bound"] + 1
    assert result.history[-1]["reconstruction"] > result.history[0]["reconstruction"]


def test_histories_show_the_penalty_as_the_kl(digits):
    pair = small(SparseAutoencoder, weight=0.5)
    row = pv.fit(pair.model, pair.guide, some(digits, 100), objective=pv.ELBO(), **SETTINGS).history[-1]
    with torch.no_grad():
        z = pair.encode(some(digits, 100))
    assert row["kl"] == pytest.approx(0.5 * z.sum(-1).mean().item(), rel=1e-4)
    assert row["kl_per_unit"] == {}


def test_the_penalties_make_sparse_codes(digits):
    units, means = {}, {}
    for penalty, weight in (("l1", 0.0), ("l1", 3.0), ("kl", 0.0), ("kl", 5.0)):
        pyro.set_rng_seed(0)
        pair = SparseAutoencoder((1, 8, 8), 40, (), "gaussian", 0.2, penalty=penalty, weight=weight)
        pv.fit(pair.model, pair.guide, digits, objective=pv.ELBO(), epochs=8, lr=1e-2, compile=False)
        means[penalty, weight], units[penalty, weight] = pair.activity(digits)
    assert units["l1", 3.0] < 0.6 * units["l1", 0.0]
    assert means["kl", 5.0].mean() < 0.1 < 0.3 < means["kl", 0.0].mean()


def test_activity_by_hand():
    pair = Autoencoder((3,), 3, ())
    with torch.no_grad():
        pair.encoder.output.weight.copy_(torch.eye(3))
    x = torch.tensor([[3.0, 0.0, 0.0], [1.0, -1.0, 0.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    activity = pair.activity(x)
    assert activity.mean.tolist() == [1.5, 0.75, 0.5]
    assert activity.units == (1 + 2 + 3 + 0) / 4


def linear_data():
    rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    return torch.randn(200, 6) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.3, 0.2]) @ rotation + 1.0


def test_the_linear_autoencoder_finds_the_subspace_of_pca():
    x = linear_data()
    pair = Autoencoder((6,), 2, (), "gaussian", 1.0).initialise(x)
    directions = torch.linalg.svd(x - x.mean(0)).Vh
    assert pair.subspace_angles(directions[:2]).max() > 0.1
    pv.fit(
        pair.model, pair.guide, x, objective=pv.ELBO(), epochs=300, batch_size=200, lr=0.05, schedule="cosine",
        compile=False,
    )  # fmt: skip
    assert pair.subspace_angles(directions[:2]).max() < 1e-2
    least = ((x - x.mean(0)) @ directions[2:].T).square().sum()  # of all projections on two directions
    assert 1 - 1e-6 < (pair.reconstruct(x) - x).square().sum() / least < 1.02


def test_subspace_angles_by_hand():
    pair = Autoencoder((1, 3), 1, (), "gaussian", scale="per_pixel")
    with torch.no_grad():
        pair.decoder.output.weight.copy_(torch.tensor([[2.0], [0.0], [0.0], [5.0], [5.0], [5.0]]))  # means, then scales
    basis = torch.tensor([[1.0, 1.0, 0.0]])
    assert pair.subspace_angles(basis).item() == pytest.approx(math.pi / 4)
    assert pair.subspace_angles(-7 * basis.view(1, 1, 3)).item() == pytest.approx(math.pi / 4)
    assert pair.subspace_angles(torch.eye(3)[:2]).item() == pytest.approx(0)


@each_family
def test_there_is_no_likelihood_with_or_without_a_density(family, digits):
    pair = small(family, likelihood="gaussian")
    assert pair.likelihood_is is None
    for _ in range(2):
        with pytest.raises(ValueError, match=r'the pair has no log p\(x\): guide site "z" is a bare Delta'):
            pv.log_likelihood(pair.model, pair.guide, digits.x[:5], num_samples=3)
        pair.fit_density(digits)


@each_family
def test_generation_needs_a_density(family):
    refused(ValueError, rf"{family.__name__} has no prior .*call its fit_density\(x\)", pv.sample, small(family), 2)


def test_the_density_is_that_of_the_codes(digits):
    """Its mean and covariance are those of the codes exactly, as EM's are; draws come from it."""
    pair = small(likelihood="gaussian").fit_density(digits)
    codes = pair.encode(digits.x).detach()
    density, count = pair.density(), 20_000
    torch.testing.assert_close(density.mean, codes.mean(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(density.variance, codes.var(0, correction=0), rtol=1e-3, atol=1e-5)
    drawn = pv.sample(pair, count, site="z", returns="draws", seed=0)
    assert drawn.shape == (count, 5)
    # Six standard errors for each of the five units.
    assert ((drawn.mean(0) - codes.mean(0)).abs() < 6 * codes.std(0) / count**0.5).all()


def test_the_density_of_many_data_takes_some_of_them(digits, monkeypatch):
    monkeypatch.setattr("pyrovae.models.code_density.MOST_CODES", 100)
    x = digits.x[:350]
    few = copy.deepcopy(pair := small()).fit_density(x[::4])
    torch.testing.assert_close(pair.fit_density(x).density().mean, few.density().mean, rtol=0, atol=0)


def test_the_temperature_of_samples(digits):
    pair = small(likelihood="gaussian").fit_density(digits)
    cold = pv.sample(pair, 200, site="z", returns="draws", temperature=1e-6, seed=0)
    assert (cold.unsqueeze(1) - pair.density_means).norm(dim=-1).min(1).values.max() < 1e-4


def test_codes_that_are_drawn_pass_through_the_nonlinearity(digits):
    for penalty, low, high in (("l1", 0.0, math.inf), ("kl", 0.0, 1.0)):
        pair = small(SparseAutoencoder, penalty=penalty).fit_density(digits)
        z = pv.sample(pair, 500, site="z", returns="draws", seed=0)
        assert low <= z.min() <= z.max() <= high
        assert (z == 0).any() == (penalty == "l1")


def test_the_density_does_not_touch_training(digits):
    x, losses, states = some(digits, 100), [], []
    for fitted in (False, True):
        pyro.set_rng_seed(0)
        pair = small()
        if fitted:
            pair.fit_density(digits)
        losses.append(pv.fit(pair.model, pair.guide, x, objective=pv.ELBO(), **SETTINGS).history[-1]["bound"])
        states.append(dict(pair.named_parameters()))
    assert losses[0] == losses[1]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


# --- verbs -----------------------------------------------------------------------------------------------------------


@each_family
def test_verbs_read_clean_data_even_in_training_mode(family, digits):
    pair, x = small(family), some(digits, 3)
    assert pair.training
    assert torch.equal(pair.reconstruct(x), pair.reconstruct(x))
    assert pair.activity(x).units == pair.activity(x).units
    assert pair.training


@each_family
def test_active_units_are_those_whose_codes_vary(family, digits):
    pair = small(family)
    found = pv.active_units(pair.guide, digits)["z"].variances
    torch.testing.assert_close(found, pair.encode(digits.x).detach().double().var(0), rtol=1e-4, atol=1e-6)


# --- errors ----------------------------------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("program", ["activity", "fit_density"])
def test_data_of_another_shape_are_refused(family, program):
    refused(DataError, r"input_shape=\(1, 8, 8\), got \(4, 64\)", getattr(small(family), program), torch.zeros(4, 64))


def test_errors_of_the_density(digits):
    pair = small()
    refused(DataError, "a density of 3 components needs as many data, got 2", pair.fit_density, digits.x[:2])
    with torch.no_grad():
        pair.encoder.output.bias.fill_(math.nan)
    refused(DataError, "codes of the data are not all finite", pair.fit_density, digits)


def test_errors_of_the_angles():
    for other in (small(), small(network="conv", channels=(4,), hidden=())):
        refused(ValueError, "its decoder is not linear: build it with", other.subspace_angles, torch.eye(64))
    for basis in (torch.eye(5), torch.ones(64)):
        with pytest.raises(ValueError, match=r"basis must be \[k, 64\], one direction a row, got"):
            small(hidden=()).subspace_angles(basis)
