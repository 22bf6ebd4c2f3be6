r"""Exact answers, independent of the engine: what a bound is in expectation, and its gradients.

Guide and model run under plain ``pyro.poutine`` on every node of an integration grid (a fine trapezoid of standard
normal noise, all states of a discrete site), which gives one particle's mass and log-weight, both live in the
parameters. K independent particles then need no K-fold grid:

.. math:: \mathbb E \log \sum_k w_k = \int_{-\infty}^\infty \Big( e^{-e^u} - \big(\mathbb E e^{-e^u w}\big)^K \Big) du,
    \qquad \mathbb E \max_k \log w_k = \int \ell \; dF(\ell)^K .
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from tests.laws.pairs import Pair, Params

LogMass = Tensor
Expectation = Callable[[LogMass, Tensor, int], Tensor]


class Noise(Messenger):
    """Set every latent site of a guide: loc + scale * noise where it is normal, the given state elsewhere."""

    def __init__(self, noise: dict[str, Tensor]) -> None:
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] not in self.noise:
            return
        fn, noise = msg["fn"], self.noise[msg["name"]]
        base = getattr(fn, "base_dist", fn)
        msg["value"] = base.loc + base.scale * noise if isinstance(base, torch.distributions.Normal) else noise
        msg["done"] = True


@dataclass
class Parts:
    """Of every node: log mass of what is not reparameterised, and the three terms of the log-weight."""

    log_mass: Tensor
    likelihood: Tensor
    prior: Tensor
    guide: Tensor

    def log_w(self, kl_weight: float, likelihood_weight: float) -> Tensor:
        return likelihood_weight * self.likelihood + kl_weight * (self.prior - self.guide)


def parts_at(pair: Pair, params: Params, x: Tensor, noise: dict[str, Tensor], *, path_only: bool = False) -> Parts:
    """One particle per datum of x, from the given noise. ``path_only`` cuts log q from the guide's parameters."""
    model, guide = pair.exact_programs(params)
    with Noise(noise):
        drawn = poutine.trace(guide).get_trace(x)
    values = {name: drawn.nodes[name]["value"] for name in pair.latents}
    fixed = {n: p.detach() for n, p in params.items()}
    density = (
        poutine.trace(poutine.condition(pair.exact_programs(fixed)[1], values)).get_trace(x) if path_only else drawn
    )
    joint = poutine.trace(poutine.condition(model, values)).get_trace(x)

    def total(trace: poutine.Trace, names: list[str]) -> Tensor:
        nodes = [trace.nodes[name] for name in names]
        return sum((n["fn"].log_prob(n["value"]) for n in nodes), torch.zeros(len(x)))

    discrete = [name for name, how in pair.latents.items() if isinstance(how, Tensor)]
    names = list(pair.latents)
    return Parts(total(drawn, discrete), total(joint, ["x"]), total(joint, names), total(density, names))


@lru_cache
def _axes(pair: Pair, step: float) -> tuple[dict[str, Tensor], Tensor]:
    """The grid: noise of every site at every node, and the log mass of its normal noise."""
    line = torch.arange(-8.5, 8.5 + step / 2, step)
    log_line = -0.5 * line.square() - 0.5 * math.log(2 * math.pi) + math.log(step)
    axes = []
    for name, how in pair.latents.items():
        axes += [(name, how, torch.zeros(len(how)))] if isinstance(how, Tensor) else [(name, line, log_line)] * how
    index = torch.cartesian_prod(*[torch.arange(len(points)) for _, points, _ in axes]).view(-1, len(axes))
    columns = {name: [] for name in pair.latents}
    log_mass = torch.zeros(len(index))
    for column, (name, points, logs) in zip(index.T, axes, strict=True):
        columns[name].append(points[column])
        log_mass = log_mass + logs[column]
    noise = {n: torch.stack(c, -1) if len(c) > 1 else c[0] for n, c in columns.items()}
    return noise, log_mass


def grid(pair: Pair, params: Params, datum: Tensor, *, path_only: bool = False, fine: bool = False) -> Parts:
    """All particles that one datum can have; ``fine`` where the integrand has jumps."""
    normals = sum(how for how in pair.latents.values() if isinstance(how, int))
    noise, log_mass = _axes(pair, (0.0005 if fine else 0.1) if normals < 2 else (0.1 if fine else 0.25))
    size = len(log_mass)
    each = {n: p.expand(size) for n, p in params.items()}
    parts = parts_at(pair, each, datum.expand(size, *datum.shape), noise, path_only=path_only)
    parts.log_mass = parts.log_mass + log_mass
    return parts


# --- expectations over K independent particles ----------------------------------------------------------------------


def mean(log_mass: Tensor, log_w: Tensor, num: int) -> Tensor:
    """E of the mean of K log-weights."""
    return (log_mass.exp() * log_w).sum()


def power_mean(alpha: float) -> Expectation:
    r"""E of :math:`\frac{1}{1-\alpha} \log \frac1K \sum_k w_k^{1-\alpha}`."""

    def expectation(log_mass: Tensor, log_w: Tensor, num: int) -> Tensor:
        if alpha == 1:
            return mean(log_mass, log_w, num)
        powers = (1 - alpha) * log_w
        shift = (powers + log_mass).logsumexp(0).detach()
        u = torch.arange(-36.0, 60.0, 0.25)
        # log E exp(-e^u w), by logsumexp, so that its K-th power is live in masses and weights
        log_laplace = (log_mass - (u.unsqueeze(-1) + powers - shift).exp().clamp(max=700.0)).logsumexp(-1)
        integral = 0.25 * ((-u.exp()).exp() - (num * log_laplace).exp()).sum()
        return (integral + shift - math.log(num)) / (1 - alpha)

    return expectation


def maximum(log_mass: Tensor, log_w: Tensor, num: int) -> Tensor:
    """E of the largest of K log-weights; on the fine grid its gradient is right to 2e-4, 1/30 of a standard error."""
    order = log_w.detach().argsort()
    below = log_mass[order].exp().cumsum(0)
    return (log_w[order] * (below**num).diff(prepend=below.new_zeros(1))).sum()


def by_enumeration(bound: Callable[[Tensor], Tensor]) -> Expectation:
    """E of any bound, over all K-tuples of nodes: for few nodes and few particles."""

    def expectation(log_mass: Tensor, log_w: Tensor, num: int) -> Tensor:
        tuples = torch.tensor(list(itertools.product(range(len(log_w)), repeat=num))).T
        return (log_mass[tuples].sum(0).exp() * bound(log_w[tuples])).sum()

    return expectation


@cache
def expected(
    pair: Pair, expectation: Expectation, num: int, *, kl_weight: float = 1.0, likelihood_weight: float = 1.0,
    path_only: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The expected bound, summed over the pair's data, and its gradient in every parameter."""
    params = pair.params(grad=True)
    total = torch.zeros(())
    for datum in pair.data:
        parts = grid(pair, params, datum, path_only=path_only, fine=expectation is maximum)
        total = total + expectation(parts.log_mass, parts.log_w(kl_weight, likelihood_weight), num)
    found = torch.autograd.grad(total, list(params.values()), allow_unused=True)
    gradients = {n: torch.zeros(()) if g is None else g for n, g in zip(params, found, strict=True)}
    return total.detach(), gradients


def simulate(pair: Pair, num: int, size: int, params: Params | None = None) -> Parts:
    """Our own draws, without the engine: parts ``[K, size * data]``, the data of each repetition together."""
    x = pair.data.repeat(size, *[1] * (pair.data.dim() - 1))
    params = pair.params() if params is None else params
    each = {n: p.expand(len(x)).repeat(num) for n, p in params.items()}
    wide = x.repeat(num, *[1] * (x.dim() - 1))
    normals = {n: how for n, how in pair.latents.items() if isinstance(how, int)}
    noise = {n: torch.randn(len(wide), *[how] * (how > 1)) for n, how in normals.items()}
    with Noise(noise), torch.no_grad():
        drawn = poutine.trace(pair.exact_programs(each)[1]).get_trace(wide)
    noise |= {n: drawn.nodes[n]["value"] for n in pair.latents if n not in normals}
    parts = parts_at(pair, each, wide, noise)
    return Parts(*(t.view(num, len(x)) for t in (parts.log_mass, parts.likelihood, parts.prior, parts.guide)))
