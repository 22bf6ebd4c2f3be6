"""Pairs whose every answer is known: small plain Pyro programs with their exact log p(x).

A pair is two functions of (parameters, data), bound to their parameters by :meth:`Pair.programs`. Every parameter is a
0-d number; a program works elementwise over its data plate, so parameters may as well be ``[B]``, one value per datum:
that is how one call yields B independent gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

Params = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Pair:
    """A solvable pair. ``latents`` says how each guide site is integrated: its event size (normal) or its states.

    A model that enumerates sites has another, ``collapsed``, which has the same p(x, z) in closed form.
    """

    name: str
    model: Callable[..., None]
    guide: Callable[..., None]
    theta: dict[str, float]
    phi: dict[str, float]
    data: Tensor
    latents: dict[str, int | Tensor]
    exact_log_px: Callable[[Params, Tensor], Tensor]
    posterior: bool = False
    collapsed: Callable[..., None] | None = None

    @property
    def reparameterised(self) -> bool:
        return all(isinstance(how, int) for how in self.latents.values())

    def params(self, size: int | None = None, *, grad: bool = False) -> Params:
        """Fresh parameters, 0-d, or one copy per datum."""
        values = {name: torch.tensor(v) for name, v in (self.theta | self.phi).items()}
        expanded = {n: v if size is None else v.expand(size).clone() for n, v in values.items()}
        return {n: v.requires_grad_(grad) for n, v in expanded.items()}

    def programs(self, params: Params, **plate: object) -> tuple[Callable[..., None], Callable[..., None]]:
        return partial(self.model, params, **plate), partial(self.guide, params, **plate)

    def exact_programs(self, params: Params) -> tuple[Callable[..., None], Callable[..., None]]:
        return partial(self.collapsed or self.model, params), partial(self.guide, params)

    def log_px(self) -> Tensor:
        """log p(x) of every datum."""
        return self.exact_log_px(self.params(), self.data)


def data_plate(x: Tensor, size: int | None = None, subsample: Tensor | None = None) -> pyro.plate:
    """The data plate: of ``size``, of which x is a ``subsample``, if so said."""
    return pyro.plate("data", len(x) if size is None else size, subsample=subsample, dim=-1)


def normal(loc: Tensor, scale: Tensor | float) -> dist.Normal:
    return dist.Normal(loc, torch.as_tensor(scale).expand_as(loc))


# --- z ~ N(0, 1), x ~ N(w z + a, s^2); guide N(m x + c, e^r) --------------------------------------------------------

NOISE = 0.8


def gaussian_model(p: Params, x: Tensor, **plate: object) -> None:
    with data_plate(x, **plate):
        z = pyro.sample("z", normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", normal(p["w"] * z + p["a"], NOISE), obs=x)


def gaussian_guide(p: Params, x: Tensor, **plate: object) -> None:
    with data_plate(x, **plate):
        pyro.sample("z", dist.Normal(p["m"] * x + p["c"], p["r"].exp().expand_as(x)))


def gaussian_log_px(p: Params, x: Tensor) -> Tensor:
    return dist.Normal(p["a"], (p["w"].square() + NOISE**2).sqrt()).log_prob(x)


GAUSSIAN_THETA = {"w": 0.9, "a": 0.3}
SLOPE = 0.9 / (0.9**2 + NOISE**2)
GAUSSIAN = Pair(
    "gaussian", gaussian_model, gaussian_guide, GAUSSIAN_THETA, {"m": 0.35, "c": 0.25, "r": -0.3},
    torch.tensor([-0.4, 1.3], dtype=torch.float64), {"z": 1}, gaussian_log_px,
)  # fmt: skip
POSTERIOR = Pair(
    "posterior", gaussian_model, gaussian_guide, GAUSSIAN_THETA,
    {"m": SLOPE, "c": -SLOPE * 0.3, "r": 0.5 * math.log(NOISE**2 / (0.9**2 + NOISE**2))},
    GAUSSIAN.data, {"z": 1}, gaussian_log_px, posterior=True,
)  # fmt: skip


# --- z ~ N(0, I_2), x ~ N(W z + a, s^2 I_3), parameters scale fixed matrices; diagonal guide ------------------------

LOADING = torch.tensor([[0.8, 0.1], [-0.3, 0.7], [0.4, 0.4]], dtype=torch.float64)
READING = torch.tensor([[0.5, -0.2, 0.3], [0.1, 0.5, 0.2]], dtype=torch.float64)


def multivariate_model(p: Params, x: Tensor, **plate: object) -> None:
    with data_plate(x, **plate):
        z = pyro.sample("z", normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
        loc = p["w"][..., None] * (z @ LOADING.T) + p["a"][..., None]
        pyro.sample("x", normal(loc, NOISE).to_event(1), obs=x)


def multivariate_guide(p: Params, x: Tensor, **plate: object) -> None:
    with data_plate(x, **plate):
        loc = p["m"][..., None] * (x @ READING.T) + p["c"][..., None]
        pyro.sample("z", dist.Normal(loc, p["r"][..., None].exp().expand_as(loc)).to_event(1))


def multivariate_log_px(p: Params, x: Tensor) -> Tensor:
    covariance = p["w"].square() * LOADING @ LOADING.T + NOISE**2 * torch.eye(3)
    return dist.MultivariateNormal(p["a"].expand(3), covariance).log_prob(x)


MULTIVARIATE = Pair(
    "multivariate", multivariate_model, multivariate_guide, {"w": 1.0, "a": 0.2}, {"m": 0.8, "c": 0.1, "r": -0.2},
    torch.tensor([[0.3, -0.8, 0.9]], dtype=torch.float64), {"z": 2}, multivariate_log_px,
)  # fmt: skip


# --- z2 ~ N(0, 1), z1 ~ N(v z2, .7^2), x ~ N(w z1 + a, s^2); guide z1 | x, then z2 | z1 -----------------------------


def hierarchy_model(p: Params, x: Tensor, **plate: object) -> None:
    with data_plate(x, **plate):
        z2 = pyro.sample("z2", normal(torch.zeros_like(x), 1.0))
        z1 = pyro.sample("z1", normal(p["v"] * z2, 0.7))
        pyro.sample("x", normal(p["w"] * z1 + p["a"], NOISE), obs=x)


def hierarchy_guide(p: Params, x: Tensor, **plate: object) -> None:
    with data_plate(x, **plate):
        z1 = pyro.sample("z1", dist.Normal(p["m"] * x + p["c"], p["r"].exp().expand_as(x)))
        pyro.sample("z2", dist.Normal(p["d"] * z1 + p["e"], p["t"].exp()))


def hierarchy_log_px(p: Params, x: Tensor) -> Tensor:
    variance = p["w"].square() * (p["v"].square() + 0.7**2) + NOISE**2
    return dist.Normal(p["a"], variance.sqrt()).log_prob(x)


HIERARCHY = Pair(
    "hierarchy", hierarchy_model, hierarchy_guide, {"v": 0.8, "w": 0.9, "a": 0.1},
    {"m": 0.5, "c": 0.2, "r": -0.3, "d": 0.5, "e": 0.3, "t": -0.2},
    torch.tensor([1.1], dtype=torch.float64), {"z1": 1, "z2": 1}, hierarchy_log_px,
)  # fmt: skip


# --- a mixture of three Bernoulli components over two bits: z ~ Categorical, no reparameterised site ----------------

PROTOTYPES = torch.tensor([[1.0, -0.5], [-1.2, 0.4], [0.3, 0.8]], dtype=torch.float64)
COMPONENTS = torch.arange(3.0, dtype=torch.float64)


def mixture_prior(p: Params) -> Tensor:
    return p["a"][..., None] * torch.tensor([0.5, 0.0, -1.0], dtype=torch.float64)


def mixture_model(p: Params, x: Tensor, **plate: object) -> None:
    with data_plate(x, **plate):
        z = pyro.sample("z", dist.Categorical(logits=mixture_prior(p)))
        pyro.sample("x", dist.Bernoulli(logits=p["w"][..., None] * PROTOTYPES[z.long()]).to_event(1), obs=x)


def mixture_guide(p: Params, x: Tensor, **plate: object) -> None:
    with data_plate(x, **plate):
        first = p["m"] * x[..., 0] + p["c"]
        pyro.sample("z", dist.Categorical(logits=torch.stack([first, p["d"] * x[..., 1], -first], -1)))


def mixture_log_px(p: Params, x: Tensor) -> Tensor:
    each = dist.Bernoulli(logits=p["w"] * PROTOTYPES).to_event(1).log_prob(x.unsqueeze(-2))
    return torch.logsumexp(each + mixture_prior(p).log_softmax(-1), -1)


MIXTURE = Pair(
    "bernoulli-mixture", mixture_model, mixture_guide, {"w": 1.2, "a": 0.7}, {"m": 0.6, "c": -0.2, "d": 0.4},
    torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64), {"z": COMPONENTS}, mixture_log_px,
)  # fmt: skip


# --- a belief net of two binary units: h2 -> h1 -> x; guide h1 | x, then h2 | h1 ------------------------------------

BITS = torch.tensor([0.0, 1.0], dtype=torch.float64)


def net_model(p: Params, x: Tensor, **plate: object) -> None:
    with data_plate(x, **plate):
        h2 = pyro.sample("h2", dist.Bernoulli(logits=p["b"].expand_as(x)))
        h1 = pyro.sample("h1", dist.Bernoulli(logits=p["v"] * (2 * h2 - 1)))
        pyro.sample("x", dist.Bernoulli(logits=p["w"] * (2 * h1 - 1) + 0.3), obs=x)


def net_guide(p: Params, x: Tensor, **plate: object) -> None:
    with data_plate(x, **plate):
        h1 = pyro.sample("h1", dist.Bernoulli(logits=p["m"] * x + p["c"]))
        pyro.sample("h2", dist.Bernoulli(logits=p["d"] * (2 * h1 - 1) + p["e"]))


def net_log_px(p: Params, x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for h1, h2 in torch.cartesian_prod(BITS, BITS):
        log_joint = dist.Bernoulli(logits=p["b"]).log_prob(h2) + dist.Bernoulli(logits=p["v"] * (2 * h2 - 1)).log_prob(
            h1
        )
        total = total + (log_joint + dist.Bernoulli(logits=p["w"] * (2 * h1 - 1) + 0.3).log_prob(x)).exp()
    return total.log()


NET = Pair(
    "binary-net", net_model, net_guide, {"b": 0.4, "v": 0.9, "w": 1.5}, {"m": 1.0, "c": -0.6, "d": 0.5, "e": 0.3},
    torch.tensor([1.0, 0.0], dtype=torch.float64), {"h1": BITS, "h2": BITS}, net_log_px,
)  # fmt: skip


# --- discrete and continuous: c ~ Bernoulli, z ~ N(+-1, .6^2), x ~ N(w z + a, s^2) ----------------------------------


def mixed_model(p: Params, x: Tensor, **plate: object) -> None:
    with data_plate(x, **plate):
        c = pyro.sample("c", dist.Bernoulli(logits=p["b"].expand_as(x)))
        z = pyro.sample("z", normal(2 * c - 1, 0.6))
        pyro.sample("x", normal(p["w"] * z + p["a"], NOISE), obs=x)


def mixed_guide(p: Params, x: Tensor, **plate: object) -> None:
    with data_plate(x, **plate):
        c = pyro.sample("c", dist.Bernoulli(logits=p["m"] * x + p["e"]))
        pyro.sample("z", dist.Normal(p["d"] * (2 * c - 1) + 0.2 * x, p["r"].exp()))


def mixed_live_guide(p: Params, x: Tensor, **plate: object) -> None:
    """The discrete site hangs on the reparameterised one, whose gradient must pass through its log-probability."""
    with data_plate(x, **plate):
        z = pyro.sample("z", dist.Normal(p["m"] * x + p["e"], p["r"].exp().expand_as(x)))
        pyro.sample("c", dist.Bernoulli(logits=p["d"] * z + 0.2))


def mixed_log_px(p: Params, x: Tensor) -> Tensor:
    scale = (p["w"].square() * 0.6**2 + NOISE**2).sqrt()
    each = torch.stack([dist.Normal(p["w"] * m + p["a"], scale).log_prob(x) for m in (-1.0, 1.0)], -1)
    return torch.logsumexp(each + torch.stack([-p["b"], p["b"]], -1).div(2).log_softmax(-1), -1)


MIXED_THETA = {"b": 0.3, "w": 0.8, "a": 0.1}
MIXED = Pair(
    "mixed", mixed_model, mixed_guide, MIXED_THETA, {"m": 0.5, "e": 0.1, "d": 0.7, "r": -0.3},
    torch.tensor([0.7], dtype=torch.float64), {"c": BITS, "z": 1}, mixed_log_px,
)  # fmt: skip
MIXED_LIVE = Pair(
    "mixed-live", mixed_model, mixed_live_guide, MIXED_THETA, {"m": 0.6, "e": 0.1, "d": 0.9, "r": 0.0},
    torch.tensor([0.7], dtype=torch.float64), {"z": 1, "c": BITS}, mixed_log_px,
)  # fmt: skip

# --- c ~ Categorical, summed out; z ~ N(v m_c, .7^2), x ~ N(w z + a d_c, s^2) ----------------------------------------

PLACES = torch.tensor([-1.5, 0.2, 1.0], dtype=torch.float64)
OFFSETS = torch.tensor([0.6, -0.4, 1.1], dtype=torch.float64)


def summed_prior(p: Params) -> dist.Categorical:
    return dist.Categorical(logits=p["b"][..., None] * torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64))


def summed_model(p: Params, x: Tensor, **plate: object) -> None:
    with data_plate(x, **plate):
        c = pyro.sample("c", summed_prior(p), infer={"enumerate": "parallel"})
        z = pyro.sample("z", normal(p["v"] * PLACES[c], 0.7))
        pyro.sample("x", normal(p["w"] * z + p["a"] * OFFSETS[c], NOISE), obs=x)


def collapsed_model(p: Params, x: Tensor) -> None:
    with data_plate(x):
        prior, each = summed_prior(p), normal(p["v"][..., None] * PLACES, 0.7)
        z = pyro.sample("z", dist.MixtureSameFamily(prior, each))[..., None]
        component = dist.Categorical(logits=prior.logits + each.log_prob(z))
        loc = p["w"][..., None] * z + p["a"][..., None] * OFFSETS
        pyro.sample("x", dist.MixtureSameFamily(component, normal(loc, NOISE)), obs=x)


def summed_log_px(p: Params, x: Tensor) -> Tensor:
    scale = (p["w"].square() * 0.7**2 + NOISE**2).sqrt()
    each = dist.Normal(p["w"] * p["v"] * PLACES + p["a"] * OFFSETS, scale).log_prob(x.unsqueeze(-1))
    return torch.logsumexp(each + summed_prior(p).logits, -1)


SUMMED = Pair(
    "summed", summed_model, gaussian_guide, {"b": 0.8, "v": 1.1, "w": 0.9, "a": 0.7}, {"m": 0.5, "c": -0.1, "r": -0.1},
    torch.tensor([0.9], dtype=torch.float64), {"z": 1}, summed_log_px, collapsed=collapsed_model,
)  # fmt: skip

PAIRS = [GAUSSIAN, POSTERIOR, MULTIVARIATE, HIERARCHY, MIXTURE, NET, MIXED, MIXED_LIVE, SUMMED]
REPARAMETERISED = [pair for pair in PAIRS if pair.reparameterised]
