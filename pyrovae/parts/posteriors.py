r"""Posteriors: what an encoder's output says about the latents, :math:`q(z \mid x)`.

A posterior is one small module: the sizes of the heads that it asks of the encoder, and the distribution that it makes
of them. A new one is a class of these two things and one row in :data:`POSTERIORS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyrovae.arguments import lookup, one_of, positive_int, sizes
from pyrovae.nn.mlp import module_list
from pyrovae.parts.flows import Autoregressive, Coupling, FlowNormal, Step


class HasOptions(Protocol):
    """A class that names what a user may choose of it."""

    options: ClassVar[tuple[str, ...]]


class DiagonalNormal(nn.Module):
    r"""Encoder output as :math:`N(\mu, \mathrm{diag}\,\sigma^2)` with :math:`\sigma = \exp(\text{output})`.

    Shapes: ``[..., 2 * dim]`` to a distribution of batch shape ``[...]`` and event shape ``[dim]``.

    :ivar heads: sizes of the encoder's heads.
    :ivar options: names of the constructor's other arguments.
    """

    options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads: tuple[int, ...] = (dim, dim)

    def forward(self, params: Tensor) -> TorchDistribution:
        mean, log_sigma = params.chunk(2, -1)
        return dist.Normal(mean, log_sigma.exp()).to_event(1)

    @torch.no_grad()
    def start_(self, output: nn.Linear) -> None:
        """Set what the encoder's last layer should start with, other than Glorot's."""


class FullNormal(DiagonalNormal):
    r"""Encoder output as :math:`N(\mu, L L^\top)`, L lower triangular with diagonal :math:`\exp(\text{output})`.

    The weights of the elements below the diagonal start at 0, so that it starts as the :class:`DiagonalNormal`.

    Shapes: ``[..., 2 * dim + dim * (dim - 1) / 2]`` to a distribution of batch shape ``[...]`` and event shape
    ``[dim]``.
    """

    below: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("below", torch.tril_indices(dim, dim, -1), persistent=False)
        if dim > 1:
            self.heads = (dim, dim, self.below.shape[1])

    def forward(self, params: Tensor) -> TorchDistribution:
        dim = self.heads[0]
        mean, log_diagonal, below = params.tensor_split((dim, 2 * dim), -1)
        scale_tril = log_diagonal.exp().diag_embed()
        scale_tril[..., self.below[0], self.below[1]] = below
        return dist.MultivariateNormal(mean, scale_tril=scale_tril)

    @torch.no_grad()
    def start_(self, output: nn.Linear) -> None:
        output.weight[2 * self.heads[0] :].zero_()


class FlowPosterior(DiagonalNormal):
    r"""A :class:`DiagonalNormal` pushed through steps that take a context :math:`h(x)`, the encoder's as well.

    .. math:: z = T_L(\cdots T_1(\mu + \sigma \epsilon;\, h) \cdots;\, h), \qquad \epsilon \sim N(0, I)

    It starts as the :class:`DiagonalNormal`. Its mean has no closed form: active units are found by Monte Carlo, KL
    divergences are those of the whole latent, and :func:`centre` stands in where one point is asked for.

    Shapes: ``[..., 4 * dim]``, of which the context is the second half, to a :class:`pyrovae.parts.FlowNormal` of batch
    shape ``[...]`` and event shape ``[dim]``.

    :param dim: number of latent units, at least 2.
    :param flows: L, the number of steps.
    :param flow_hidden: widths of the hidden layers of each step's network; by default one layer of
        ``max(100, 2 * dim)``.
    """

    options: ClassVar[tuple[str, ...]] = ("flows", "flow_hidden")
    step: ClassVar[type[Coupling | Autoregressive]]

    def __init__(self, dim: int, flows: int = 4, flow_hidden: Sequence[int] | None = None) -> None:
        super().__init__(dim)
        self.heads = (dim, dim, 2 * dim)
        self.steps = make_steps(self.step, dim, flows, flow_hidden, context=2 * dim)

    def forward(self, params: Tensor) -> TorchDistribution:
        dim = self.heads[0]
        mean, log_sigma, context = params.tensor_split((dim, 2 * dim), -1)
        return FlowNormal(dist.Normal(mean, log_sigma.exp()).to_event(1), self.steps, context)


class CouplingPosterior(FlowPosterior):
    """A :class:`FlowPosterior` of :class:`pyrovae.parts.Coupling` steps: fast at its own draws and anywhere else.

    Rezende and Mohamed, *Variational inference with normalizing flows*, 2015; Dinh, Sohl-Dickstein and Bengio, *Density
    estimation using Real NVP*, 2017.
    """

    step = Coupling


class AutoregressivePosterior(FlowPosterior):
    """Inverse autoregressive flow: a :class:`FlowPosterior` of :class:`pyrovae.parts.Autoregressive` steps.

    More flexible by the step, and as fast at its own draws, which is all that ``gradient="total"`` asks for. The
    density anywhere else, which ``"dreg"``, ``"stl"`` and the prior ``"vamp"`` ask for, takes ``dim`` passes for each
    step.

    Kingma et al., *Improving variational inference with inverse autoregressive flow*, 2016.
    """

    step = Autoregressive


POSTERIORS: dict[str, type[DiagonalNormal]] = {
    "diagonal": DiagonalNormal,
    "full": FullNormal,
    "flow": CouplingPosterior,
    "iaf": AutoregressivePosterior,
}


def make_steps(
    step: type[Coupling | Autoregressive], dim: int, flows: int, flow_hidden: Sequence[int] | None, context: int = 0
) -> Sequence[Step]:
    """Steps of one kind, every second one the other way round."""
    if dim < 2:
        raise ValueError(f"a flow needs at least 2 latent units, got {dim}: take more, or a prior or posterior without")
    hidden = (max(100, 2 * dim),) if flow_hidden is None else sizes("flow_hidden", flow_hidden)
    return module_list(step(dim, context, hidden, flip=i % 2 == 1) for i in range(positive_int("flows", flows)))


def centre(q: TorchDistribution) -> Tensor:
    """One point that stands for a distribution: the mean, or for a flow the image of the base's mean."""
    point: Tensor = q.centre if isinstance(q, FlowNormal) else q.mean
    return point


def share_options(
    options: Mapping[str, object], **choices: tuple[str, Mapping[str, type[HasOptions]]]
) -> tuple[dict[str, Any], ...]:
    """Sort options by the choice that has them; None stands for an option that is not given.

    :param choices: for each argument its value, and the table of classes that it chooses from.
    :return: for each choice the options that are its own; an option of several goes to all of them.
    :raises ValueError: an unknown choice, or an option that none of them has.

    >>> share_options({"flows": 3}, posterior=("iaf", POSTERIORS))
    ({'flows': 3},)
    >>> share_options({"flows": 3}, posterior=("full", POSTERIORS))
    Traceback (most recent call last):
    ...
    ValueError: posterior='full' has no flows, got flows=3: leave it out, or use posterior='flow' or posterior='iaf'
    """
    given = {name: value for name, value in options.items() if value is not None}
    chosen = [lookup(argument, name, table) for argument, (name, table) in choices.items()]
    owners = {(argument, name): cls for argument, (_, table) in choices.items() for name, cls in table.items()}
    for option, value in given.items():
        one_of("option", option, sorted({known for cls in owners.values() for known in cls.options}))
        if not any(option in cls.options for cls in chosen):
            asked = " with ".join(f"{argument}={name!r}" for argument, (name, _) in choices.items())
            others = " or ".join(f"{arg}={name!r}" for (arg, name), cls in owners.items() if option in cls.options)
            raise ValueError(f"{asked} has no {option}, got {option}={value!r}: leave it out, or use {others}")
    return tuple({name: value for name, value in given.items() if name in cls.options} for cls in chosen)


def make_posterior(name: str, dim: int, **options: object) -> DiagonalNormal:
    """The posterior of that name; options that it does not have are refused.

    :raises ValueError: an unknown name, or an option that this posterior does not have.

    >>> make_posterior("iaf", 5, flows=2).heads
    (5, 5, 10)
    """
    (own,) = share_options(options, posterior=(name, POSTERIORS))
    return POSTERIORS[name](dim, **own)
