r"""Normalizing flows: a normal pushed through invertible steps, with the log-density of its own draws at no cost.

A step is one module with a forward map and its inverse, each with :math:`\log |\det \partial y / \partial x|`. It may
take a context :math:`h`, by which the flow of one datum differs from that of another. All steps here are affine in
what they move, :math:`y = m + s\, x` with :math:`|\log s| < 2`, so that their inverses are well conditioned, and start
as the identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, cast

import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn

from pyrovae.arguments import positive_int, sizes
from pyrovae.nn.mlp import MLP
from pyrovae.parts.shared import Constraints, Shape


class Step(nn.Module):
    """One invertible map of vectors ``[..., dim]``, given a context ``[..., context]`` where it takes one."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y, and the log-determinant ``[...]`` at x."""
        raise NotImplementedError

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The x that is mapped to y, and the same log-determinant, that of the forward map at x."""
        raise NotImplementedError


def bounded(raw: Tensor) -> Tensor:
    """The logarithm of a scale, within 2 on either side."""
    return 2 * torch.tanh(raw / 2)


@torch.no_grad()
def start_as_identity(output: nn.Linear) -> None:
    """Start at no shift and a scale of one."""
    output.weight.zero_()
    output.bias.zero_()


class Coupling(Step):
    r"""Move one half of the vector by what a network reads in the other; fast in both directions.

    .. math:: y_a = x_a, \qquad y_b = m(x_a, h) + s(x_a, h)\, x_b, \qquad \log|\det| = \sum \log s

    :param dim: size of the vector, at least 2.
    :param context: size of the context, 0 for none.
    :param hidden: widths of the network's layers.
    :param flip: which half moves: the first instead of the second.

    >>> step = Coupling(3, hidden=(8,))
    >>> x = torch.randn(5, 3)
    >>> torch.allclose(step.inverse(step(x)[0])[0], x)
    True

    Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, 2017.
    """

    def __init__(self, dim: int, context: int = 0, hidden: Sequence[int] = (100,), flip: bool = False) -> None:
        super().__init__()
        self.split, self.flip = positive_int("dim", dim, minimum=2) // 2, flip
        first, second = self.split, dim - self.split
        kept, moved = (second, first) if flip else (first, second)
        self.network = MLP(kept + context, hidden, (moved, moved), "elu")
        start_as_identity(self.network.output)

    def read(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The half that stays, the half that moves, and what the first says of the second: shift and log-scale."""
        first, second = x.tensor_split((self.split,), -1)
        kept, moved = (second, first) if self.flip else (first, second)
        seen = kept if context is None else torch.cat([kept, context.expand(*kept.shape[:-1], -1)], -1)
        shift, raw = self.network(seen).chunk(2, -1)
        return kept, moved, shift, bounded(raw)

    def join(self, kept: Tensor, moved: Tensor) -> Tensor:
        return torch.cat([moved, kept] if self.flip else [kept, moved], -1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, moved, shift, log_scale = self.read(x, context)
        return self.join(kept, shift + log_scale.exp() * moved), log_scale.sum(-1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, moved, shift, log_scale = self.read(y, context)
        return self.join(kept, (moved - shift) * (-log_scale).exp()), log_scale.sum(-1)


class Autoregressive(Step):
    r"""Move every element by what a masked network (MADE) reads in those before it.

    .. math:: y_i = m_i(x_{<i}, h) + s_i(x_{<i}, h)\, x_i, \qquad \log|\det| = \sum_i \log s_i

    The forward map is one pass of the network; the inverse finds one element after the other, ``dim`` passes.

    :param dim: size of the vector, at least 2.
    :param context: size of the context.
    :param hidden: widths of the network's layers, none below ``dim``.
    :param flip: go through the elements in the opposite order.

    >>> step = Autoregressive(3, context=2, hidden=(8,))
    >>> x, h = torch.randn(5, 3), torch.randn(5, 2)
    >>> torch.allclose(step.inverse(step(x, h)[0], h)[0], x)
    True

    Germain, Gregor, Murray and Larochelle, *MADE*, 2015; Kingma et al., *Improving variational inference with inverse
    autoregressive flow*, 2016.
    """

    rank: Tensor

    def __init__(self, dim: int, context: int, hidden: Sequence[int] = (100,), flip: bool = False) -> None:
        super().__init__()
        self.dim = positive_int("dim", dim, minimum=2)
        widths = sizes("hidden", hidden)
        if not widths or min(widths) < dim:
            raise ValueError(f"an autoregressive network of {dim} units has hidden layers of {dim} or more units each, "
                             f"got {widths}: widen them")  # fmt: skip
        order = cast(torch.LongTensor, torch.arange(dim).flip(0) if flip else torch.arange(dim))
        self.register_buffer("rank", order, persistent=False)  # either order is its own inverse
        self.network = ConditionalAutoRegressiveNN(dim, context, list(widths), permutation=order, nonlinearity=nn.ELU())
        start_as_identity(cast(nn.Linear, self.network.layers[-1]))

    def shift_and_log_scale(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of every element, as those before it say."""
        shift, raw = self.network(x, context)
        return shift, bounded(raw)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.shift_and_log_scale(x, context)
        return shift + log_scale.exp() * x, log_scale.sum(-1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = torch.zeros_like(y)
        for last in range(self.dim):  # what has been found so far says what the next element is
            shift, log_scale = self.shift_and_log_scale(x, context)
            x = torch.where(self.rank <= last, (y - shift) * (-log_scale).exp(), 0.0)
        return x, log_scale.sum(-1)


class FlowNormal(TorchDistribution):
    r"""A diagonal normal pushed through steps :math:`T = T_L \circ \cdots \circ T_1`.

    .. math:: z = T(\epsilon), \quad \epsilon \sim N(\mu, \mathrm{diag}\,\sigma^2), \qquad
              \log q(z) = \log N(\epsilon) - \sum_l \log |\det T_l'|

    The log-density of its own last draw is known from drawing it, and :meth:`log_prob` recognises that draw by
    identity; any other value, a detached copy among them, is sent back through the steps' inverses. Both carry the
    gradient that they should: total for the draw, at fixed z for the copy. The mean has no closed form; :attr:`centre`
    has.

    Shapes: batch shape that of ``base``, event shape ``[dim]``; nats.

    :param base: an independent normal of event shape ``[dim]``.
    :param steps: the steps, the first to be applied first.
    :param context: that of all steps, ``[*batch, context]`` or broadcastable to it.

    >>> from pyro.distributions import Normal
    >>> q = FlowNormal(Normal(torch.zeros(4, 2), 1.0).to_event(1), [Coupling(2), Coupling(2, flip=True)])
    >>> z = q.rsample()
    >>> torch.allclose(q.log_prob(z), q.log_prob(z.detach()))
    True

    Rezende and Mohamed, *Variational inference with normalizing flows*, 2015.
    """

    arg_constraints: ClassVar[Constraints] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        base: TorchDistribution,
        steps: Iterable[Step],
        context: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.base, self.steps, self.context = base, tuple(steps), context
        self._drawn: tuple[Tensor, Tensor, bool] | None = None
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> FlowNormal:
        return FlowNormal(self.base.expand(torch.Size(batch_shape)), self.steps, self.context, self._validate_args)

    def push(self, x: Tensor, back: bool = False) -> tuple[Tensor, Tensor | float]:
        """T(x), or the x that becomes it, and the log-determinant at x."""
        total: Tensor | float = 0.0
        for step in reversed(self.steps) if back else self.steps:
            x, log_det = step.inverse(x, self.context) if back else step(x, self.context)
            total = total + log_det
        return x, total

    @property
    def centre(self) -> Tensor:
        r""":math:`T(\mu)`, where the base's mean goes, ``[*batch, dim]``: a point in the midst, not the mean."""
        return self.push(self.base.mean)[0]

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        x = self.base.rsample(sample_shape)
        z, log_det = self.push(x)
        self._drawn = z, self.base.log_prob(x) - log_det, torch.is_grad_enabled()
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(value), ``[*batch]``."""
        if self._validate_args:
            self._validate_sample(value)
        if self._drawn is not None and value is self._drawn[0]:
            _, log_q, with_graph = self._drawn
            # A draw made without gradients, or cut off in place since, has another derivative than it had when drawn.
            if not torch.is_grad_enabled() or (with_graph and value.requires_grad == log_q.requires_grad):
                return log_q
        shape = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
        x, log_det = self.push(value.expand(shape), back=True)
        return self.base.log_prob(x) - log_det
