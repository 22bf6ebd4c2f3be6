"""Chains that are summed out: Pyro's hidden Markov models, mixed ones, and capture and recapture."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal
from pyro.ops.indexing import Vindex
from torch import nn

from tests.programs.registry import Pair, program

PARALLEL = {"enumerate": "parallel"}
STATES, TONES = 4, 3
HMMS = [f"hmm_{number}" for number in range(8)]
PLAIN = {"hmm_0", "hmm_1", "hmm_5", "hmm_7"}  # one chain of states


class Tones(nn.Module):
    """Logits of tones by state and the tones before."""

    def __init__(self):
        super().__init__()
        self.of_state, self.of_tones = nn.Linear(STATES, 8), nn.Linear(2 * TONES, 8)
        self.conv, self.out = nn.Conv1d(1, 2, 3, padding=1), nn.Linear(8, TONES)

    def forward(self, x, y):
        one_hot = y.new_zeros((*x.shape[:-1], STATES)).scatter_(-1, x, 1)
        seen = self.conv(y.reshape(-1, 1, TONES)).relu().reshape(*y.shape[:-1], -1)
        return self.out((self.of_state(one_hot) + self.of_tones(seen)).relu())


def hidden_markov(kind, tones_net, sequences, lengths, batch_size=None, include_prior=True):
    """Tones by a chain (1), on the tones before (2), by two chains (3), the second on the first (4), by a net (5)."""
    size, _, data_dim = sequences.shape
    wide = 2 if kind in (3, 4) else STATES
    sticky = dist.Dirichlet(0.9 * torch.eye(wide) + 0.1)
    with poutine.mask(mask=include_prior):
        if kind in (3, 4):
            probs_w = pyro.sample("probs_w", sticky.to_event(1))
        own = sticky.expand_by([wide]).to_event(2) if kind == 4 else sticky.to_event(1)
        probs_x = pyro.sample("probs_x", own)
        if kind != 5:
            shape = {1: [wide], 2: [wide, 2], 3: [wide, wide], 4: [wide, wide]}[kind] + [data_dim]
            probs_y = pyro.sample("probs_y", dist.Beta(0.1, 0.9).expand(shape).to_event(len(shape)))
    if kind == 5:
        pyro.module("tones", tones_net)
    plate = pyro.plate("tones", data_dim, dim=-1)
    with pyro.plate("sequences", size, batch_size, dim=-2) as batch:
        lengths = lengths[batch]
        w = x = torch.tensor(0)
        y = torch.zeros(data_dim) if kind == 5 else torch.tensor(0)
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                if kind in (3, 4):
                    w = pyro.sample(f"w_{t}", dist.Categorical(probs_w[w]), infer=PARALLEL)
                step = Vindex(probs_x)[w, x] if kind == 4 else probs_x[x]
                x = pyro.sample(f"x_{t}", dist.Categorical(step), infer=PARALLEL)
                with plate if kind != 5 else pyro.plate(f"tones_{t}", data_dim, dim=-1) as tones:
                    if kind == 5:
                        of_tones = dist.Bernoulli(logits=tones_net(x, y))
                    else:
                        probs = {1: (x.squeeze(-1),), 2: (x, y, tones)}.get(kind, (w, x, tones))
                        of_tones = dist.Bernoulli(probs_y[probs])
                    y = pyro.sample(f"y_{t}", of_tones, obs=sequences[batch, t])
                    y = y.long() if kind == 2 else y


def one_by_one(sequences, lengths, batch_size=None, include_prior=True):
    """Model 0: a sequential plate of sequences, each as long as it is."""
    data_dim = sequences.shape[-1]
    with poutine.mask(mask=include_prior):
        probs_x = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(STATES) + 0.1).to_event(1))
        probs_y = pyro.sample("probs_y", dist.Beta(0.1, 0.9).expand([STATES, data_dim]).to_event(2))
    plate = pyro.plate("tones", data_dim, dim=-1)
    for i in pyro.plate("sequences", len(sequences), batch_size):
        x = 0
        for t in pyro.markov(range(int(lengths[i]))):
            x = pyro.sample(f"x_{i}_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
            with plate:
                pyro.sample(f"y_{i}_{t}", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=sequences[i, t])


def second_order(sequences, lengths, batch_size=None):
    """Model 6: two states back, in Raftery's form; no priors."""
    size, _, data_dim = sequences.shape
    rand = partial(torch.rand, STATES, STATES)
    near = pyro.param("probs_x1", rand, constraint=constraints.simplex)
    far = pyro.param("probs_x2", rand, constraint=constraints.simplex)
    share = pyro.param("mix_lambda", torch.tensor(0.5), constraint=constraints.unit_interval)
    probs_x = share * near + (1 - share) * far.unsqueeze(-2)
    probs_y = pyro.param("probs_y", lambda: torch.rand(STATES, data_dim), constraint=constraints.unit_interval)
    plate = pyro.plate("tones", data_dim, dim=-1)
    with pyro.plate("sequences", size, batch_size, dim=-2) as batch:
        lengths = lengths[batch]
        before = now = torch.tensor(0)
        for t in pyro.markov(range(int(lengths.max())), history=2):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                step = Vindex(probs_x)[before, now]
                before, now = now, pyro.sample(f"x_{t}", dist.Categorical(step), infer=PARALLEL)
                with plate:
                    pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[now.squeeze(-1)]), obs=sequences[batch, t])


def fused(tones_net, sequences, lengths, batch_size=None, include_prior=True):
    """Model 7: model 5 as one observed site."""
    pyro.module("tones", tones_net)
    with poutine.mask(mask=include_prior):
        probs_x = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(STATES) + 0.1).to_event(1))
    with pyro.plate("sequences", len(sequences), batch_size, dim=-1) as batch:
        lengths = lengths[batch]
        y = sequences[batch, : int(lengths.max())]
        first = torch.full((STATES,), -math.inf)
        first[0] = 0
        t, x = torch.arange(y.size(1)), torch.arange(STATES)
        net = tones_net(x.unsqueeze(-1), y.unsqueeze(-2))
        of_tones = dist.Bernoulli(logits=net).to_event(1).mask((t < lengths.unsqueeze(-1)).unsqueeze(-1))
        pyro.sample("y", dist.DiscreteHMM(first, probs_x.log().unsqueeze(-3), of_tones), obs=y)


@program(*HMMS)
def hmm(name):
    lengths = torch.tensor([4, 2, 3, 4, 3])
    sequences = (torch.rand(5, 4, TONES) < torch.tensor([0.2, 0.5, 0.8])).float()
    kind = int(name[-1])
    if kind == 0:  # which takes one after the other
        sequences, lengths = sequences[1:3], lengths[1:3]
    special = {0: one_by_one, 6: second_order, 7: partial(fused, Tones())}
    model = special.get(kind) or partial(hidden_markov, kind, Tones() if kind == 5 else None)
    exposed = poutine.block(model, expose_fn=lambda msg: msg["name"].startswith("probs_"))
    guide = AutoDelta(exposed)
    return Pair(model, guide, (sequences, lengths), TraceEnum_ELBO, lr=0.05, density=kind == 6)


# --- seals: chains with effects of groups and of individuals ----------------------------------------------------------


def effect(kind, name, size, groups, width):
    """A random effect on transitions: of one of a few kinds, which are summed over, or a Gaussian one, or none."""
    if kind == "discrete":
        probs = pyro.param(f"probs_{name}", lambda: torch.rand(*groups, size), constraint=constraints.simplex)
        theta = pyro.param(f"theta_{name}", lambda: torch.randn(*groups, size, width))
        return Vindex(theta)[..., pyro.sample(f"e_{name}", dist.Categorical(probs)), :]
    if kind == "continuous":
        loc = torch.zeros(*groups, width)
        return pyro.sample(f"eps_{name}", dist.Normal(loc, 1.0).to_event(1))
    return 0.0


@config_enumerate
def seals(kinds, steps, angles, dives, seen, missing=0.0):
    """States by a chain with random effects; steps, angles and dives by state, with zeros of their own."""
    states, width = 2, 4
    time, individuals, groups = steps.shape[-1], steps.shape[0], steps.shape[1]
    positive = {
        name: pyro.param(name, lambda: torch.rand(states) + 0.5, constraint=constraints.positive)
        for name in ("shape", "rate", "turning", "dive0", "dive1")
    }
    turn = pyro.param("turn", lambda: torch.rand(states))
    zeros = pyro.param("step_zeros", lambda: torch.ones(states, 2))
    with pyro.plate("group", groups, dim=-1):
        gamma = torch.zeros(width) + effect(kinds[0], "g", 3, (), width)
        with pyro.plate("individual", individuals, dim=-2), poutine.mask(mask=seen[..., 0]):
            gamma = gamma + effect(kinds[1], "i", 3, (groups,), width)
            y = torch.tensor(0)
            for t in pyro.markov(range(time)):
                with poutine.mask(mask=seen[..., t]):
                    moves = gamma.reshape((*gamma.shape[:-1], states, states))
                    y = pyro.sample(f"y_{t}", dist.Categorical(logits=Vindex(moves)[..., y, :]))
                    still = steps[..., t] == missing
                    pyro.sample(f"still_{t}", dist.Categorical(logits=Vindex(zeros)[..., y, :]), obs=still.long())
                    of_step = dist.Gamma(Vindex(positive["shape"])[..., y], Vindex(positive["rate"])[..., y])
                    at_zero = dist.Delta(torch.tensor(missing))
                    pyro.sample(f"step_{t}", dist.MaskedMixture(still, of_step, at_zero), obs=steps[..., t])
                    turning = dist.VonMises(Vindex(turn)[..., y], Vindex(positive["turning"])[..., y])
                    pyro.sample(f"angle_{t}", turning, obs=angles[..., t])
                    diving = dist.Beta(Vindex(positive["dive1"])[..., y], Vindex(positive["dive0"])[..., y])
                    pyro.sample(f"dive_{t}", diving, obs=dives[..., t])


def seals_guide(kinds, steps, angles, dives, seen):
    """Gaussians for the effects that are Gaussian."""
    width, individuals, groups = 4, steps.shape[0], steps.shape[1]

    def gaussian(name, shape):
        loc = pyro.param(f"loc_{name}", lambda: torch.zeros(shape))
        scale = pyro.param(f"scale_{name}", lambda: torch.ones(shape), constraint=constraints.positive)
        pyro.sample(f"eps_{name}", dist.Normal(loc, scale).to_event(1))

    with pyro.plate("group", groups, dim=-1):
        if kinds[0] == "continuous":
            gaussian("g", (width,))
        with pyro.plate("individual", individuals, dim=-2), poutine.mask(mask=seen[..., 0]):
            if kinds[1] == "continuous":
                gaussian("i", (groups, width))


EFFECTS = ["none", "discrete", "continuous"]
MIXED = [f"mixed_hmm_{g}_{i}" for g in EFFECTS for i in EFFECTS]


@program(*MIXED)
def mixed_hmm(name):
    kinds = tuple(name.split("_")[2:])
    steps = dist.Gamma(2.0, 1.0).sample((3, 2, 4))
    steps[0, 0, 1] = 0.0
    angles = dist.VonMises(0.0, 1.0).sample((3, 2, 4))
    dives = dist.Beta(2.0, 3.0).sample((3, 2, 4))
    seen = torch.ones(3, 2, 4, dtype=torch.bool)
    seen[2, 1], seen[1, 0, 3] = False, False
    programs = partial(seals, kinds), partial(seals_guide, kinds)
    return Pair(*programs, (steps, angles, dives, seen), TraceEnum_ELBO, lr=0.05)


# --- capture and recapture --------------------------------------------------------------------------------------------


def logit(p):
    return p.log() - (-p).log1p()


def survival(kind, t, sex, shared):
    """The probability to live on to time t, as each variant has it; ``shared`` is what it drew before."""
    if kind == 1:
        return shared["phi"]
    if kind == 4:
        return sex * shared["phi_male"] + (1 - sex) * shared["phi_female"]
    if kind == 2:
        return pyro.sample(f"phi_{t}", dist.Uniform(0.0, 1.0)) if t else 1.0
    if kind == 3:
        level = dist.Normal(logit(shared["phi_mean"]), shared["phi_sigma"])
        return torch.sigmoid(pyro.sample(f"phi_logit_{t}", level) if t else torch.tensor(0.0))
    gamma = pyro.sample(f"phi_gamma_{t}", dist.Normal(0.0, 10.0)) if t else 0.0
    return torch.sigmoid(sex * shared["phi_beta"] + gamma)


def cormack_jolly_seber(kind, captures, sex):
    animals, time = captures.shape
    priors = {
        1: {"phi": dist.Uniform(0.0, 1.0)}, 2: {},
        3: {"phi_mean": dist.Uniform(0.0, 1.0), "phi_sigma": dist.Uniform(0.0, 10.0)},
        4: {"phi_male": dist.Uniform(0.0, 1.0), "phi_female": dist.Uniform(0.0, 1.0)},
        5: {"phi_beta": dist.Normal(0.0, 10.0)},
    }[kind]  # fmt: skip
    shared = {name: pyro.sample(name, prior) for name, prior in priors.items()}
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
    plate = pyro.plate("animals", animals, dim=-1)
    alive, known = torch.ones(animals), torch.zeros(animals, dtype=torch.bool)
    for t in pyro.markov(range(time)):
        phi = survival(kind, t, sex, shared)
        with plate, poutine.mask(mask=known):
            lives_on = known.float() * phi * alive + (1 - known.float())
            alive = pyro.sample(f"z_{t}", dist.Bernoulli(lives_on), infer=PARALLEL)
            pyro.sample(f"y_{t}", dist.Bernoulli(rho * alive), obs=captures[:, t])
        known |= captures[:, t].bool()


@program(*(f"capture_recapture_{number}" for number in range(1, 6)))
def capture_recapture(name):
    captures = (torch.rand(8, 5) < 0.5).float()
    captures[torch.arange(8), torch.arange(8) % 4] = 1.0
    model = partial(cormack_jolly_seber, int(name[-1]))
    exposed = poutine.block(model, expose_fn=lambda msg: msg["name"][:3] in ("phi", "rho"))
    sex = (torch.arange(8) % 2).float()
    return Pair(model, AutoDiagonalNormal(exposed), (captures, sex), TraceEnum_ELBO, lr=0.05)
