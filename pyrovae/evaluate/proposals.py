r"""Better proposals for importance sampling, made of a guide: wider ones, and ones fitted to each datum."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TransformedDistribution
from pyro.distributions.transforms import AffineTransform
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyrovae.arguments import in_range, positive_int
from pyrovae.engine.programs import Program
from pyrovae.engine.sites import Site, counts, latent
from pyrovae.engine.unwrap import plain
from pyrovae.engine.whole import Whole
from pyrovae.evaluate.measuring import measuring
from pyrovae.objectives.elbo import ELBO

Size = torch.Size | list[int] | tuple[int, ...]


class Proposal(Messenger):
    """A guide that is run inside a messenger: a program like any other."""

    def __init__(self, guide: Program) -> None:
        super().__init__()
        self.guide = guide

    def __call__(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
        with self:
            return self.guide(*args, **kwargs)


class Refined(Proposal):
    r"""A guide whose latents are moved for each datum: :math:`z'_u = a_{bu} + e^{s_{bu}} z_u`, with z from the guide.

    For a normal guide that is every normal of the same covariance structure. It is for the batch that it was made for.
    """

    def __init__(self, guide: Program, shifts: dict[str, Tensor], log_scales: dict[str, Tensor]) -> None:
        super().__init__(guide)
        self.shifts, self.log_scales = shifts, log_scales

    def _pyro_sample(self, msg: Site) -> None:
        if (name := msg["name"]) in self.shifts and not msg["is_observed"]:
            moved = AffineTransform(self.shifts[name], self.log_scales[name].exp(), event_dim=msg["fn"].event_dim)
            msg["fn"] = TransformedDistribution(msg["fn"], [moved])


def inflate(guide: Program, factor: float = 1.2, *, weight: float = 1.0) -> Inflated:
    r"""A wider proposal: every normal site of a guide with its scale times ``factor``, or mixed with that.

    .. math:: q'(z \mid x) = (1 - a)\, N(z; \mu, \Sigma) + a\, N(z; \mu, c^2 \Sigma)

    A guide trained on the ELBO is narrower than the posterior, and where its tails are too light the weights have no
    variance. A wider proposal (a = 1) costs effective samples everywhere; a *defensive mixture* (a small, c large)
    keeps the guide for most draws, and with one latent site no weight is more than 1 / (1 - a) times what it was.

    :param factor: c, above 0.
    :param weight: a, the share of the wider normal, in (0, 1].
    :return: a program like any other: ``log_likelihood(model, inflate(guide, 1.2), x)``.
    :raises ValueError: when it runs, for a latent site that is not normal, by name.

    >>> import pyro, pyro.distributions as dist
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         return pyro.sample("z", dist.Normal(x, 0.5))
    >>> bool(inflate(guide, 2.0)(torch.zeros(10_000)).std() > 0.95)
    True
    >>> z = inflate(guide, 6.0, weight=0.1)(torch.zeros(10_000))  # 0.1 of the draws have standard deviation 3
    >>> bool((z.abs() > 3).double().mean() > 0.02)
    True

    Hesterberg (1995), *Weighted average importance sampling and defensive mixture distributions*; Owen (2013), *Monte
    Carlo theory, methods and examples*, chapter 9.
    """
    return Inflated(guide, weight=in_range("weight", weight, 1e-6, 1.0), factor=in_range("factor", factor, 1e-6))


class Inflated(Proposal):
    """A guide with wider normals; see :func:`inflate`."""

    def __init__(self, guide: Program, factor: float, weight: float) -> None:
        super().__init__(guide)
        self.factor, self.weight = factor, weight

    def _pyro_sample(self, msg: Site) -> None:
        if counts(msg) and not msg["is_observed"]:
            wide = widened(msg["fn"], self.factor, msg["name"])
            msg["fn"] = wide if self.weight == 1 else Mixture(msg["fn"], wide, self.weight)


def widened(fn: Distribution, factor: float, name: str) -> dist.TorchDistribution:
    """The normal distribution of the site ``name`` with its scale times ``factor``."""
    if isinstance(fn, dist.Independent):
        return dist.Independent(widened(fn.base_dist, factor, name), fn.reinterpreted_batch_ndims)
    if isinstance(fn, torch.distributions.Normal):
        return dist.Normal(fn.loc, fn.scale * factor)
    if isinstance(fn, torch.distributions.MultivariateNormal):
        return dist.MultivariateNormal(fn.loc, scale_tril=fn.scale_tril * factor)
    raise ValueError(f'guide site "{name}" ({type(fn).__name__}) cannot be inflated: it must be normal')


class Mixture(dist.TorchDistribution):
    """(1 - weight) usual + weight wide, one component per datum."""

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, usual: dist.TorchDistribution, wide: dist.TorchDistribution, weight: float) -> None:
        self.usual, self.wide, self.weight = usual, wide, weight
        super().__init__(usual.batch_shape, usual.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint | None:
        return self.usual.support

    def expand(self, batch_shape: Size, _instance: object = None) -> Mixture:
        return Mixture(self.usual.expand(batch_shape), self.wide.expand(batch_shape), self.weight)

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:  # noqa: B008
        usual, wide = self.usual.sample(sample_shape), self.wide.sample(sample_shape)
        shape = (*sample_shape, *self.batch_shape, *[1] * self.event_dim)
        return torch.where(torch.rand(shape, dtype=usual.dtype, device=usual.device) < self.weight, wide, usual)

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.logaddexp(
            self.usual.log_prob(value) + math.log1p(-self.weight), self.wide.log_prob(value) + math.log(self.weight)
        )


def refine(
    model: Program,
    guide: Program,
    *args: Any,
    steps: int = 100,
    lr: float = 0.02,
    num_particles: int = 8,
    seed: int | None = None,
    **kwargs: Any,
) -> Refined:
    r"""Fit the guide to each datum of a batch by itself: semi-amortised inference.

    .. math:: \max_{a_b, s_b} \; \mathbb E_{q(z \mid x_b)} \log \frac{p(x_b, z')}{q'(z' \mid x_b)},
              \qquad z' = a_b + e^{s_b} z

    by Adam on the doubly reparameterised ELBO, from a = s = 0; no parameter of the pair moves. The refined guide is a
    valid proposal: ``log_likelihood(model, refine(model, guide, x), x)`` estimates the same log p(x), with better
    weights where the encoder was at fault.

    :param args: the batch, as the programs take it.
    :param steps: of Adam, with learning rate ``lr`` that falls to 0 along a cosine.
    :param num_particles: draws per datum and step.
    :param seed: isolates and seeds; None takes torch's global generator.
    :raises ValueError: for a latent site that is not reparameterised, or not on the whole real line, by name.

    >>> import pyro, pyro.distributions as dist, pyrovae as pv
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(0 * x, 1.0))
    >>> x = torch.tensor([2.0, -1.0])
    >>> better = refine(model, guide, x, steps=200, lr=0.05, seed=0)
    >>> pv.log_weights(model, better, x, num_particles=100).std(0).max() < 0.1  # it is the posterior, almost
    tensor(True)

    Hjelm et al. (2016), *Iterative refinement of the approximate posterior*; Kim et al. (2018), *Semi-amortized
    variational autoencoders*.
    """
    steps, lr = positive_int("steps", steps), in_range("lr", lr, 0.0)
    num_particles = positive_int("num_particles", num_particles)
    with measuring(model, guide, seed=seed), Whole() as whole:
        sites = latent(whole.look(model, guide, args, kwargs).guide)
        if not sites:
            raise ValueError("there is nothing to refine: the guide draws nothing")
        for name, site in sites.items():
            support = plain(site["fn"].support)
            if not site["fn"].has_rsample or support not in (constraints.real, constraints.real_vector):
                raise ValueError(
                    f'guide site "{name}" ({type(site["fn"]).__name__}) cannot be refined: it must be reparameterised, '
                    "and on the whole real line"
                )
        shifts, log_scales = ({n: torch.zeros_like(s["value"]) for n, s in sites.items()} for _ in range(2))
        free = [t.requires_grad_() for t in (*shifts.values(), *log_scales.values())]
        refined, objective = Refined(guide, shifts, log_scales), ELBO(num_particles, gradient="stl")
        optimizer = torch.optim.Adam(free, lr=lr)
        with torch.enable_grad():
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
                loss = objective.differentiable_loss(model, refined, *args, **kwargs)
                for t, gradient in zip(free, torch.autograd.grad(loss, free), strict=True):
                    t.grad = gradient.nan_to_num(0.0, 0.0, 0.0)  # a datum without one stays with the guide's own
                optimizer.step()
    for t in free:
        t.requires_grad_(False)
    return refined
