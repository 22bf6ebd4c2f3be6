r"""Priors: what the latents are before any data, :math:`p(z)`.

A prior is one small module with :meth:`~Prior.distribution`. A new one is such a class and one row in :data:`PRIORS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn

from pyrovae.arguments import positive_int, sizes
from pyrovae.parts.flows import Coupling, FlowNormal
from pyrovae.parts.posteriors import make_steps, share_options
from pyrovae.parts.shared import Broadcasting, Constraints, Shape


class NormalMixture(Broadcasting):
    r"""A mixture of diagonal normals, its log-density by two matrix products.

    .. math:: p(z) = \sum_c \pi_c\, N(z; \mu_c, \mathrm{diag}\,\sigma_c^2), \qquad
              \sum_i \frac{(z_i - \mu_{ci})^2}{\sigma_{ci}^2}
              = \langle z^2, \sigma_c^{-2} \rangle - 2 \langle z, \mu_c \sigma_c^{-2} \rangle
              + \langle \mu_c^2, \sigma_c^{-2} \rangle

    So no tensor ``[K, B, components, dim]`` is ever made. The three terms cancel where a component is narrow, so they
    are computed in float64, whatever the dtype of the result.

    Shapes: ``logits`` ``[C]``, ``loc`` and ``scale`` ``[C, dim]``; batch shape ``[]`` unless expanded, event shape
    ``[dim]``; nats.

    >>> NormalMixture(torch.zeros(3), torch.zeros(3, 2), torch.ones(3, 2)).log_prob(torch.zeros(5, 2))
    tensor([-1.8379, -1.8379, -1.8379, -1.8379, -1.8379])
    """

    arg_constraints: ClassVar[Constraints] = {
        "logits": constraints.real_vector,
        "loc": constraints.independent(constraints.real, 2),
        "scale": constraints.independent(constraints.positive, 2),
    }
    support = constraints.real_vector

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.logits, self.loc, self.scale = logits, loc, scale
        super().__init__(torch.Size(), loc.shape[-1:], validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), in nats."""
        if self._validate_args:
            self._validate_sample(value)
        z, loc, scale = value.double(), self.loc.double(), self.scale.double()
        precision = scale.reciprocal().square()
        weighted = loc * precision
        constant = self.logits.double().log_softmax(-1) - scale.log().sum(-1) - 0.5 * (weighted * loc).sum(-1)
        exponent = z @ weighted.mT - 0.5 * (z.square() @ precision.mT)
        log_p = (exponent + constant).logsumexp(-1) - 0.5 * math.log(math.tau) * loc.shape[-1]
        return log_p.to(value.dtype).expand(torch.broadcast_shapes(log_p.shape, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Shape = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        logits = self.logits.expand(*shape, -1)  # one draw from each row of many, which a static graph can hold
        component = torch.distributions.Categorical(logits=logits, validate_args=False).sample()
        return torch.normal(self.loc[component], self.scale[component])

    @property
    def mean(self) -> Tensor:
        return (self.logits.softmax(-1) @ self.loc).expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        second = self.logits.softmax(-1) @ (self.loc.square() + self.scale.square())
        return (second - self.mean.square()).expand(self.batch_shape + self.event_shape)


class VectorMixture(dist.MixtureSameFamily):
    """A mixture over real vectors that says so, as annealed importance sampling asks."""

    support = constraints.real_vector


class Prior(nn.Module):
    """A distribution of latent vectors.

    :ivar options: names of the constructor's arguments that a user chooses.
    """

    options: ClassVar[tuple[str, ...]] = ()

    def distribution(self, like: Tensor) -> TorchDistribution:
        """p(z), of batch shape ``[]`` and event shape ``[dim]``, of the tensor's dtype and device."""
        raise NotImplementedError

    def start_(self, x: Tensor, read: Callable[[Tensor], Tensor] | None = None) -> None:
        """Set what can be started from data ``[N, *event]``, or from what ``read`` makes of some of them."""


class StandardNormal(Prior):
    """:math:`N(0, I)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def distribution(self, like: Tensor) -> TorchDistribution:
        return dist.Normal(like.new_zeros(self.dim), like.new_ones(self.dim)).to_event(1)


class MixturePrior(Prior):
    r"""A learned mixture of normals, :math:`\sum_c \pi_c\, N(\mu_c, \mathrm{diag}\,\sigma_c^2)`.

    Means start from N(0, I), deviations at 1, weights equal.

    :param dim: number of latent units.
    :param components: their number.
    """

    options: ClassVar[tuple[str, ...]] = ("components",)

    def __init__(self, dim: int, components: int = 10) -> None:
        super().__init__()
        count = positive_int("components", components)
        self.logits = nn.Parameter(torch.zeros(count))
        self.loc = nn.Parameter(torch.randn(count, dim))
        self.log_scale = nn.Parameter(torch.zeros(count, dim))

    def distribution(self, like: Tensor) -> TorchDistribution:
        return NormalMixture(self.logits, self.loc, self.log_scale.exp())


class VampPrior(Prior):
    r"""The mixture of the posteriors of learned pseudo-inputs :math:`u_c`.

    .. math:: p(z) = \frac{1}{C} \sum_{c=1}^{C} q_\phi(z \mid u_c)

    The best prior of a VAE is the mixture of its posteriors over all data; this is that with few data, which are
    learned. They start at random, or as data, evenly spaced through what :meth:`start_` is given. With diagonal
    posteriors it is a :class:`NormalMixture`; with others each density is computed by itself, which is slow.

    :param posterior: a function from ``[C, *pseudo_shape]`` to q(z | u) of batch shape ``[C]``; its parameters stay its
        owner's.
    :param pseudo_shape: shape of one pseudo-input.
    :param components: C, their number.
    :param bounded: keep pseudo-inputs within (0, 1), as the sigmoid of parameters; they then start around one half.

    Tomczak and Welling, *VAE with a VampPrior*, 2018.
    """

    options: ClassVar[tuple[str, ...]] = ("components",)

    def __init__(
        self,
        posterior: Callable[[Tensor], TorchDistribution],
        pseudo_shape: Sequence[int],
        components: int = 100,
        bounded: bool = True,
    ) -> None:
        super().__init__()
        self.posterior = partial(posterior)  # a module put here as it is would be registered, and saved, twice
        self.bounded = bounded
        self.log_weights: Tensor
        shape = (positive_int("components", components), *sizes("pseudo_shape", pseudo_shape))
        noise = torch.randn(shape)
        self.raw = nn.Parameter(self.as_raw(0.5 + 0.1 * noise) if bounded else noise)
        self.register_buffer("log_weights", torch.zeros(shape[0]), persistent=False)

    def as_raw(self, x: Tensor) -> Tensor:
        """The parameters of pseudo-inputs."""
        return x.clamp(0.01, 0.99).logit() if self.bounded else x

    @property
    def pseudo_inputs(self) -> Tensor:
        """``[C, *pseudo_shape]``."""
        return self.raw.sigmoid() if self.bounded else self.raw

    def distribution(self, like: Tensor) -> TorchDistribution:
        q = self.posterior(self.pseudo_inputs)
        if isinstance(q, dist.Independent) and isinstance(q.base_dist, dist.Normal):
            return NormalMixture(self.log_weights, q.base_dist.loc, q.base_dist.scale)
        return VectorMixture(dist.Categorical(logits=self.log_weights), q)

    @torch.no_grad()
    def start_(self, x: Tensor, read: Callable[[Tensor], Tensor] | None = None) -> None:
        count = min(len(self.raw), len(x))
        spaced = torch.linspace(0, len(x) - 1, count, dtype=torch.float64, device=x.device).round().long()
        chosen = x[spaced].to(self.raw)
        self.raw[:count] = self.as_raw(chosen if read is None else read(chosen))

    def extra_repr(self) -> str:
        return f"pseudo_inputs={tuple(self.raw.shape)}, bounded={self.bounded}"


class FlowPrior(Prior):
    r"""A normal pushed through learned :class:`pyrovae.parts.Coupling` steps, fast both to draw and to evaluate.

    .. math:: z = T_L(\cdots T_1(\epsilon) \cdots), \qquad \epsilon \sim N(0, I)

    It starts as N(0, I).

    :param dim: number of latent units, at least 2.
    :param flows: L, the number of steps.
    :param flow_hidden: widths of the hidden layers of each step's network; by default one layer of
        ``max(100, 2 * dim)``.

    Rezende and Mohamed, *Variational inference with normalizing flows*, 2015; Dinh, Sohl-Dickstein and Bengio, *Density
    estimation using Real NVP*, 2017.
    """

    options: ClassVar[tuple[str, ...]] = ("flows", "flow_hidden")

    def __init__(self, dim: int, flows: int = 4, flow_hidden: Sequence[int] | None = None) -> None:
        super().__init__()
        self.base = StandardNormal(dim)
        self.steps = make_steps(Coupling, dim, flows, flow_hidden)

    def distribution(self, like: Tensor) -> TorchDistribution:
        return FlowNormal(self.base.distribution(like), self.steps)


PRIORS: dict[str, type[Prior]] = {
    "normal": StandardNormal,
    "mixture": MixturePrior,
    "vamp": VampPrior,
    "flow": FlowPrior,
}


def make_prior(
    name: str,
    dim: int,
    *,
    posterior: Callable[[Tensor], TorchDistribution] | None = None,
    pseudo_shape: Sequence[int] | None = None,
    bounded: bool = True,
    **options: object,
) -> Prior:
    """The prior of that name; options that it does not have are refused.

    :param posterior: for ``"vamp"``, and ``pseudo_shape`` and ``bounded`` as well: see :class:`VampPrior`.
    :raises ValueError: an unknown name, or an option that this prior does not have.

    >>> make_prior("mixture", 5, components=3).distribution(torch.zeros(())).event_shape
    torch.Size([5])
    """
    (own,) = share_options(options, prior=(name, PRIORS))
    if PRIORS[name] is not VampPrior:
        return PRIORS[name](dim, **own)
    if posterior is None or pseudo_shape is None:
        raise ValueError(f"prior={name!r} is made of posteriors of pseudo-inputs: give posterior and pseudo_shape")
    return VampPrior(posterior, pseudo_shape, bounded=bounded, **own)
