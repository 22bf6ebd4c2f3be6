"""Programs of time and of functions: forecasts, aligned sequences, tracks, heavy tails, Gaussian processes."""

import math
from functools import partial

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.forecast import ForecastingModel
from pyro.contrib.mue.models import FactorMuE, ProfileHMM
from pyro.contrib.tracking.assignment import MarginalAssignmentPersistent
from pyro.contrib.tracking.distributions import EKFDistribution
from pyro.contrib.tracking.dynamic_models import NcvContinuous
from pyro.distributions import constraints
from pyro.infer import TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal, init_to_sample
from pyro.infer.reparam import DiscreteCosineReparam, LocScaleReparam, StableReparam
from pyro.nn import PyroSample
from pyro.ops.indexing import Vindex
from pyro.ops.tensor_utils import periodic_cumsum, periodic_repeat
from torch import nn

from tests.programs.registry import Pair, program

# --- forecasts --------------------------------------------------------------------------------------------------------


class Stations(ForecastingModel):
    """Seasons that drift, and noise by a Gaussian hidden Markov model, of two correlated series."""

    def model(self, zero_data, covariates):
        period, (duration, dim) = 4, zero_data.shape[-2:]
        flat = torch.zeros(dim)
        noise_scale = pyro.sample("noise_scale", dist.LogNormal(flat - 3, 1.0).to_event(1))
        timescale = pyro.sample("trans_timescale", dist.LogNormal(flat, 1).to_event(1))
        loc = pyro.sample("trans_loc", dist.Cauchy(0, 1 / period)).unsqueeze(-1)
        loc = loc.expand((*loc.shape[:-1], dim))
        scale, corr = {}, {}
        for name in ("trans", "obs"):
            scale[name] = pyro.sample(f"{name}_scale", dist.LogNormal(flat, 0.1).to_event(1))
            corr[name] = pyro.sample(f"{name}_corr", dist.LKJCholesky(dim, torch.ones(())))
        tril = {name: scale[name].unsqueeze(-1) * corr[name] for name in scale}
        with pyro.plate("season_plate", period, dim=-1):
            season = pyro.sample("season_init", dist.Normal(flat, 1).to_event(1))
        with self.time_plate:
            drift = pyro.sample("season_noise", dist.Normal(0, noise_scale).to_event(1))
        prediction = periodic_repeat(season, duration, dim=-2) + periodic_cumsum(drift, period, dim=-2)
        noise = dist.GaussianHMM(
            dist.Normal(flat, 100).to_event(1), timescale.neg().exp().diag_embed(),
            dist.MultivariateNormal(loc, scale_tril=tril["trans"]), torch.eye(dim),
            dist.MultivariateNormal(flat, scale_tril=tril["obs"]), duration=duration,
        )  # fmt: skip
        self.predict(noise, prediction)


class LocalLevel(ForecastingModel):
    """A random walk and a regression, with heavy tails."""

    def model(self, zero_data, covariates):
        weight = pyro.sample("weight", dist.Normal(0, 1).expand([covariates.size(-1)]).to_event(1))
        scale = pyro.sample("drift_scale", dist.LogNormal(-2, 1))
        with self.time_plate, poutine.reparam(config={"drift": LocScaleReparam()}):
            drift = pyro.sample("drift", dist.Normal(torch.zeros(()), scale))
        level = drift.cumsum(-1) + (weight.unsqueeze(-2) * covariates).sum(-1)
        nu = pyro.sample("nu", dist.Gamma(10, 2))
        spread = pyro.sample("sigma", dist.LogNormal(-1, 1))
        tails = dist.StudentT(nu.unsqueeze(-1), 0, spread.unsqueeze(-1))
        self.predict(tails, level.unsqueeze(-1))


@program("forecast", "forecast_local_level")
def forecast(name):
    time = torch.arange(8.0)
    if name == "forecast":
        model, series, covariates = Stations(), 2, torch.zeros(8, 0)
        data = torch.stack([(time * math.pi / 2).sin(), (time * math.pi / 2).cos()], -1) + 0.1 * torch.randn(8, series)
    else:
        model, covariates = LocalLevel(), torch.stack([time / 8, torch.ones(8)], -1)
        data = (0.3 * torch.randn(8).cumsum(0) + time / 8).unsqueeze(-1)
    return Pair(model, AutoNormal(model, init_scale=0.1, init_loc_fn=init_to_sample), (data, covariates))


# --- aligned sequences ------------------------------------------------------------------------------------------------


@program("mue_profile", "mue_factor", "mue_factor_ard")
def mue(name):
    letters = torch.nn.functional.one_hot(torch.randint(3, (3, 4)), 3).float()
    letters[0, 3] = 0.0  # a shorter one
    if name == "mue_profile":
        own = ProfileHMM(latent_seq_length=3, alphabet_length=3, prior_scale=1.0, indel_prior_bias=5.0)
        return Pair(own.model, own.guide, (letters, torch.tensor(1.0)))
    own = FactorMuE(4, 3, 2, latent_seq_length=3, ARD_prior=name.endswith("ard"), indel_factor_dependence=False)
    return Pair(own.model, own.guide, (letters, torch.tensor(1.0), torch.tensor(1.0)))


# --- tracks -----------------------------------------------------------------------------------------------------------


def kalman(start, motion, frames, data):
    spread = pyro.sample("pv_cov", dist.HalfCauchy(2e-2)) * torch.eye(4)
    noise = pyro.sample("measurement_cov", dist.HalfCauchy(1e-2)) * torch.eye(2)
    pyro.sample("track", EKFDistribution(start, spread, motion, noise, time_steps=frames), obs=data)


@program()
def ekf():
    motion, frames, start = NcvContinuous(4, 2.0), 4, torch.tensor([0.0, 0.0, 1.0, 0.0])
    data = torch.stack([torch.arange(4.0), torch.zeros(4)], -1) + 0.1 * torch.randn(4, 2)
    model = partial(kalman, start, motion, frames)
    return Pair(model, AutoDelta(model), (data,), density=False)


OBJECTS, FRAMES, EXPECTED, SPURIOUS, NOISE = 3, 3, 2.0, 1.0, 0.2


def dynamics():
    time = torch.arange(float(FRAMES)) / 4
    return torch.stack([time.cos(), time.sin()], -1)


def tracks(observations):
    """Objects that may exist, seen by detections that may be spurious."""
    with pyro.plate("objects", OBJECTS):
        exists = pyro.sample("exists", dist.Bernoulli(EXPECTED / OBJECTS))
        with poutine.mask(mask=exists.bool()):
            states = pyro.sample("states", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            positions = dynamics() @ states.transpose(-1, -2)
    with pyro.plate("detections", observations.shape[1]), pyro.plate("time", FRAMES):
        seen = observations[..., -1] > 0
        with poutine.mask(mask=seen):
            assign = pyro.sample("assign", dist.Categorical(torch.ones(OBJECTS + 1)))
        spurious = assign == OBJECTS
        real = seen & ~spurious
        number = seen.float().sum(-1, True)
        pyro.sample("is_real", dist.Bernoulli(EXPECTED / number.clamp(min=EXPECTED)), obs=real.float())
        pyro.sample("is_spurious", dist.Bernoulli(SPURIOUS / number.clamp(min=SPURIOUS)), obs=spurious.float())
        where = observations[..., 0]
        with poutine.mask(mask=real):
            places = torch.cat([positions, positions.new_zeros(*positions.shape[:-1], 1)], -1)
            predicted = Vindex(places)[..., torch.arange(FRAMES).unsqueeze(-1), assign]
            pyro.sample("real_observations", dist.Normal(predicted, NOISE), obs=where)
        with poutine.mask(mask=spurious):
            pyro.sample("spurious_observations", dist.Normal(0.0, 1.0), obs=where)


def tracks_guide(marked, observations):
    """A soft assignment, of which both parts are marked for enumeration."""
    infer = {"enumerate": "parallel"} if marked else {}
    loc = pyro.param("states_loc", lambda: torch.randn(OBJECTS, 2))
    scale = pyro.param("states_scale", lambda: NOISE * torch.ones(OBJECTS, 2), constraint=constraints.positive)
    positions, seen, where = dynamics() @ loc.t(), observations[..., -1] > 0, observations[..., 0].unsqueeze(-1)
    real, odd = dist.Normal(positions.unsqueeze(-2), NOISE), dist.Normal(0.0, 1.0)
    logits = real.log_prob(where) - odd.log_prob(where) + math.log(EXPECTED * 0.8 / SPURIOUS)
    logits = logits.masked_fill(~seen.unsqueeze(-1), -math.inf)
    assignment = MarginalAssignmentPersistent(torch.full((OBJECTS,), math.log(OBJECTS / EXPECTED)), logits, 5)
    with pyro.plate("objects", OBJECTS):
        exists = pyro.sample("exists", assignment.exists_dist, infer=infer)
        with poutine.mask(mask=exists.bool()):
            pyro.sample("states", dist.Normal(loc, scale).to_event(1))
    with pyro.plate("detections", observations.shape[1]), poutine.mask(mask=seen), pyro.plate("time", FRAMES):
        pyro.sample("assign", assignment.assign_dist, infer=infer)


@program("tracking_1d", "tracking_1d_drawn")
def tracking(name):
    observations = torch.stack([torch.randn(FRAMES, 3), torch.ones(FRAMES, 3)], -1)
    observations[1, 2] = 0.0
    marked = name == "tracking_1d"
    return Pair(tracks, partial(tracks_guide, marked), (observations,), TraceEnum_ELBO)


# --- heavy tails ------------------------------------------------------------------------------------------------------


def volatility(data):
    """Returns of varying volatility with stable tails."""
    h_0 = pyro.sample("h_0", dist.Normal(0, 1)).unsqueeze(-1)
    sigma = pyro.sample("sigma", dist.LogNormal(0, 1)).unsqueeze(-1)
    v = pyro.sample("v", dist.Normal(0, 1).expand(data.shape).to_event(1))
    log_h = pyro.deterministic("log_h", h_0 + sigma * v.cumsum(dim=-1))
    root = log_h.mul(0.5).exp().clamp(min=1e-8, max=1e8)
    loc = pyro.sample("r_loc", dist.Normal(0, 1e-2)).unsqueeze(-1)
    skew = pyro.sample("r_skew", dist.Uniform(-1, 1)).unsqueeze(-1)
    stability = pyro.sample("r_stability", dist.Uniform(0, 2)).unsqueeze(-1)
    pyro.sample("r", dist.Stable(stability, skew, root, loc * root).to_event(1), obs=data)


def volatility_by_density(data):
    """The same, its density by an integral."""
    return poutine.reparam(volatility, {"v": DiscreteCosineReparam()})(data)


@program("stable", "stable_with_log_prob")
def stable(name):
    data = dist.StudentT(3.0).sample((6,))
    if name == "stable":
        model = poutine.reparam(volatility, {"v": DiscreteCosineReparam(), "r": StableReparam()})
    else:

        def smooth(data):
            h = pyro.sample("h", dist.Normal(0, 1))
            stability = pyro.sample("r_stability", dist.Uniform(0, 2))
            with pyro.plate("time", len(data)):
                law = dist.StableWithLogProb(stability, torch.tensor(0.0), (0.5 * h).exp(), torch.tensor(0.0))
                pyro.sample("r", law, obs=data)

        model = smooth
    return Pair(model, AutoDiagonalNormal(model), (data,), lr=0.01)


# --- Gaussian processes -----------------------------------------------------------------------------------------------


class Features(nn.Module):
    """A small convolution for a deep kernel."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 2, 3), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.conv(x).relu().flatten(1))


@program("sv_dkl", "sv_dkl_binary", "gplvm")
def processes(name):
    if name == "gplvm":
        start = torch.zeros(8, 2)
        start[:, 0] = torch.linspace(0, 1, 8)
        y = torch.stack([start[:, 0].sin(), start[:, 0].cos(), 2 * start[:, 0]]) + 0.05 * torch.randn(3, 8)
        kernel = gp.kernels.RBF(input_dim=2, lengthscale=torch.ones(2))
        own = gp.models.SparseGPRegression(
            start.clone(), y, kernel, start[::2].clone(), noise=torch.tensor(0.1), jitter=1e-4
        )
        own.X = PyroSample(dist.Normal(start, 0.1).to_event())
        own.autoguide("X", dist.Normal)
        return Pair(own.model, own.guide, (), TraceMeanField_ELBO)
    x, labels = torch.randn(6, 1, 4, 4), torch.arange(6) % 3
    binary = name.endswith("binary")
    kernel = gp.kernels.Warping(gp.kernels.RBF(input_dim=2, lengthscale=torch.ones(2)), iwarping_fn=Features())
    likelihood = gp.likelihoods.Binary() if binary else gp.likelihoods.MultiClass(num_classes=3)
    shape = torch.Size([]) if binary else torch.Size([3])
    own = gp.models.VariationalSparseGP(
        X=x, y=(labels % 2).float() if binary else labels, kernel=kernel, Xu=x[:3].clone(), likelihood=likelihood,
        latent_shape=shape, num_data=6, whiten=True, jitter=1e-4,
    )  # fmt: skip
    return Pair(own.model, own.guide, (), TraceMeanField_ELBO)
