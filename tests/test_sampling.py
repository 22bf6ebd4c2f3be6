"""Generation from plain functions and from the zoo. The laws compare moments with exact ones at a false-alarm rate of
1e-6 each (|z| < 4.9), seeded."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.distributions import AffineTransform

from pyrovae.data import Images
from pyrovae.engine.generate import tempered
from pyrovae.models import VAE
from pyrovae.sampling import sample
from tests.pairs import guide_of, model_of

Z_LIMIT = 4.9  # of a two-sided test with a false-alarm rate of 1e-6
W = torch.tensor([[1.0, -2.0], [0.5, 0.0], [0.0, 1.5]])
B = torch.tensor([0.3, -1.0, 2.0])
NOISE = 0.4


def linear(x):
    """x = W z + b + noise: mean b, covariance W W' + noise^2."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.T + B, NOISE).to_event(1), obs=x)


def check_moments(x, mean, covariance):
    """Mean (standard error sqrt(C_ii / n)) and covariance (sqrt((C_ii C_jj + C_ij^2) / n)) of normal ``x``."""
    n, variance = len(x), covariance.diagonal()
    z = (x.mean(0) - mean) / (variance / n).sqrt()
    assert z.abs().max() < Z_LIMIT
    error = ((variance[:, None] * variance + covariance**2) / n).sqrt()
    assert ((x.T.cov() - covariance).abs() / error).max() < Z_LIMIT


def test_draws_have_the_model_s_moments():
    x = sample(linear, 20_000, like=torch.zeros(1, 3), returns="draws", seed=0)
    assert x.shape == (20_000, 3)
    check_moments(x, B, W @ W.T + NOISE**2 * torch.eye(3))


def test_means_leave_the_pixel_noise_out():
    x = sample(linear, 20_000, like=torch.zeros(1, 3), seed=0)
    check_moments(x, B, W @ W.T)


def test_linear_vae_has_its_exact_moments():
    torch.manual_seed(0)
    vae = VAE((3,), latent_dim=2, hidden=(), likelihood="gaussian", scale=0.5)
    x = sample(vae, 20_000, returns="draws", seed=1)
    w = vae.decoder.output.weight.detach()
    check_moments(x, vae.decoder.output_bias.detach(), w @ w.T + 0.25 * torch.eye(3))


@pytest.mark.parametrize("returns", ["means", "draws"])
def test_pair_method_and_module_are_one_model(returns):
    vae = VAE((1, 4, 4), latent_dim=3, hidden=(8,))

    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vae

        def forward(self, x):
            return self.inner.model(x)

    x = sample(vae, 5, returns=returns, seed=3)
    assert x.shape == (5, 1, 4, 4)
    assert not x.requires_grad
    assert torch.equal(x, sample(vae.model, 5, returns=returns, seed=3))
    assert torch.equal(x, sample(Program(), 5, returns=returns, seed=3, like=torch.zeros(9, 1, 4, 4)))
    assert (set(x.unique().tolist()) <= {0.0, 1.0}) == (returns == "draws")


def test_no_seed_is_the_global_generators():
    vae = VAE((4,), latent_dim=2, hidden=(3,))
    torch.manual_seed(0)
    one, two = sample(vae, 4), sample(vae, 4)
    assert not torch.equal(one, two)
    torch.manual_seed(0)
    assert torch.equal(one, sample(vae, 4))


def test_modules_run_in_eval_mode_and_get_their_mode_back():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.dropout, self.frozen = nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Dropout(0.5).eval()

        def forward(self, z):
            assert not any(module.training for module in self.modules())
            return self.frozen(self.dropout(self.norm(z)))

    net = Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}

    def model(x):  # a plain function: its network is found when it is called
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    sample(model, 5, like=torch.zeros(1, 2))
    assert [m.training for m in (net, net.norm, net.dropout, net.frozen)] == [True, True, True, False]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with pytest.raises(ValueError, match="no site"):
        sample(model, 5, like=torch.zeros(1, 2), site="y")
    assert net.training


def test_the_parameter_store_is_untouched():
    pyro.clear_param_store()
    sample(VAE((4,), latent_dim=2, hidden=()), 3)
    assert not len(pyro.get_param_store())
    pyro.param("loc", torch.tensor(3.0))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc"), 1.0), obs=x)

    assert torch.equal(sample(model, 2, like=torch.zeros(1)), torch.full((2,), 3.0))
    assert list(pyro.get_param_store().keys()) == ["loc"]
    assert pyro.param("loc").item() == 3.0
    pyro.clear_param_store()


@pytest.mark.parametrize("subsample_size", [1, 4, 10])
def test_subsampled_plates_run_until_there_are_n(subsample_size):
    def model(x):
        with pyro.plate("data", len(x), subsample_size=subsample_size) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    x = sample(model, 10, like=torch.zeros(1), returns="draws", seed=0)
    assert x.shape == (10,)
    assert len(x.unique()) == 10


def test_the_full_size_of_a_plate_does_not_matter():
    def plated(size):
        def model(x):
            with pyro.plate("data", size or len(x), subsample=torch.arange(len(x)) if size else None):
                pyro.sample("x", dist.Normal(torch.arange(3.0), 1.0).to_event(1), obs=x)

        return model

    whole, part = (sample(plated(size), 7, like=torch.zeros(1, 3), returns="draws", seed=0) for size in (None, 60_000))
    assert torch.equal(part, whole)
    assert len(part.unique()) == 21


def labelled(x, y):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.ones(3)), obs=y)
        pyro.sample("x", dist.Normal(10.0 * y, 0.1), obs=x.clone())


def test_labels_stay_as_given():
    y = torch.tensor([2, 0, 1])
    x = sample(labelled, 3, y, like=torch.zeros(1), site="x", returns="draws", seed=0)
    assert (x - 10.0 * y).abs().max() < 1
    latent = sample(labelled, 30, None, like=torch.zeros(1), seed=0) / 10  # x alone is observed now
    assert set(latent.tolist()) == {0.0, 1.0, 2.0}
    assert sample(labelled, 30, None, like=torch.zeros(1), site="y", returns="draws").dtype == torch.int64


def test_conditioned_latents_stay_as_given():
    vae = VAE((4,), latent_dim=2, hidden=())
    z = torch.randn(3, 2)
    given = poutine.condition(vae.model, {"z": z})
    torch.testing.assert_close(sample(given, 3, like=torch.zeros(1, 4)), vae.decode(z).detach())


def test_factors_and_deterministic_sites_are_no_data():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("f", -z.square())
            pyro.deterministic("double", 2 * z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.clone())

    assert sample(model, 4, like=torch.zeros(1)).shape == (4,)


def test_dtype_and_like():
    assert sample(VAE((4,), latent_dim=2, hidden=()).double(), 2).dtype == torch.float64
    for like in (torch.zeros(5, 3), Images(torch.zeros(5, 3)), Images(torch.zeros(5, 3), torch.arange(5))):
        assert sample(linear, 2, like=like).shape == (2, 3)
    loader = torch.utils.data.DataLoader(Images(torch.zeros(5, 3)), batch_size=2)
    assert sample(linear, 2, like=loader).shape == (2, 3)


nothing = guide_of(lambda x: dist.Normal(0.0, 1.0))


def several(x):
    with pyro.plate("data", len(x)):
        pyro.sample("a", dist.Normal(0.0, 1.0), obs=x[:, 0])
        pyro.sample("b", dist.Normal(0.0, 1.0), obs=x[:, 1])


def copies(x):
    several(x + 0)


def far(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0), obs=x[:, 0])
        pyro.sample("b", dist.Cauchy(a, 1.0), obs=x[:, 1])


def heavy(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Cauchy(0.0, 1.0), obs=x)


def bare(x):
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=x.sum())


student = model_of(
    lambda z: dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, 3]).to_event(1),
    lambda x: dist.StudentT(5.0, 0.0, 1.0),
)


@pytest.mark.parametrize(
    ("model", "n", "options", "match"),
    [
        (linear, 2, {"like": None}, "pass like="),
        (linear, 2, {"like": torch.tensor(1.0)}, "without dimensions"),
        (linear, 2, {"site": "y"}, 'no site "y", but "z", "x"'),
        (nothing, 2, {}, "observes nothing"),
        (copies, 2, {}, 'several sites, "a", "b", that are no parts of x: name the one'),
        (far, 2, {}, '"a", "b" have no finite means, or not all: ask for returns="draws"'),
        (several, 2, {"site": ("a", "c")}, 'no site "c", but "a", "b"'),
        (heavy, 2, {}, 'site "x" is a Cauchy, which has no finite mean: ask for returns="draws"'),
        (bare, 2, {}, "no row for each datum"),
        (linear, 2, {"temperature": 0}, "temperature must be above 0"),
        (student, 2, {"temperature": 0.5}, 'site "z" is a StudentT, which has no temperature'),
    ],
)
def test_errors_name_the_rule_and_the_fix(model, n, options, match):
    with pytest.raises(ValueError, match=match):
        sample(model, n, **{"like": torch.zeros(1, 3), **options})


def test_one_of_several_sites():
    a, b = (sample(several, 4, like=torch.zeros(1, 2), site=site, returns="draws", seed=0) for site in "ab")
    torch.manual_seed(0)
    assert torch.equal(a, torch.randn(4))
    assert torch.equal(b, torch.randn(4))


def test_several_sites_named_are_drawn_jointly():
    """The second, too, though it observes what is no part of x."""

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)
            pyro.sample("y", dist.Normal(-z, 0.5), obs=y)

    blank = torch.zeros(20_000)
    drawn = sample(model, 20_000, blank, like=torch.zeros(1), site=["x", "y"], returns="draws", seed=0)
    assert list(drawn) == ["x", "y"]
    check_moments(torch.stack([*drawn.values()], -1), torch.zeros(2), torch.tensor([[1.25, -1.0], [-1.0, 1.25]]))
    assert not blank.any()
    means = sample(model, 9, blank[:9], like=torch.zeros(1), site=("x", "y"), seed=0)
    assert torch.equal(means["x"], -means["y"])


def test_columns_are_drawn_jointly_as_the_model_takes_them():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("first", dist.Normal(z @ W[:2].T + B[:2], NOISE).to_event(1), obs=x[:, :2])
            pyro.sample("last", dist.Normal(z @ W[2] + B[2], NOISE), obs=x[:, 2])

    draws, means = (sample(model, 20_000, like=torch.zeros(1, 4), returns=how, seed=0) for how in ("draws", "means"))
    check_moments(draws[:, :3], B, W @ W.T + NOISE**2 * torch.eye(3))
    check_moments(means[:, :3], B, W @ W.T)
    assert not draws[:, 3].any()  # which no site observes


DECAY, MOVE = 0.9, 0.3


def autoregressive(x, lengths=None):
    """Each step hangs on the last, which the program reads in x; beyond a length there is none."""
    with pyro.plate("data", len(x)):
        for t in pyro.markov(range(x.shape[1])):
            before = DECAY * x[:, t - 1] if t else x.new_zeros(len(x), 1)
            with pyro.poutine.mask(mask=True if lengths is None else t < lengths):
                pyro.sample(f"x_{t}", dist.Normal(before, MOVE).to_event(1), obs=x[:, t])


def test_a_sequence_is_drawn_step_by_step():
    x = sample(autoregressive, 20_000, like=torch.zeros(1, 3, 1), returns="draws", seed=0)
    variance = [MOVE**2 * sum(DECAY ** (2 * i) for i in range(t + 1)) for t in range(3)]
    covariance = torch.tensor([[DECAY ** abs(s - t) * variance[min(s, t)] for t in range(3)] for s in range(3)])
    check_moments(x.squeeze(-1), torch.zeros(3), covariance)


@pytest.mark.parametrize("returns", ["means", "draws"])
def test_beyond_its_length_a_sequence_is_blank(returns):
    lengths = torch.tensor([1, 3, 2, 0])
    x = sample(autoregressive, 4, lengths, like=torch.zeros(1, 3, 1), returns=returns, seed=0)
    first = 1 if returns == "means" else 0  # whose mean is 0
    assert torch.equal((x != 0).squeeze(-1), (torch.arange(3) < lengths[:, None]) & (torch.arange(3) >= first))


def test_temperature_scales_the_latents_and_nothing_else():
    x = sample(linear, 20_000, like=torch.zeros(1, 3), returns="draws", temperature=0.5, seed=0)
    check_moments(x, B, 0.25 * W @ W.T + NOISE**2 * torch.eye(3))


ONES = torch.ones(2)
MIXTURE = dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(2)), dist.Normal(torch.tensor([-50.0, 50.0]), 1.0))


@pytest.mark.parametrize(
    ("fn", "spread"),
    [
        (dist.Normal(0 * ONES, 2 * ONES).to_event(1), 1.0),
        (dist.MultivariateNormal(0 * ONES, scale_tril=2 * torch.eye(2)), 1.0),
        (dist.Normal(0 * ONES, 2 * ONES).to_event(1).mask(False), 1.0),
        (dist.TransformedDistribution(dist.Normal(0 * ONES, ONES), [AffineTransform(0.0, 2.0)]).to_event(1), 1.0),
        (MIXTURE, 0.5),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_temperature_of_every_kind_of_normal(fn, spread):
    z = tempered(fn, 0.5, "z").expand((40_000,)).sample()
    z = torch.where(z < -25, z + 50, torch.where(z > 25, z - 50, z)).flatten()
    assert abs(z.std() / spread - 1) < Z_LIMIT / (2 * z.numel()) ** 0.5


@pytest.mark.parametrize("family", [dist.Bernoulli, dist.Categorical, dist.OneHotCategorical])
def test_temperature_divides_logits(family):
    fn = tempered(family(logits=torch.tensor([0.5, -1.0])), 0.25, "c")
    torch.testing.assert_close(fn.probs, family(logits=torch.tensor([2.0, -4.0])).probs)
