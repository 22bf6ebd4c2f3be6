"""Active units: the variance over data of each unit's posterior mean, whatever the guide is made of."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyrovae as pv
from pyrovae.errors import DataError
from tests.pairs import guide_of, model_of
from tests.training import Rows

pytestmark = pytest.mark.seed(5)

GAINS = torch.tensor([2.0, 0.0, 0.05, 0.5])
X = torch.randn(400, generator=torch.Generator().manual_seed(0))
EXPECTED = GAINS.square().double() * X.double().var()


def linear(x, *labels):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(GAINS * x.unsqueeze(-1) + 3, 0.7).to_event(1))


SOURCES = {
    "tensor": X,
    "tuple": (X, torch.arange(400)),
    "TensorDataset": TensorDataset(X),
    "Dataset": Rows(X),
    "DataLoader": DataLoader(Rows(X), batch_size=37),
    "Images": pv.data.Images(X),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("batch_size", [7, 500])
def test_a_linear_guide_is_known_exactly(source, batch_size):
    units = pv.active_units(linear, SOURCES[source], batch_size=batch_size)["z"]
    torch.testing.assert_close(units.variances, EXPECTED, rtol=1e-4, atol=1e-6)
    assert units.count == 2


def test_what_is_not_as_long_as_the_data_is_passed_whole():
    def guide(x, gains, shift=3.0):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(gains * x.unsqueeze(-1) + shift, 0.7).to_event(1))

    for batch_size in (7, None):
        units = pv.active_units(guide, (X, GAINS), batch_size=batch_size)["z"]
        torch.testing.assert_close(units.variances, EXPECTED, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("threshold", "count"), [(0.0, 3), (0.001, 3), (0.01, 2), (1.0, 1), (100.0, 0)])
def test_the_threshold_is_on_the_variance(threshold, count):
    assert pv.active_units(linear, X, threshold)["z"].count == count


@pytest.mark.parametrize("data", [X[:1], DataLoader(TensorDataset(X[:1]))])
def test_one_datum_has_no_variance(data):
    with pytest.raises(DataError, match="at least, got 1"):
        pv.active_units(linear, data)


def test_deeper_sites_use_their_own_mean_given_one_draw():
    def guide(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Normal(3 * x, 0.5))
            pyro.sample("top", dist.Normal(torch.stack([h, 0 * h], -1), 9.0).to_event(1))

    units = pv.active_units(guide, X)
    assert units["h"].variances.shape == ()
    assert units["h"].count == units["top"].count == 1
    # Var of h over data and draws: 9 var(x) + .25; its estimate has relative SE sqrt(2 / 400) = .07, 4.9 of them.
    assert units["top"].variances[0] == pytest.approx(9 * X.var().item() + 0.25, rel=0.35)


@pytest.mark.parametrize("samples", [2, 50])
def test_the_noise_of_the_parents_is_averaged_out(samples):
    """Without bias, whatever the number of draws; a unit that hangs on nothing but noise is inactive."""

    def guide(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Normal(3 * x, 2.0))
            noise = pyro.sample("noise", dist.Normal(0 * x, 2.0))
            pyro.sample("top", dist.Normal(torch.stack([h, noise], -1), 9.0).to_event(1))

    found = pv.active_units(guide, X, samples=samples)
    data = 9 * X.double().var()
    torch.testing.assert_close(found["h"].variances, data, rtol=1e-5, atol=0)
    # Noise of variance v = 4 / samples in each mean: the variance's has SE sqrt((4 data v + 2 v^2) / 400) in the first
    # unit, sqrt(2 / 400) v in the second; five of them, plus what subtracting its estimate costs.
    v = 4 / samples
    error = 5 * ((4 * data.item() * v + 4 * v**2) / 400) ** 0.5
    assert found["top"].variances[0].item() == pytest.approx(data.item(), abs=error)
    assert abs(found["top"].variances[1].item()) < 5 * v * (4 / 400) ** 0.5
    one = pv.active_units(guide, X)["top"]
    assert one.count == 2
    assert one.variances[1].item() == pytest.approx(4, rel=5 * (2 / 400) ** 0.5)


@pytest.mark.parametrize("samples", [1, 2])
def test_draws_of_a_site_without_a_mean_are_corrected_as_well(samples):
    def guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.stack([3 * x, 0 * x], -1), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, dist.transforms.AffineTransform(1.0, 2.0)))

    # The mean of 64 draws of variance 4 has variance 1/16, more than the threshold; 5 SEs of it may be left.
    variances = pv.active_units(guide, X, samples=samples)["z"].variances
    assert abs(variances[1].item()) < 5 * 4 / 64 * (2 / 400) ** 0.5


def test_a_second_plate_does_not_stand_in_for_the_data():
    def guide(x):
        with pyro.plate("units", 4, dim=-2), pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(GAINS.unsqueeze(-1) * x, 1.0))

    units = pv.active_units(guide, X, batch_size=150)["z"]
    torch.testing.assert_close(units.variances, EXPECTED, rtol=1e-4, atol=1e-6)


def test_a_distribution_without_a_mean_is_averaged_over_draws():
    def guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.stack([3 * x, 0 * x], -1), 0.1).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, dist.transforms.AffineTransform(1.0, 2.0)))

    units = pv.active_units(guide, X)["z"]
    assert units.count == 1
    # The mean of 64 draws adds .04 / 64, which is taken off again, but for 5 SEs of .04 / 64 * sqrt(2 / 400).
    assert units.variances[1].item() == pytest.approx(0, abs=0.04 / 64 * 0.36)


def test_autoguides_are_seen_through_and_their_auxiliary_sites_left_out():
    model = model_of(lambda z: dist.Normal(z, 1.0), lambda x: dist.LogNormal(torch.zeros(len(x)), 1.0))

    guide = autoguide.AutoNormal(model)
    guide(X)
    with torch.no_grad():
        guide.locs.z.copy_(X)
        guide.scales.z = torch.full((400,), 0.01)
    units = pv.active_units(guide, X, batch_size=400)
    assert list(units) == ["z"]
    assert units["z"].variances.item() == pytest.approx(X.exp().var().item(), rel=1e-2)


def test_global_latents_are_no_units_of_the_data():
    def guide(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("components", 3):
            pyro.sample("centre", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x))

    assert list(pv.active_units(guide, X)) == ["z"]


def test_networks_run_in_eval_mode():
    """What they leave behind is in test_traces.py."""
    net = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Dropout(0.9))
    guide = guide_of(lambda x: dist.Normal(net(x.unsqueeze(-1)), 1.0).to_event(1))
    first = pv.active_units(guide, X, batch_size=399)["z"].variances  # the last batch is one datum
    weight = net[0].weight.detach().double().flatten()
    torch.testing.assert_close(first, weight.square() * X.double().var() / (1 + 1e-5), rtol=1e-4, atol=1e-7)


def test_the_ratio_of_a_point_mass_is_measured():
    x = torch.tensor([0.4, 1.9])

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    found = pv.gradient_snr(pv.ELBO(), model, autoguide.AutoDelta(model), x, repetitions=3)
    assert math.isnan(found.model)
    assert math.isnan(found.guide)  # there is no noise in it
