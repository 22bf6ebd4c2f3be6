"""The conditional VAE: the linear case in closed form, labels that are wrong, generation by label."""

import pyro
import pytest
import torch

import pyrovae as pv
from pyrovae.errors import DataError
from pyrovae.models import ConditionalVAE
from tests.state import refused

pytestmark = pytest.mark.double(3)

X = torch.rand(7, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).round()
CLASSES = torch.tensor([0, 1, 2, 2, 1, 0, 1])
ATTRIBUTES = torch.linspace(-1, 1, 14, dtype=torch.float64).view(7, 2)


def small(**variant):
    return ConditionalVAE(**{"input_shape": (1, 4, 4), "latent_dim": 5, "hidden": (8,)} | variant)


def linear(conditional_prior):
    """A linear Gaussian pair whose guide is the exact posterior, and p(x | y)."""
    cvae = ConditionalVAE(
        (7,), 3, latent_dim=2, hidden=(), likelihood="gaussian", scale=0.4, posterior="full",
        conditional_prior=conditional_prior,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in cvae.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    loading, by_class = cvae.decoder.output.weight.detach().split((2, 3), 1)
    offset = by_class.T + cvae.decoder.output_bias.detach()
    mean, variance = torch.zeros(3, 2), torch.ones(3, 2)
    if conditional_prior:
        prior = cvae.prior(torch.eye(3))
        mean, variance = prior.mean.detach(), prior.variance.detach()
    covariance = torch.linalg.inv((1 / variance).diag_embed() + loading.T @ loading / 0.16)
    marginal = torch.distributions.MultivariateNormal(
        offset + mean @ loading.T, loading @ variance.diag_embed() @ loading.T + 0.16 * torch.eye(7)
    )

    def posterior(x, y):
        precise = (mean / variance)[y] + (x - offset[y]) @ loading / 0.16
        mu = torch.einsum("bij,bj->bi", covariance[y], precise)
        return torch.distributions.MultivariateNormal(mu, covariance[y])

    return cvae, posterior, marginal


@pytest.mark.parametrize("conditional_prior", [False, True])
def test_the_linear_pair_has_its_exact_conditional_density(conditional_prior):
    cvae, posterior, marginal = linear(conditional_prior)
    x, y = torch.randn(7, 7), CLASSES

    def guide(x, y):
        with pyro.plate("data", len(x)):
            found = posterior(x, y)
            pyro.sample("z", pyro.distributions.MultivariateNormal(found.mean, found.covariance_matrix))

    exact = marginal.log_prob(x.unsqueeze(1))[torch.arange(7), y]
    torch.testing.assert_close(
        pv.log_weights(cvae.model, guide, x, y, num_particles=4), exact.expand(4, 7), rtol=1e-9, atol=1e-9
    )
    estimate = pv.log_likelihood(cvae.model, guide, x, y, num_samples=10, seed=0)
    torch.testing.assert_close(estimate.log_prob, exact)


def test_the_linear_guide_holds_the_exact_posterior():
    """The posterior's mean is linear in x and one-hot y: the encoder can be it."""
    cvae, posterior, marginal = linear(False)
    x, y = torch.randn(7, 7), CLASSES
    code = torch.eye(3)[y]
    design = torch.cat([torch.randn(50, 7), torch.eye(3)[torch.arange(50) % 3]], 1)
    target = posterior(design[:, :7], torch.arange(50) % 3)
    with torch.no_grad():
        output = cvae.encoder.output
        output.weight.zero_()
        output.weight[:2] = torch.linalg.lstsq(design, target.mean).solution.T
        root = target.scale_tril[0]
        output.bias.copy_(torch.cat([torch.zeros(2), root.diagonal().log(), root[1, :1]]))
    torch.testing.assert_close(cvae.posterior(x, code).mean, posterior(x, y).mean)
    exact = marginal.log_prob(x.unsqueeze(1))[torch.arange(7), y]
    log_w = pv.log_weights(cvae.model, cvae.guide, x, y, num_particles=3)
    torch.testing.assert_close(log_w, exact.expand(3, 7), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", [{"num_classes": 3}, {"num_attributes": 2}], ids=str)
def test_the_conditional_prior_starts_standard(variant):
    code = torch.randn(4, 3 if "num_classes" in variant else 2)
    z = torch.randn(4, 5)
    start = small(**variant, conditional_prior=True).prior(code)
    torch.testing.assert_close(start.log_prob(z), small(**variant).prior(code).log_prob(z))


def test_the_conditional_prior_learns_where_the_codes_of_a_class_are():
    cvae = small(num_classes=3, conditional_prior=True, latent_dim=2)
    x = torch.nn.functional.one_hot(CLASSES, 16).view(7, 1, 4, 4).double()
    pv.fit(cvae.model, cvae.guide, (x, CLASSES), objective=pv.ELBO(), epochs=100, lr=0.05)
    means = cvae.prior(torch.eye(3)).mean
    learnt = cvae.encode(x, CLASSES)
    for label in range(3):
        torch.testing.assert_close(learnt[label == CLASSES].mean(0), means[label], rtol=0, atol=0.5)


# --- verbs -----------------------------------------------------------------------------------------------------------


def test_a_single_int_is_everyones_label():
    cvae = small(num_classes=3)
    z, twos = torch.randn(7, 5), torch.full((7,), 2)
    assert torch.equal(cvae.decode(z, 2), cvae.decode(z, twos))
    assert torch.equal(cvae.encode(X, 2), cvae.encode(X, twos))
    log_w = [
        pv.log_weights(cvae.model, cvae.guide, X, y, num_particles=2) for y in (2, twos) if not pyro.set_rng_seed(1)
    ]
    assert torch.equal(*log_w)


def test_analogies_swap_the_label_at_fixed_z():
    cvae = small(num_classes=3)
    grid = cvae.analogies(X, CLASSES, [2, 0])
    assert grid.shape == (7, 2, 1, 4, 4)
    z = cvae.encode(X, CLASSES)
    for column, label in enumerate((2, 0)):
        torch.testing.assert_close(grid[:, column], cvae.decode(z, label))
    torch.testing.assert_close(cvae.analogies(X, CLASSES, range(3))[:, 2], grid[:, 0])
    described = small(num_attributes=2)
    grid = described.analogies(X, ATTRIBUTES, ATTRIBUTES[:4])
    assert grid.shape == (7, 4, 1, 4, 4)
    torch.testing.assert_close(grid[3, 3], described.reconstruct(X, ATTRIBUTES)[3])


@pytest.mark.parametrize("variant", [{}, {"conditional_prior": True}], ids=str)
def test_samples_are_of_the_label_asked_for(variant):
    """A model of which pixel c is on for class c draws exactly that."""
    cvae = small(num_classes=3, hidden=(), **variant)
    with torch.no_grad():
        cvae.decoder.output.weight.zero_()[:3, 5:] = 60 * torch.eye(3)
        cvae.decoder.output_bias.fill_(-30.0)
    drawn = pv.sample(cvae, 7, CLASSES, returns="draws", seed=0)
    assert torch.equal(drawn.flatten(1)[:, :3].argmax(1), CLASSES)
    assert drawn.sum() == 7
    assert torch.equal(pv.sample(cvae, 4, torch.tensor(1)).flatten(1).argmax(1), torch.ones(4).long())


def test_what_the_label_says_is_learnt_from_the_label():
    torch.manual_seed(0)
    y = torch.arange(200) % 3
    x = torch.bernoulli(torch.rand(3, 16)[y]).view(-1, 1, 4, 4)
    cvae = small(num_classes=3).initialise(x)
    before = pv.log_likelihood(cvae.model, cvae.guide, x, y, num_samples=100, seed=0).nll
    pv.fit(cvae.model, cvae.guide, (x, y), objective=pv.IWAE(5), epochs=60, lr=0.01)
    after = pv.log_likelihood(cvae.model, cvae.guide, x, y, num_samples=100, seed=0).nll
    wrong = pv.log_likelihood(cvae.model, cvae.guide, x, (y + 1) % 3, num_samples=100, seed=0).nll
    assert after < before - 0.5
    assert wrong > after + 1
    assert pv.active_units(cvae.guide, (x, y))["z"].variances.shape == (5,)


# --- labels that are wrong -------------------------------------------------------------------------------------------

WRONG = [
    ({"num_classes": 3}, None, r"labels missing: call model\(x, y\), and load data with labels=True"),
    ({"num_attributes": 2}, None, "labels missing"),
    ({"num_classes": 3}, CLASSES.double(), r"labels must be integers.*got torch.float64: convert with y.long\(\)"),
    ({"num_classes": 3}, CLASSES > 0, "labels must be integers.*got torch.bool"),
    ({"num_classes": 3}, CLASSES[:5], r"labels of shape \[5\] do not go with \[7\] data"),
    ({"num_classes": 3}, CLASSES[:, None], r"labels of shape \[7, 1\] do not go with \[7\] data"),
    ({"num_classes": 3}, torch.eye(3)[CLASSES].long(), r"labels of shape \[7, 3\]"),
    (
        {"num_classes": 3},
        torch.tensor([0, 1, 2, 3, 0, 4, 0]),
        r"labels\[3\] = 3: with num_classes=3, labels run from 0",
    ),
    ({"num_classes": 3}, torch.tensor([0, 1, -1, 0, 0, 0, 0]), r"labels\[2\] = -1: with num_classes=3"),
    ({"num_classes": 3}, 7, r"labels\[0\] = 7"),
    ({"num_attributes": 2}, CLASSES, r"attributes must be real numbers \[batch, 2\].* got \[7\] of torch.int64"),
    ({"num_attributes": 2}, ATTRIBUTES[:, :1], r"attributes must be real numbers .* got \[7, 1\]"),
    ({"num_attributes": 2}, ATTRIBUTES[:4], r"labels of shape \[4, 2\] do not go with \[7\] data"),
    (
        {"num_attributes": 2},
        ATTRIBUTES.clone().fill_(torch.inf),
        r"attributes\[0, 0\] = inf: attributes must be finite",
    ),
]


@pytest.mark.parametrize(("variant", "y", "match"), WRONG, ids=lambda v: str(v)[:30])
@pytest.mark.parametrize("call", ["model", "guide", "encode", "decode"])
def test_wrong_labels_are_refused(variant, y, match, call):
    cvae = small(**variant)
    with pytest.raises(DataError, match=match), pyro.validation_enabled(True):
        getattr(cvae, call)(torch.randn(7, 5) if call == "decode" else X, y)


@pytest.mark.parametrize("bad", [3, -1, 250])
def test_a_label_that_does_not_exist_is_never_taken_for_another(bad):
    cvae, y = small(num_classes=3), CLASSES.clone()
    y[4] = bad
    with pyro.validation_enabled(False), pytest.raises(DataError, match=rf"data\[4\] = {bad} is outside"):
        pv.log_weights(cvae.model, cvae.guide, X, y, num_particles=2)


def test_fit_checks_every_label_before_it_trains():
    """Also one that no first batch holds."""
    cvae, y = small(num_classes=3), CLASSES.repeat(20)
    y[133] = 5
    before = cvae.encoder.output.weight.clone()
    with pytest.raises(DataError, match=r'data\[133\] = 5 is outside the support of site "y"'):
        pv.fit(cvae.model, cvae.guide, (X.repeat(20, 1, 1, 1), y), objective=pv.ELBO(), epochs=1, batch_size=10)
    assert torch.equal(before, cvae.encoder.output.weight)


def test_data_without_labels_are_refused_by_fit_and_evaluation():
    cvae = small(num_classes=3)
    refused(DataError, "labels missing", pv.fit, cvae.model, cvae.guide, X, objective=pv.ELBO(), epochs=1)
    refused(DataError, "labels missing", pv.log_likelihood, cvae.model, cvae.guide, X, num_samples=2)
    refused(DataError, "labels missing", pv.sample, cvae, 3)


def test_a_label_that_does_not_exist_stops_an_evaluation():
    cvae, y = small(num_classes=3), CLASSES.repeat(3)
    y[20] = 9
    with pytest.raises(DataError, match=r'data\[20\] = 9 is outside the support of site "y"'):
        pv.log_likelihood(cvae.model, cvae.guide, pv.data.Images(X.repeat(3, 1, 1, 1), y), num_samples=2, batch_size=7)
