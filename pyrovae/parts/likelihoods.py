r"""Likelihoods: what a decoder's output says about the data, :math:`p(x \mid z)`.

A likelihood is one small module: how many numbers it asks of the decoder per pixel (``outputs``), the distribution of
one pixel given those numbers, and where the decoder's bias should start given the mean of the data. A new one is a
class of these three things and one row in :data:`LIKELIHOODS`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrovae.arguments import lookup, one_of, positive_int, sizes
from pyrovae.parts.pixels import BernoulliPixels, ContinuousBernoulli, DiscretizedLogistic, Gaussian


class Likelihood(nn.Module):
    r"""The decoder's output read as a distribution of the data, one pixel independent of the next.

    A subclass defines :meth:`pixel`, the distribution of single pixels, and :meth:`start`, the first output to start
    from where the data's mean is known.

    Shapes: ``params`` is ``[..., outputs * event_shape[0], *event_shape[1:]]``, the outputs one after another along the
    first event axis; :meth:`distribution` has batch shape ``[...]`` and event shape ``event_shape``.

    :param event_shape: shape of one datum.
    :ivar outputs: numbers that the decoder has to give per pixel.
    :ivar options: names of the constructor's other arguments.
    """

    outputs: int = 1
    options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.event_shape = sizes("event_shape", event_shape)

    def distribution(self, params: Tensor) -> TorchDistribution:
        """p(x | decoder output)."""
        heads = (params,) if self.outputs == 1 else params.chunk(self.outputs, dim=-len(self.event_shape))
        return self.pixel(*heads).to_event(len(self.event_shape))

    def initial_bias(self, mean_image: Tensor) -> Tensor:
        """The decoder output to start from, ``[outputs * event_shape[0], ...]``, given the mean of the data."""
        start = self.start(mean_image)
        return torch.cat([start] + [torch.zeros_like(start)] * (self.outputs - 1))

    def pixel(self, *heads: Tensor) -> TorchDistribution:
        raise NotImplementedError

    def start(self, mean_image: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"event_shape={self.event_shape}"


class BernoulliLikelihood(Likelihood):
    """Binary pixels; the decoder gives logits.

    >>> BernoulliLikelihood((1, 28, 28)).distribution(torch.zeros(5, 20, 1, 28, 28)).batch_shape
    torch.Size([5, 20])
    """

    def distribution(self, params: Tensor) -> TorchDistribution:
        return BernoulliPixels(dist.Bernoulli(logits=params), len(self.event_shape))

    def start(self, mean_image: Tensor) -> Tensor:
        return torch.logit(mean_image.clamp(0.001, 0.999))


class ContinuousBernoulliLikelihood(Likelihood):
    """Pixels in [0, 1] (:class:`ContinuousBernoulli`); the decoder gives logits.

    Started at the logit of the data's mean, its own mean lies between that and one half.
    """

    start = BernoulliLikelihood.start

    def pixel(self, logits: Tensor) -> TorchDistribution:  # type: ignore[override]
        return ContinuousBernoulli(logits)


class ScaledLikelihood(Likelihood):
    r"""A likelihood of location and scale; the decoder gives the location.

    :param event_shape: shape of one datum.
    :param scale: a number fixes the scale; ``"learned"`` learns one (see the subclass); ``"per_pixel"`` asks it of the
        decoder as a second output. The last two are :math:`\mathrm{floor} + \mathrm{softplus}(r + c)`, with c such that
        :math:`r = 0`, where they start, gives ``floor + first``: the density stays bounded.
    :raises TypeError, ValueError: ``scale`` is none of these, or a number that is not positive and finite.
    """

    options: ClassVar[tuple[str, ...]] = ("scale",)
    first: float
    floor: float
    per_channel: ClassVar[bool] = False  # whether a learned scale of images is

    def __init__(self, event_shape: Sequence[int], scale: float | str = "learned") -> None:
        super().__init__(event_shape)
        if isinstance(scale, bool) or not isinstance(scale, (str, int, float)):
            raise TypeError(f"scale must be a number, 'learned' or 'per_pixel', got {scale!r}")
        if isinstance(scale, str):
            one_of("scale", scale, ("learned", "per_pixel"))
        elif not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}: or give 'learned' to fit it")
        self.scale = scale
        self.outputs = 2 if scale == "per_pixel" else 1
        if scale == "learned":
            wide = self.per_channel and len(self.event_shape) == 3
            self.raw_scale = nn.Parameter(torch.zeros((self.event_shape[0], 1, 1) if wide else ()))

    def positive(self, raw: Tensor | None) -> Tensor | float:
        """The scale, from the decoder's second output where there is one."""
        if isinstance(self.scale, (int, float)):
            return float(self.scale)
        return self.floor + softplus((self.raw_scale if raw is None else raw) + math.log(math.expm1(self.first)))

    def start(self, mean_image: Tensor) -> Tensor:
        return mean_image

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale!r}"


class GaussianLikelihood(ScaledLikelihood):
    """Real pixels, normal around the decoder's output; a learned scale is one number, at least 1e-3, at first 1.

    >>> GaussianLikelihood((3, 32, 32), scale=0.1).distribution(torch.zeros(20, 3, 32, 32)).event_shape
    torch.Size([3, 32, 32])
    """

    floor = 1e-3
    first = 1 - floor

    def pixel(self, mean: Tensor, raw: Tensor | None = None) -> TorchDistribution:  # type: ignore[override]
        return Gaussian(mean, self.positive(raw))


class DiscretizedLogisticLikelihood(ScaledLikelihood):
    """Pixels on a grid of ``levels`` values in [0, 1] (:class:`DiscretizedLogistic`): a probability, not a density.

    A learned scale is one number per channel of an image ``(channels, height, width)``, else one number; it is at
    least an eighth of the grid's step, at first 0.1 above that.

    >>> likelihood = DiscretizedLogisticLikelihood((3, 32, 32), scale="per_pixel")
    >>> likelihood.distribution(torch.zeros(20, 6, 32, 32)).log_prob(torch.zeros(20, 3, 32, 32)).shape
    torch.Size([20])
    """

    options: ClassVar[tuple[str, ...]] = ("scale", "levels")
    first = 0.1
    per_channel = True

    def __init__(self, event_shape: Sequence[int], scale: float | str = "learned", levels: int = 256) -> None:
        super().__init__(event_shape, scale)
        self.levels = positive_int("levels", levels, minimum=2)
        self.floor = 1 / (8 * (self.levels - 1))

    def pixel(self, mean: Tensor, raw: Tensor | None = None) -> TorchDistribution:  # type: ignore[override]
        return DiscretizedLogistic(mean, self.positive(raw), self.levels)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, levels={self.levels}"


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": BernoulliLikelihood,
    "gaussian": GaussianLikelihood,
    "continuous_bernoulli": ContinuousBernoulliLikelihood,
    "discretized_logistic": DiscretizedLogisticLikelihood,
}


def make_likelihood(
    name: str, event_shape: Sequence[int], scale: float | str = "learned", levels: int | None = None
) -> Likelihood:
    """The likelihood of that name; ``scale`` and ``levels`` are refused where it has none.

    :raises TypeError, ValueError: an unknown name, or an option that this likelihood does not have.

    >>> make_likelihood("gaussian", (1, 28, 28), scale=0.1)
    GaussianLikelihood(event_shape=(1, 28, 28), scale=0.1)
    >>> make_likelihood("bernoulli", (1, 28, 28), scale=0.1)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: likelihood='bernoulli' has no scale, got scale=0.1: leave it out, or use 'gaussian' or ...
    """
    family = lookup("likelihood", name, LIKELIHOODS)
    given: dict[str, float | str] = {} if scale == "learned" else {"scale": scale}
    given |= {} if levels is None else {"levels": levels}
    for option, value in given.items():
        if option not in family.options:
            others = " or ".join(repr(other) for other, cls in LIKELIHOODS.items() if option in cls.options)
            raise ValueError(
                f"likelihood={name!r} has no {option}, got {option}={value!r}: leave it out, or use {others}"
            )
    return family(event_shape, **given)
