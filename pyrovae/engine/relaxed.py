"""Relaxed one-hot draws at low temperatures, whose density is that of logarithms that do not underflow."""

from __future__ import annotations

import torch
from pyro.distributions import RelaxedOneHotCategorical
from torch import Tensor
from torch.distributions import Distribution, ExpTransform, TransformedDistribution

from pyrovae.engine.unwrap import layers

RELAXED = {
    RelaxedOneHotCategorical,
    torch.distributions.RelaxedOneHotCategorical,
}  # those made hard keep a draw they clamp


class LogKept(ExpTransform):
    """Exponentials that carry the logarithms that they are of, as a draw made hard carries its soft one."""

    def _call(self, x: Tensor) -> Tensor:
        x = x - x.logsumexp(-1, keepdim=True)  # again: the first time large scores were rounded
        y = x.exp()
        vars(y)["logarithm"] = x
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        return vars(y)["logarithm"] if "logarithm" in vars(y) else y.log()


def keep_logarithms(fn: Distribution) -> None:
    """Let a relaxed one-hot distribution score its own draws, and those of another, by their logarithms."""
    for layer in layers(fn):
        if isinstance(layer, TransformedDistribution) and type(layer) in RELAXED:
            layer.transforms = [LogKept()]
