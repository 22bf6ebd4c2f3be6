r"""The energy of visible and hidden bits, and its partition function: by enumeration, and by annealing.

.. math:: Z = \sum_{v, h} \exp(b^\top v + c^\top h + v^\top W h)

Shapes: ``weight`` is W, ``[V, H]``; ``visible`` and ``hidden`` are the biases b ``[V]`` and c ``[H]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from pyrovae.engine.randomness import isolated_rng

LARGEST = 20  # units of the smaller side that are enumerated
CHUNK = 2**22  # numbers held at a time


def bits(probabilities: Tensor) -> Tensor:
    """Independent Bernoulli draws, of the dtype of their probabilities."""
    return torch.rand_like(probabilities).lt(probabilities).to(probabilities.dtype)


class Energy(NamedTuple):
    r""":math:`E(v, h) = -b^\top v - c^\top h - v^\top W h`.

    Shapes: v is ``[..., V]``, h ``[..., H]``.

    :ivar weight: W, ``[V, H]``.
    :ivar visible: b, ``[V]``.
    :ivar hidden: c, ``[H]``.
    """

    weight: Tensor
    visible: Tensor
    hidden: Tensor

    def hidden_logits(self, v: Tensor) -> Tensor:
        """Of P(h = 1 | v)."""
        return v @ self.weight + self.hidden

    def visible_logits(self, h: Tensor) -> Tensor:
        """Of P(v = 1 | h)."""
        return h @ self.weight.T + self.visible

    def free(self, v: Tensor) -> Tensor:
        r""":math:`F(v) = -\log \sum_h e^{-E(v, h)}`, ``[...]``."""
        return -(v @ self.visible) - softplus(self.hidden_logits(v)).sum(-1)


def enumerate_states(weight: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
    r"""log Z exactly, 0-d in float64 and differentiable: a sum over all states of the smaller side.

    .. math:: \log Z = \log \sum_h \exp\Big(c^\top h + \sum_i \zeta(b_i + (W h)_i)\Big), \qquad
              \zeta(a) = \log(1 + e^a)
    """
    if weight.shape[0] < weight.shape[1]:
        weight, visible, hidden = weight.T, hidden, visible
    weight, visible, hidden = weight.double(), visible.double(), hidden.double()
    units = torch.arange(len(hidden), device=hidden.device)

    def part(codes: Tensor) -> Tensor:
        states = (codes.unsqueeze(-1) >> units & 1).double()
        return torch.logsumexp(states @ hidden + softplus(states @ weight.T + visible).sum(-1), 0)

    chunks = torch.arange(2 ** len(hidden), device=hidden.device).split(max(CHUNK // len(visible), 1))
    if len(chunks) == 1:
        return part(chunks[0])
    # What a chunk's gradient needs is computed again then: all chunks together would not fit in memory.
    return torch.logsumexp(torch.stack([checkpoint(part, codes, use_reentrant=False) for codes in chunks]), 0)


class Annealed(NamedTuple):
    """What :func:`anneal` finds: log Z and its standard error, both 0-d in float64."""

    log_z: Tensor
    std_error: Tensor


@torch.no_grad()
def anneal(
    weight: Tensor, visible: Tensor, hidden: Tensor, base_visible: Tensor, base_hidden: Tensor, chains: int, steps: int
) -> Annealed:
    r"""log Z by annealed importance sampling from independent units with biases ``base_visible`` and ``base_hidden``.

    .. math:: p_\beta(v, h) \propto \exp\big(b_\beta^\top v + c_\beta^\top h + \beta v^\top W h\big), \qquad
              b_\beta = (1 - \beta) b_0 + \beta b, \quad c_\beta = (1 - \beta) c_0 + \beta c

    .. math:: \log \hat Z = \log Z_0 + \log \frac1C \sum_{i=1}^C \prod_{t=1}^T
                  \frac{p^*_{\beta_t}(v^i_{t-1})}{p^*_{\beta_{t-1}}(v^i_{t-1})}

    Each of ``chains`` runs goes from an exact draw at :math:`\beta = 0` through ``steps`` equal steps to
    :math:`\beta = 1`, with one Gibbs step at each. Any base will do in the limit; one whose units are on as often as
    the machine's, hidden ones included, needs far fewer steps than the usual :math:`c_0 = 0`, from which the chains of
    a trained machine pass through images that are all but empty.

    :math:`\hat Z` is unbiased, so :math:`\log \hat Z` is too low on average, by half its squared standard error where
    that is small. The standard error is that of the mean weight over itself (delta method): it knows only the modes
    that the chains have found.

    Neal, *Annealed importance sampling*, 2001; Salakhutdinov and Murray, *On the quantitative analysis of deep belief
    networks*, 2008; Grosse, Maddison and Salakhutdinov, *Annealing between distributions by averaging moments*, 2013.
    """
    v = bits(base_visible.sigmoid().expand(chains, -1))
    log_w = torch.zeros(chains, dtype=torch.float64, device=weight.device)
    for low, high in pairwise(torch.linspace(0, 1, steps + 1, dtype=torch.float64).tolist()):
        slope = torch.addmm(hidden - base_hidden, v, weight)  # of what the hidden units receive, in beta
        rise = softplus_rise(base_hidden + low * slope, (high - low) * slope)
        log_w += (high - low) * (v @ (visible - base_visible)).double() + rise.sum(-1, dtype=torch.float64)
        h = bits((base_hidden + high * slope).sigmoid_())
        v = bits(torch.addmm(torch.lerp(base_visible, visible, high), h, weight.T, alpha=high).sigmoid_())
    log_base = softplus(base_visible.double()).sum() + softplus(base_hidden.double()).sum()
    largest = log_w.max()
    w = (log_w - largest).exp()
    return Annealed(log_base + largest + w.mean().log(), w.std() / (w.mean() * math.sqrt(chains)))


def softplus_rise(low: Tensor, rise: Tensor) -> Tensor:
    """softplus(low + rise) - softplus(low), without cancellation where ``rise`` is small: its steps are many."""
    small = torch.log1p(low.sigmoid() * torch.expm1(rise.clamp(-1, 1)))
    return torch.where(rise.abs() < 1, small, softplus(low + rise) - softplus(low))


class LogPartition:
    """log Z of a machine, found once as long as its tensors have the values they have.

    Values are compared: version counters miss what a captured training step writes.
    """

    def __init__(self) -> None:
        self.state: list[Tensor] = []
        self.known: dict[object, Annealed] = {}

    def exact(self, energy: Energy, base: tuple[Tensor, Tensor]) -> Annealed:
        """By enumeration, without error; with a gradient where one is asked for."""

        def find() -> Annealed:
            log_z = enumerate_states(*energy)
            return Annealed(log_z, torch.zeros_like(log_z))

        learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in energy)
        return find() if learns else self.find((*energy, *base), "exact", find)

    def estimate(self, energy: Energy, base: tuple[Tensor, Tensor], *, chains: int, steps: int, seed: int) -> Annealed:
        """By annealing from independent units of the logits ``base``; the global generator is left as it was."""
        state = (*energy, *base)
        with isolated_rng(seed):
            found = self.find(state, (chains, steps, seed), partial(anneal, *state, chains, steps))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in energy):
            return found._replace(log_z=WithoutGradient.apply(found.log_z, *energy))
        return found

    @torch.no_grad()
    def find(self, state: Sequence[Tensor], key: object, find: Callable[[], Annealed]) -> Annealed:
        """What ``find`` gave, or now gives, for these tensors and this key."""
        same = len(state) == len(self.state) and all(
            a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
            for a, b in zip(state, self.state, strict=True)
        )
        if not same:
            self.state, self.known = [tensor.detach().clone() for tensor in state], {}
        if key not in self.known:
            self.known[key] = find()
        return self.known[key]


class WithoutGradient(torch.autograd.Function):
    """A value that depends on parameters and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:  # type: ignore[override]
        raise ValueError(
            "the RBM's log Z is annealed importance sampling's estimate, which has no gradient: train with rbm.fit "
            f"(contrastive divergence), or give one side at most {LARGEST} units"
        )
