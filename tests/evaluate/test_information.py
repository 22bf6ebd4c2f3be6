"""KL, mutual information and aggregate posteriors of units, against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrovae as pv
from tests.pairs import guide_of, model_of, units

pytestmark = pytest.mark.double(4)

SCALE, SHIFT = 0.4, 1.5


model = model_of(lambda z: dist.Normal(z[..., 0], 1.0), units(3))


def guide(x):
    """A unit that reads x ~ N(0, 1), one that is the prior, and one that is off it but knows nothing."""
    mean = torch.stack([x, 0 * x, 0 * x + SHIFT], -1)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(mean, torch.tensor([SCALE, 1.0, SCALE])).to_event(1))


def test_units_of_a_gaussian_channel():
    x = torch.randn(3000)
    found = pv.information(model, guide, x, num_data=3000)["z"]
    capacity = 0.5 * math.log(1 + 1 / SCALE**2)
    off = 0.5 * (SCALE**2 + SHIFT**2 - 1) - math.log(SCALE)
    error = 5 / len(x) ** 0.5
    assert found.mutual_information[0].item() == pytest.approx(capacity, abs=error)
    assert found.mutual_information[1:].abs().max() < 1e-9
    assert found.kl[2].item() == pytest.approx(off)
    assert found.kl[1].item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(found.aggregate_kl, found.kl - found.mutual_information)
    aggregate = dist.Normal(0.0, (1 + SCALE**2) ** 0.5)
    exact = torch.distributions.kl_divergence(aggregate, dist.Normal(torch.tensor(0.0), 1.0))
    assert found.aggregate_kl[0].item() == pytest.approx(exact.item(), abs=error)


def test_information_is_at_most_log_n():
    sharp = guide_of(lambda x: dist.Normal(torch.stack([x] * 3, -1), 1e-6).to_event(1))

    found = pv.information(model, sharp, torch.randn(50))["z"]
    torch.testing.assert_close(found.mutual_information, torch.full((3,), math.log(50)))


def test_a_site_without_independent_units_counts_as_one():
    def joint(x):
        with pyro.plate("data", len(x)):
            mean = torch.stack([x, x, 0 * x], -1)
            pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=0.3 * torch.eye(3)))

    found = pv.information(model, joint, torch.randn(400))["z"]
    assert found.kl.shape == found.mutual_information.shape == (1,)
    assert 0.5 < found.mutual_information.item() < found.kl.item()


def test_discrete_latents():
    coins = dist.Bernoulli(torch.full((2,), 0.5)).to_event(1)
    bits = model_of(lambda b: dist.Normal(b[..., 0], 1.0), lambda x: coins, site="b")

    def reader(x):
        with pyro.plate("data", len(x)):
            p = torch.stack([(x > 0).to(x.dtype) * 0.9998 + 0.0001, 0 * x + 0.5], -1)
            pyro.sample("b", dist.Bernoulli(p).to_event(1))

    found = pv.information(bits, reader, torch.randn(2000), num_data=2000)["b"]
    assert found.mutual_information[0].item() == pytest.approx(math.log(2), abs=0.01)
    assert found.mutual_information[1].item() == pytest.approx(0, abs=1e-9)


def test_every_layer_of_a_hierarchy_and_data_sets():
    torch.manual_seed(0)
    vae = pv.models.HierarchicalVAE((6,), latent_dims=(3, 2), hidden=((4,), (4,)))
    images = pv.data.Images(torch.rand(40, 6), binarization="dynamic")
    found = pv.information(vae.model, vae.guide, images, num_data=30)
    assert {name: len(i.kl) for name, i in found.items()} == {"z1": 3, "z2": 2}
    again = pv.information(vae.model, vae.guide, images, num_data=30)
    assert torch.equal(found["z1"].mutual_information, again["z1"].mutual_information)


def test_errors():
    with pytest.raises(pv.data.DataError, match="two of them at least"):
        pv.information(model, guide, torch.randn(1))
    with pytest.raises(ValueError, match='guide site "z" is a point mass'):
        pv.information(model, guide_of(lambda x: dist.Delta(torch.stack([x] * 3, -1)).to_event(1)), torch.randn(9))


def test_the_kl_of_a_layer_drawn_before_its_prior_s_parent_is_exact_in_the_mean():
    """z2 ~ N(0, 1), z1 ~ N(z2, .5^2); the guide climbs: z1 ~ N(.4 x, .6^2), z2 ~ N(.7 z1, .8^2)."""
    x = torch.randn(1500)

    def two_layers(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(z2, 0.5))
            pyro.sample("x", dist.Normal(z1, 1.0), obs=x)

    def bottom_up(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(0.4 * x, 0.6))
            pyro.sample("z2", dist.Normal(0.7 * z1, 0.8))

    found = pv.information(two_layers, bottom_up, x, num_data=len(x))
    second = (0.4 * x).square() + 0.6**2  # of z1, given x
    apart = 0.3**2 * second + 0.8**2  # E (z1 - z2)^2
    z1 = math.log(0.5 / 0.6) - 0.5 + apart / (2 * 0.5**2)
    z2 = -math.log(0.8) - 0.5 + 0.5 * (0.7**2 * second + 0.8**2)
    assert found["z1"].kl.item() == pytest.approx(z1.mean().item(), abs=5 * 2.5 / len(x) ** 0.5)
    assert found["z2"].kl.item() == pytest.approx(z2.mean().item(), abs=5 * 0.4 / len(x) ** 0.5)


@pytest.mark.parametrize("how", ["handler", "distribution"])
def test_data_at_which_a_site_is_masked_carry_nothing_and_are_no_part_of_its_aggregate(how):
    x, seen = torch.randn(300), torch.arange(300) % 3 > 0

    def masked(program, fn):
        def run(x):
            kept = torch.arange(len(x)) % 3 > 0
            with pyro.plate("data", len(x)):
                with pyro.poutine.mask(mask=kept if how == "handler" else True):
                    z = pyro.sample("z", fn(x) if how == "handler" else fn(x).mask(kept))
                if program == "model":
                    pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

        return run

    pair = masked("model", lambda x: dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)), masked("guide", reading)
    found = pv.information(*pair, x, num_data=300)["z"]
    q = dist.Normal(reading(x[seen]).base_dist.loc, 0.4)
    torch.testing.assert_close(
        found.kl, torch.distributions.kl_divergence(q, dist.Normal(0.0, 1.0)).mean(0) * seen.float().mean()
    )
    assert 0 < found.mutual_information[0] < seen.float().mean() * math.log(200)
    assert found.mutual_information[1].abs() < 1e-9  # of a constant posterior, however many are masked


def reading(x):
    return dist.Normal(torch.stack([2 * x, 0 * x], -1), 0.4).to_event(1)


def test_data_that_share_a_latent_have_a_kl_each():
    x = torch.linspace(-2.0, 2.0, 6)

    def shared(x):
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(g, 1.0)), 1.0), obs=x)

    def guide(x):
        pyro.sample("g", dist.Normal(0.5, 1e-9))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    found = pv.information(shared, guide, x)
    exact = torch.distributions.kl_divergence(dist.Normal(x / 2, 0.7), dist.Normal(torch.tensor(0.5), 1.0)).mean()
    torch.testing.assert_close(found["z"].kl, exact.double().reshape(1))
    assert list(found) == ["z"]
