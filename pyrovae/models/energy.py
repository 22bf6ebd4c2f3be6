"""The energy of a layer of visible and a layer of hidden bits, and what follows from it for either layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus


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

    def gibbs(self, v: Tensor, steps: int) -> Tensor:
        """Draw h given v and v given h, ``steps`` times over."""
        for _ in range(steps):
            v = bits(self.visible_logits(bits(self.hidden_logits(v).sigmoid())).sigmoid())
        return v
