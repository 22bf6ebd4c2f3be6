"""The restricted Boltzmann machine: what came before VAEs, as a Pyro program with a measured log p(x)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn

from pyrovae.arguments import one_of, positive_int, sizes
from pyrovae.engine.support import check_support
from pyrovae.errors import DataError
from pyrovae.models.contrastive import ContrastiveDivergence, clipped_logit
from pyrovae.models.partition import LARGEST, LogPartition, bits
from pyrovae.parts.shared import Constraints, Shape


class RBM(ContrastiveDivergence):
    r"""Restricted Boltzmann machine with binary visible and hidden units.

    .. math:: p(v, h) = \tfrac1Z e^{-E(v, h)}, \qquad E(v, h) = -b^\top v - c^\top h - v^\top W h

    .. math:: P(h_j = 1 \mid v) = \sigma(c_j + (v^\top W)_j), \qquad P(v_i = 1 \mid h) = \sigma(b_i + (W h)_i)

    .. math:: \log p(v) = -F(v) - \log Z, \qquad F(v) = -b^\top v - \sum_j \log\big(1 + e^{c_j + (v^\top W)_j}\big)

    The model observes ``"x"`` with this p(v); there is nothing for the guide to draw, as h is summed out. log Z is
    exact where one side has at most 20 units (``likelihood_is == "exact"``), and annealed importance sampling's
    estimate otherwise (see :meth:`log_partition`).

    Train it with :meth:`fit`, contrastive divergence. Where log Z is exact the pair has its exact gradient too, so
    :func:`pyrovae.fit` with ``ELBO()`` is maximum likelihood; where it is not, that is refused at the first gradient.

    Draws (``pyrovae.sample``) are the ends of chains that start from noise, each pixel on with probability 1/2, and
    take ``burn_in`` Gibbs steps; their means are P(v | h) at the last one.

    Shapes: Data is ``[B, *input_shape]``, of zeros and ones; the plate ``"data"`` is at dim -1. Nats throughout.

    :param num_visible: number of visible units, or the shape of one datum, such as ``(1, 28, 28)``.
    :param num_hidden: number of hidden units.
    :param ais_chains: chains of the annealing by which log Z is estimated.
    :param ais_steps: temperatures of that annealing.
    :param burn_in: Gibbs steps from noise to a draw.
    :ivar weight: W, ``[num_visible, num_hidden]``; it starts from N(0, 0.01^2).
    :ivar visible_bias: b, ``[num_visible]``.
    :ivar hidden_bias: c, ``[num_hidden]``.
    :ivar base_visible: logits of the data's mean, ``[num_visible]``, where annealing starts; 0 before :meth:`fit`.
    :ivar base_hidden: logits of the mean of P(h = 1 | v) over data, ``[num_hidden]``, likewise.
    :raises TypeError, ValueError: at construction, for arguments out of range.
    :raises DataError: for data of another shape, or that are not zeros and ones.

    >>> x = torch.rand(200, 1, 4, 4).round()
    >>> rbm = RBM((1, 4, 4), num_hidden=8).initialise(x)
    >>> history = rbm.fit(x, epochs=2)
    >>> rbm.encode(x).shape, rbm.log_prob(x).shape
    (torch.Size([200, 8]), torch.Size([200]))

    Smolensky, *Information processing in dynamical systems: foundations of harmony theory*, 1986; Hinton, *Training
    products of experts by minimizing contrastive divergence*, 2002; Hinton, *A practical guide to training restricted
    Boltzmann machines*, 2012.
    """

    observes_bits = True

    def __init__(
        self,
        num_visible: int | Sequence[int],
        num_hidden: int = 500,
        *,
        ais_chains: int = 100,
        ais_steps: int = 10_000,
        burn_in: int = 1000,
    ) -> None:
        super().__init__()
        number = isinstance(num_visible, int | np.integer)
        shape = (positive_int("num_visible", num_visible),) if number else sizes("num_visible", num_visible)
        self.num_visible = math.prod(self.set_shape(shape))
        self.num_hidden = positive_int("num_hidden", num_hidden)
        self.ais_chains = positive_int("ais_chains", ais_chains, minimum=2)
        self.ais_steps = positive_int("ais_steps", ais_steps)
        self.burn_in = positive_int("burn_in", burn_in)
        self.likelihood_is = "exact" if min(self.num_visible, self.num_hidden) <= LARGEST else "annealed"
        self.weight = nn.Parameter(0.01 * torch.randn(self.num_visible, self.num_hidden))
        self.visible_bias = nn.Parameter(torch.zeros(self.num_visible))
        self.hidden_bias = nn.Parameter(torch.zeros(self.num_hidden))
        self.register_buffer("base_visible", torch.zeros(self.num_visible))
        self.register_buffer("base_hidden", torch.zeros(self.num_hidden))
        self.register_buffer("chains", torch.zeros(0, self.num_visible), persistent=False)
        self.known_partition = LogPartition()

    def free_energy(self, v: Tensor) -> Tensor:
        """F(v), ``[..., *input_shape]`` to ``[...]``."""
        self.check_bits(v)
        return self.energy.free(self.flat(v))

    def log_prob(self, v: Tensor) -> Tensor:
        """log p(v), ``[..., *input_shape]`` to ``[...]``; where log Z is estimated, with that one estimate."""
        return -self.free_energy(v) - self.log_partition()

    def hidden(self, v: Tensor) -> TorchDistribution:
        """P(h | v), event ``[num_hidden]``."""
        return dist.Bernoulli(logits=self.energy.hidden_logits(self.flat(v))).to_event(1)

    def visible(self, h: Tensor) -> TorchDistribution:
        """P(v | h), event ``input_shape``."""
        logits = self.energy.visible_logits(h).unflatten(-1, self.input_shape)
        return dist.Bernoulli(logits=logits).to_event(len(self.input_shape))

    def check_bits(self, v: Tensor) -> None:
        """A DataError for data of another shape, or that are not zeros and ones."""
        if v.shape[-len(self.input_shape) :] != self.input_shape:
            raise DataError(f"data must be [..., *{self.input_shape}], got {tuple(v.shape)}: reshape them")
        check_support(v, constraints.boolean)

    def log_partition(
        self,
        *,
        return_std_error: bool = False,
        method: str = "auto",
        chains: int | None = None,
        steps: int | None = None,
        seed: int = 0,
    ) -> Any:
        r"""log Z, 0-d in float64: exact where one side has at most 20 units, otherwise by annealed importance sampling.

        .. math:: Z = \sum_v e^{-F(v)}, \qquad \mathbb E[\hat Z] = Z, \qquad \mathbb E[\log \hat Z] \leq \log Z

        By Jensen's inequality the estimated log Z is too low on average, and every log p(v) too *high*: not a bound on
        the safe side. The standard error is honest only where the chains have found all modes; more steps must leave
        the estimate where it is.

        Kept until a parameter changes its value, so that all log p(v) share one log Z. Differentiable where exact; a
        gradient of the estimate is refused.

        :param return_std_error: return the standard error as well (0 where exact): ``(log_z, std_error)``.
        :param method: "exact", "ais", or "auto".
        :param chains: of the annealing, by default ``ais_chains``.
        :param steps: of the annealing, by default ``ais_steps``.
        :param seed: of the annealing; the global generator is left as it was.
        :raises ValueError: for "exact" with more than 20 units on either side.

        >>> rbm = RBM(30, 10)
        >>> estimate, error = rbm.log_partition(method="ais", steps=100, return_std_error=True)
        >>> bool((rbm.log_partition() - estimate).abs() < 5 * error)
        True

        Neal, *Annealed importance sampling*, 2001; Salakhutdinov and Murray, *On the quantitative analysis of deep
        belief networks*, 2008.
        """
        one_of("method", method, ("auto", "exact", "ais"))
        if method == "exact" and self.likelihood_is != "exact":
            raise ValueError(
                f"an exact log Z needs at most {LARGEST} units on one side, got {self.num_visible} and "
                f'{self.num_hidden}: pass method="ais"'
            )
        base = self.base_visible, self.base_hidden
        if method == "ais" or self.likelihood_is != "exact":
            chains = positive_int("chains", self.ais_chains if chains is None else chains, minimum=2)
            steps = positive_int("steps", self.ais_steps if steps is None else steps)
            found = self.known_partition.estimate(self.energy, base, chains=chains, steps=steps, seed=seed)
        else:
            found = self.known_partition.exact(self.energy, base)
        return tuple(found) if return_std_error else found.log_z

    def log_prob_error(self) -> float:
        """The standard error of log Z, which is that of every log p(v)."""
        return self.log_partition(return_std_error=True)[1].item()

    def model(self, x: Tensor) -> Tensor:
        """p(x) over the plate ``"data"``, with ``x`` observed."""
        self.check(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("x", Marginal(self, torch.Size([len(x)])), obs=x)

    def guide(self, x: Tensor) -> None:
        """Nothing: the model has no latent site."""
        self.check(x)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> RBM:
        r"""Start the visible biases at the logits of the data's mean, clipped to [.001, .999]; returns the RBM."""
        self.check(x)
        self.base_visible.copy_(clipped_logit(x.flatten(1).mean(0, dtype=torch.float64)))
        self.visible_bias.copy_(self.base_visible)
        return self

    def encode(self, x: Tensor) -> Tensor:
        """P(h = 1 | v), ``[..., *input_shape]`` to ``[..., num_hidden]``."""
        return self.energy.hidden_logits(self.flat(x)).sigmoid()

    def decode(self, z: Tensor) -> Tensor:
        """P(v = 1 | h), ``[..., num_hidden]`` to ``[..., *input_shape]``; of probabilities, the mean field's."""
        return self.visible(z).mean

    def interpolate(self, a: Tensor, b: Tensor, *labels: Any, path: str = "linear", **options: Any) -> Tensor:
        """What lies between pairs of data, by mixing P(h = 1 | v) linearly: the mixtures are probabilities again."""
        if path == "spherical":
            self.refuse("spherical path", "its codes are probabilities, which would leave [0, 1]; use linear")
        return super().interpolate(a, b, *labels, path=path, **options)

    def traverse(self, x: Tensor, *labels: Any, **options: Any) -> NoReturn:
        """Refused: hidden units are 0 or 1; decode both."""
        self.refuse("traverse", "its hidden units are 0 or 1, with nothing between or beyond; decode both")


class Marginal(TorchDistribution):
    r"""The marginal p(v) of an :class:`RBM`.

    ``sample`` runs one chain per draw, from noise through ``rbm.burn_in`` Gibbs steps; an approximation, like all of a
    chain's draws. ``mean`` is P(v | h) at the last step of the chains drawn last (of new ones, where none were): what
    to look at, less noisy than a draw, and not the mean over chains.

    >>> Marginal(RBM((1, 4, 4), 8), (5,)).sample().shape
    torch.Size([5, 1, 4, 4])
    """

    arg_constraints: ClassVar[Constraints] = {}

    def __init__(self, rbm: RBM, batch_shape: Sequence[int] = (), validate_args: bool | None = None) -> None:
        self.rbm = rbm
        self.last: Tensor | None = None
        super().__init__(torch.Size(batch_shape), torch.Size(rbm.input_shape), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.boolean, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> Marginal:
        return Marginal(self.rbm, batch_shape, validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self.rbm.check_bits(value)
        log_p = -self.rbm.energy.free(self.rbm.flat(value)) - self.rbm.log_partition()
        return log_p.expand(torch.broadcast_shapes(log_p.shape, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Shape = ()) -> Tensor:
        rbm, shape = self.rbm, self._extended_shape(sample_shape)
        v = rbm.gibbs(torch.rand(shape, dtype=rbm.weight.dtype, device=rbm.weight.device).round(), rbm.burn_in)
        self.last = rbm.decode(bits(rbm.encode(v)))
        return bits(self.last)

    @property
    def mean(self) -> Tensor:
        if self.last is None:
            self.sample()
        assert self.last is not None
        return self.last
