"""The restricted Boltzmann machine: what came before VAEs, as a Pyro program with a measured log p(x)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from pyrovae.arguments import DataError, in_range, one_of, pick_device, positive_int, sizes
from pyrovae.data.feed import Feed
from pyrovae.data.support import check_support
from pyrovae.engine.randomness import isolated_rng
from pyrovae.models.base import Pair
from pyrovae.models.contrastive import Equilibrium, _mean
from pyrovae.models.partition import LARGEST, Memo, anneal, bits, enumerate_states, without_gradient
from pyrovae.progress import ProgressBar
from pyrovae.schedules import Schedule, make_schedule

PROBE = 1000  # data on which an epoch's metrics are measured


class RBM(Pair):
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
    base_visible: Tensor
    base_hidden: Tensor
    chains: Tensor

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
        self._memo = Memo()

    # --- the distribution ----------------------------------------------------------------------------------------

    def free_energy(self, v: Tensor) -> Tensor:
        """F(v), ``[..., *input_shape]`` to ``[...]``."""
        self._check_bits(v)
        return self._free_energy(v)

    def log_prob(self, v: Tensor) -> Tensor:
        """log p(v), ``[..., *input_shape]`` to ``[...]``; where log Z is estimated, with that one estimate."""
        self._check_bits(v)
        return self._log_prob(v)

    def hidden(self, v: Tensor) -> TorchDistribution:
        """P(h | v), event ``[num_hidden]``."""
        return dist.Bernoulli(logits=self._field(self._flat(v))).to_event(1)

    def visible(self, h: Tensor) -> TorchDistribution:
        """P(v | h), event ``input_shape``."""
        logits = self._echo(h).unflatten(-1, self.input_shape)
        return dist.Bernoulli(logits=logits).to_event(len(self.input_shape))

    @torch.no_grad()
    def gibbs(self, v: Tensor, steps: int = 1) -> Tensor:
        """Draw h given v and v given h, ``steps`` times over: ``[..., *input_shape]`` to the same."""
        flat = self._flat(v)
        for _ in range(positive_int("steps", steps)):
            flat = bits(self._echo(bits(self._field(flat).sigmoid())).sigmoid())
        return flat.unflatten(-1, self.input_shape)

    def _free_energy(self, v: Tensor) -> Tensor:
        v = self._flat(v)
        return -(v @ self.visible_bias) - softplus(self._field(v)).sum(-1)

    def _log_prob(self, v: Tensor) -> Tensor:
        return -self._free_energy(v) - self.log_partition()

    def _field(self, v: Tensor) -> Tensor:
        """What the hidden units receive, from ``[..., num_visible]``."""
        return v @ self.weight + self.hidden_bias

    def _echo(self, h: Tensor) -> Tensor:
        """What the visible units receive, from ``[..., num_hidden]``."""
        return h @ self.weight.T + self.visible_bias

    def _flat(self, v: Tensor) -> Tensor:
        return v.flatten(-len(self.input_shape)).to(self.weight.dtype)

    def _check_bits(self, v: Tensor) -> None:
        if v.shape[-len(self.input_shape) :] != self.input_shape:
            raise DataError(f"data must be [..., *{self.input_shape}], got {tuple(v.shape)}: reshape them")
        check_support(v, constraints.boolean)

    # --- the partition function ----------------------------------------------------------------------------------

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
        parameters = self.weight, self.visible_bias, self.hidden_bias
        state = (*parameters, self.base_visible, self.base_hidden)
        if method == "ais" or self.likelihood_is != "exact":
            chains = positive_int("chains", self.ais_chains if chains is None else chains, minimum=2)
            steps = positive_int("steps", self.ais_steps if steps is None else steps)
            with isolated_rng(seed):
                found = self._memo(state, (chains, steps, seed), partial(anneal, *state, chains, steps))
            log_z, error = without_gradient(found.log_z, parameters), found.std_error
        else:
            exact = partial(enumerate_states, *parameters)
            learning = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
            log_z = exact() if learning else self._memo(state, "exact", exact)
            error = torch.zeros_like(log_z)
        return (log_z, error) if return_std_error else log_z

    def log_prob_error(self) -> float:
        """The standard error of log Z, which is that of every log p(v)."""
        return self.log_partition(return_std_error=True)[1].item()

    # --- the pair ------------------------------------------------------------------------------------------------

    def model(self, x: Tensor) -> Tensor:
        """p(x) over the plate ``"data"``, with ``x`` observed."""
        self.check(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("x", Equilibrium(self, torch.Size([len(x)])), obs=x)

    def guide(self, x: Tensor) -> None:
        """Nothing: the model has no latent site."""
        self.check(x)

    # --- training ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, x: Tensor) -> RBM:
        r"""Start the visible biases at the logits of the data's mean, clipped to [.001, .999]; returns the RBM."""
        self.check(x)
        self.base_visible.copy_(_logit(x.flatten(1).mean(0, dtype=torch.float64)))
        self.visible_bias.copy_(self.base_visible)
        return self

    def contrastive_divergence(self, v: Tensor, start: Tensor | None = None, steps: int = 1) -> tuple[Tensor, Tensor]:
        r"""A scalar whose gradient is that of CD-k, and the chains' new states ``[C, *input_shape]``.

        .. math:: \frac{1}{B} \sum_b F(v_b) - \frac{1}{C} \sum_i F(\tilde v_i)

        with :math:`\tilde v` the chains after k Gibbs steps, taken as constants. At the model's own distribution they
        make the gradient that of the mean -log p(v); after few steps it is biased, and no function's gradient. The
        value is not a bound on anything.

        :param v: data ``[B, *input_shape]``.
        :param start: where the chains start; None starts them at the data (CD-k), the states returned last make it
            persistent.
        :param steps: k.
        """
        states = self.gibbs(v if start is None else start, steps)
        return self._free_energy(v).mean() - self._free_energy(states).mean(), states

    def fit(
        self,
        data: Any,
        *,
        epochs: int = 50,
        batch_size: int = 100,
        lr: float = 0.01,
        schedule: str | Schedule = "cosine",
        cd_steps: int = 1,
        persistent: bool = False,
        chains: int | None = None,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        validation: Any = None,
        device: str | torch.device = "auto",
        seed: int = 0,
        progress: bool | None = None,
    ) -> list[dict[str, float]]:
        r"""Train by contrastive divergence: gradient descent with momentum along :meth:`contrastive_divergence`.

        What is followed is no bound, and nothing in the history is one: *pseudo_log_likelihood* (of one pixel given
        all others, times their number; estimated on one pixel of each datum), *reconstruction_error* (squared, summed
        over pixels), and with ``validation`` *free_energy_gap*, the mean F of the validation data less that of as many
        training data, which grows as the machine overfits. Measure :meth:`log_prob`.

        :param data: as :func:`pyrovae.fit` takes them, zeros and ones (or binarised dynamically); labels are left out.
        :param epochs: passes over the data.
        :param batch_size: data per step.
        :param lr: learning rate; with momentum m, steps are up to 1 / (1 - m) times as long.
        :param schedule: "constant", "cosine", "linear", "iwae", or a function of progress in [0, 1) that gives the
            factor of lr.
        :param cd_steps: k, Gibbs steps per gradient.
        :param persistent: let the chains go on from step to step (persistent contrastive divergence), and on from
            where the last fit left them.
        :param chains: number of persistent chains, by default ``batch_size``.
        :param momentum: of the gradient, in [0, 1).
        :param weight_decay: pull of the weights to 0, per unit of lr.
        :param validation: data for the free-energy gap.
        :param device: "auto" (CUDA where there is one), "cpu", "cuda", ...; the machine stays there.
        :param seed: of the chains, the order of the data and their binarisation; the global generator is left as found.
        :param progress: show a progress bar; None shows it on terminals only.
        :return: one row per epoch.
        :raises DataError: for data other than zeros and ones.
        :raises ValueError: for arguments out of range.
        :raises FloatingPointError: where a parameter is no longer finite.

        Hinton, *Training products of experts by minimizing contrastive divergence*, 2002; Tieleman, *Training
        restricted Boltzmann machines using approximations to the likelihood gradient*, 2008.
        """
        epochs, cd_steps = positive_int("epochs", epochs), positive_int("cd_steps", cd_steps)
        batch_size = positive_int("batch_size", batch_size)
        if chains is not None and not persistent:
            raise ValueError(f"chains={chains} are those of persistent=True: pass that, or leave chains out")
        number = batch_size if chains is None else positive_int("chains", chains)
        rate, factor = in_range("lr", lr, 0.0), make_schedule(schedule)
        groups: list[dict[str, Any]] = [
            {"params": [self.weight], "weight_decay": in_range("weight_decay", weight_decay, 0.0)},
            {"params": [self.visible_bias, self.hidden_bias]},
        ]
        optimizer = torch.optim.SGD(groups, momentum=in_range("momentum", momentum, 0.0, 0.999))
        place, history = pick_device(device), []
        with isolated_rng(seed), ProgressBar("RBM", epochs, progress) as bar:
            feed = self._feed(data, batch_size, place)
            probes = [feed.first(PROBE)[0]]
            if validation is not None:
                probes.append(self._feed(validation, batch_size, place).first(PROBE)[0])
            self.to(place)
            self.base_visible.copy_(_logit(_mean(feed)))
            if persistent and len(self.chains) != number:
                self.chains = bits(self.base_visible.sigmoid().expand(number, -1))
            for epoch in range(epochs):
                began, now = time.perf_counter(), rate * factor(epoch / epochs)
                self._epoch(feed, optimizer, now, cd_steps, persistent)
                row = {"epoch": epoch + 1, "seconds": time.perf_counter() - began, "learning_rate": now}
                history.append(row | self._metrics(*probes))
                bar.update(epoch + 1, f"pseudo log p {history[-1]['pseudo_log_likelihood']:.1f}")
            with torch.no_grad():
                self.base_hidden.copy_(_logit(self.encode(probes[0]).mean(0)))
        return history

    train_on = fit

    def _epoch(self, feed: Feed, optimizer: torch.optim.Optimizer, lr: float, cd_steps: int, persistent: bool) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr
        for v, *_ in feed:
            start = self.chains.unflatten(-1, self.input_shape) if persistent else None
            loss, states = self.contrastive_divergence(v, start, cd_steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if persistent:
                self.chains = states.flatten(1)
        if not all(torch.isfinite(p).all() for p in self.parameters()):
            raise FloatingPointError("a parameter of the RBM became NaN or infinite: lower lr")

    def _feed(self, data: Any, batch_size: int, place: torch.device) -> Feed:
        feed = Feed(data, batch_size, place)
        self.check(feed.first()[0])
        feed.check(0, constraints.boolean, "x", torch.Size(self.input_shape))
        return feed

    @torch.no_grad()
    def _metrics(self, v: Tensor, held_out: Tensor | None = None) -> dict[str, float]:
        flat = self._flat(v)
        pixel = torch.randint(self.num_visible, (len(flat), 1), device=flat.device)
        other = flat.scatter(1, pixel, 1 - flat.gather(1, pixel)).view_as(v)
        odds = self._free_energy(other) - self._free_energy(v)
        found = {
            "pseudo_log_likelihood": self.num_visible * logsigmoid(odds).mean().item(),
            "reconstruction_error": (self.reconstruct(v) - v).square().flatten(1).sum(-1).mean().item(),
        }
        if held_out is not None:
            gap = self._free_energy(held_out).mean() - self._free_energy(v[: len(held_out)]).mean()
            found["free_energy_gap"] = gap.item()
        return found

    # --- verbs ---------------------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Tensor:
        """P(h = 1 | v), ``[..., *input_shape]`` to ``[..., num_hidden]``."""
        return self._field(self._flat(x)).sigmoid()

    def decode(self, z: Tensor) -> Tensor:
        """P(v = 1 | h), ``[..., num_hidden]`` to ``[..., *input_shape]``; of probabilities, the mean field's."""
        return self.visible(z).mean

    def interpolate(
        self, a: Tensor, b: Tensor, *labels: Any, steps: int = 9, path: str = "linear", **where: Any
    ) -> Tensor:
        """What lies between pairs of data, by mixing P(h = 1 | v) linearly: the mixtures are probabilities again."""
        if path == "spherical":
            self.refuse("spherical path", "its codes are probabilities, which would leave [0, 1]; use linear")
        return super().interpolate(a, b, *labels, steps=steps, path=path, **where)

    def traverse(self, x: Tensor, *labels: Any, **options: Any) -> NoReturn:
        """Refused: hidden units are 0 or 1; decode both."""
        self.refuse("traverse", "its hidden units are 0 or 1, with nothing between or beyond; decode both")


def _logit(mean: Tensor) -> Tensor:
    return mean.clamp(0.001, 0.999).logit()
