"""PCA: scikit-learn's components and density, the dense formulas, the exact posterior, projections, errors."""

import math

import pytest
import torch
from sklearn.decomposition import PCA as Reference
from torch.distributions import MultivariateNormal
from torch.utils.data import DataLoader, TensorDataset

import pyrovae as pv
from pyrovae.data import DataError
from pyrovae.models import PCA

SHAPE, DIM = (1, 2, 4), 8


def correlated(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
    x = torch.randn(number, DIM, generator=generator, dtype=torch.float64) @ mixing + 3
    return x.view(number, *SHAPE)


def fitted(latent_dim=3, number=200):
    pca = PCA(SHAPE, latent_dim).double()
    pca.fit(correlated(number))
    return pca


def reference(latent_dim=3, number=200):
    return Reference(latent_dim, svd_solver="full").fit(correlated(number).flatten(1).numpy())


def covariance(pca):
    return pca.loading @ pca.loading.T + pca.noise_variance * torch.eye(DIM, dtype=torch.float64)


@pytest.mark.parametrize("latent_dim", [1, 3, DIM - 1])
def test_density_is_scikit_learns_and_the_dense_normals(latent_dim):
    pca, x = fitted(latent_dim), correlated(50, seed=1)
    scores = reference(latent_dim).score_samples(x.flatten(1).numpy())
    torch.testing.assert_close(pca.log_prob(x), torch.from_numpy(scores), rtol=1e-9, atol=1e-9)
    dense = MultivariateNormal(pca.mean, covariance(pca)).log_prob(x.flatten(1))
    torch.testing.assert_close(pca.log_prob(x), dense, rtol=1e-9, atol=1e-9)


def test_every_log_weight_is_the_exact_log_prob():
    pca, x = fitted(), correlated(50, seed=1)
    log_w = pv.log_weights(pca.model, pca.guide, x, num_particles=7)
    torch.testing.assert_close(log_w, pca.log_prob(x).expand(7, 50), rtol=1e-9, atol=1e-9)
    estimate = pv.log_likelihood(pca.model, pca.guide, x, num_samples=20, seed=0)
    torch.testing.assert_close(estimate.log_prob, pca.log_prob(x), rtol=1e-9, atol=1e-9)
    assert estimate.std_error.max() < 1e-6
    assert pca.likelihood_is == "exact"


def test_single_precision_keeps_three_decimals():
    pca = PCA(SHAPE, 3)
    pca.fit(correlated(200).float())
    x = correlated(50, seed=1).float()
    torch.testing.assert_close(pca.log_prob(x), fitted().log_prob(x.double()).float(), rtol=0, atol=1e-3)


def test_posterior_is_the_textbooks():
    """N(M^-1 W^T (x - mu), s^2 M^-1) with M = W^T W + s^2 I, which is diagonal."""
    pca, x = fitted(), correlated(50, seed=1)
    w, noise = pca.loading, pca.noise_variance
    m = w.T @ w + noise * torch.eye(3, dtype=torch.float64)
    mean = (x.flatten(1) - pca.mean) @ w @ torch.linalg.inv(m)
    oracle = MultivariateNormal(mean, noise * torch.linalg.inv(m))
    z = torch.randn(50, 3, dtype=torch.float64)
    torch.testing.assert_close(pca.posterior(x).log_prob(z), oracle.log_prob(z))
    torch.testing.assert_close(m, pca.explained_variance.diag())


def test_noise_is_the_mean_variance_of_the_directions_left_out():
    """All of them: with fewer data than entries, those of variance 0 as well."""
    for number in (200, 5):
        eigenvalues = torch.linalg.eigvalsh(torch.cov(correlated(number).flatten(1).T)).flip(0)
        pca = fitted(3, number)
        torch.testing.assert_close(pca.explained_variance, eigenvalues[:3])
        torch.testing.assert_close(pca.noise_variance, eigenvalues[3:].mean())
    assert fitted().noise_variance == pytest.approx(reference().noise_variance_)


def test_no_other_subspace_and_noise_make_the_data_more_likely():
    pca, x = fitted(), correlated(200)
    best = pca.log_prob(x).mean()
    for i in range(3):
        moved = fitted()
        outside = torch.linalg.svd(moved.components)[2][5]
        angle = torch.tensor(0.1).double()
        moved.components[i] = angle.cos() * moved.components[i] + angle.sin() * outside
        assert moved.log_prob(x).mean() < best - 1e-3
    for factor in (0.9, 1.1):
        moved = fitted()
        moved.noise_variance *= factor
        assert moved.log_prob(x).mean() < best - 1e-3


def test_reconstruction_is_the_orthogonal_projection():
    pca, x, oracle = fitted(), correlated(50, seed=1), reference()
    flat = x.flatten(1).numpy()
    projected = torch.from_numpy(oracle.inverse_transform(oracle.transform(flat))).view(x.shape)
    torch.testing.assert_close(pca.reconstruct(x), projected)
    torch.testing.assert_close(pca.reconstruct(projected), projected)
    z = pca.encode(x)
    codes = torch.from_numpy(oracle.transform(flat)) / (pca.explained_variance - pca.noise_variance).sqrt()
    torch.testing.assert_close(z, codes)
    # It explains x best; the posterior's mean is nearer to 0, by the share of the signal in the variance.
    nearby = z + 0.01 * torch.randn(20, 50, 3, dtype=torch.float64)
    assert (pca.likelihood(z).log_prob(x) > pca.likelihood(nearby).log_prob(x)).all()
    share = 1 - pca.noise_variance / pca.explained_variance
    torch.testing.assert_close(pca.posterior(x).mean, share * z)


def test_interpolation_and_traversal_follow_the_components():
    pca, x = fitted(), correlated(2, seed=1)
    between = pca.interpolate(x[:1], x[1:], steps=3)
    ends = pca.reconstruct(x)
    torch.testing.assert_close(between[0], torch.stack([ends[0], ends.mean(0), ends[1]]))
    moved = pca.traverse(x[:1], units=[1], span=2.0, steps=3)
    assert moved.shape == (1, 3, *SHAPE)
    torch.testing.assert_close((moved[0, 2] - moved[0, 0]).flatten(), 4 * pca.loading[:, 1])


def test_directions_without_signal_have_codes_of_zero():
    """Data of one variance in all directions: W is 0, and the code 0 rather than infinite."""
    pca = PCA((4,), 2).double()
    pca.fit(torch.cat([torch.eye(4), -torch.eye(4)]).double())
    assert pca.loading.abs().max() < 1e-6
    assert pca.encode(torch.ones(1, 4).double()).isfinite().all()
    assert pca.log_prob(torch.ones(1, 4).double()).isfinite().all()


def test_generation_has_the_models_moments():
    """40,000 draws: entries of a covariance have standard errors of sqrt(2 / 40000) of their variances at most."""
    pca = fitted()
    x = pv.sample(pca, 40_000, returns="draws", seed=0).flatten(1)
    sigma = covariance(pca)
    deviation = sigma.diagonal().sqrt()
    assert ((torch.cov(x.T) - sigma).abs() < 5 * math.sqrt(2 / 40_000) * deviation.outer(deviation)).all()
    assert ((x.mean(0) - pca.mean).abs() < 5 * deviation / 200).all()
    assert pv.sample(pca, 3).shape == (3, *SHAPE)


def test_history_has_one_row():
    pca = PCA(SHAPE, 3)
    (row,) = pca.fit(correlated(200), device="cpu")
    assert row["epoch"] == 1
    assert row["seconds"] > 0
    assert row["bound"] == pytest.approx(fitted().log_prob(correlated(200)).mean().item())
    assert row["explained_variance_ratio"] == pytest.approx(reference().explained_variance_ratio_.sum())
    assert row["noise_variance"] == pytest.approx(reference().noise_variance_)


def test_whatever_holds_data():
    x, y = correlated(200), torch.arange(200)
    expected = fitted().state_dict()
    for data in (x.numpy(), (x, y), pv.data.Images(x, y), TensorDataset(x), DataLoader(TensorDataset(x, y), 70)):
        pca = PCA(SHAPE, 3).double()
        pca.fit(data)
        for name, tensor in pca.state_dict().items():
            torch.testing.assert_close(tensor, expected[name])


def test_a_dynamic_set_is_drawn_once_by_the_seed():
    grey = pv.data.Images(torch.full((200, *SHAPE), 0.5), binarization="dynamic")
    one, same, other = (PCA(SHAPE, 3) for _ in range(3))
    state = torch.get_rng_state()
    one.fit(grey, seed=1)
    same.fit(grey, seed=1)
    other.fit(grey, seed=2)
    assert torch.equal(one.components, same.components)
    assert not torch.equal(one.components, other.components)
    assert torch.equal(state, torch.get_rng_state())


def test_it_starts_from_nothing():
    pca = PCA(SHAPE, 3)
    assert pca.initialise(correlated(5)) is pca


def test_nothing_works_before_the_fit():
    pca, x = PCA(SHAPE, 3), torch.zeros(2, *SHAPE)
    programs = (pca.model, pca.guide, pca.encode, pca.log_prob, pca.reconstruct)
    for verb in (*programs, lambda _: pca.decode(torch.zeros(2, 3)), lambda _: pv.sample(pca, 2)):
        with pytest.raises(ValueError, match=r"no components yet: call fit\(data\) first"):
            verb(x)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (torch.rand(3, *SHAPE), "3 components need more data than that, got 3: lower latent_dim"),
        (torch.ones(10, *SHAPE), "no variance outside of 3 components"),
        (torch.rand(20, 1, 1, 1) * torch.ones(SHAPE), "no variance outside of 3 components"),
        (torch.rand(4, *SHAPE), "no variance outside of 3 components"),
        (torch.rand(10, DIM), r"input_shape=\(1, 2, 4\), got \(10, 8\)"),
        (torch.full((10, *SHAPE), math.nan), "must be finite"),
        (DataLoader(TensorDataset(torch.full((10, *SHAPE), math.inf))), "must be finite"),
        (DataLoader([]), "no data to fit"),
    ],
)
def test_data_that_have_no_fit(data, match):
    pca = PCA(SHAPE, 3)
    with pytest.raises(DataError, match=match):
        pca.fit(data)
    assert pca.noise_variance.isnan()
