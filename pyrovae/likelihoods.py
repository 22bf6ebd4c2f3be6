r"""Likelihoods: what a decoder's output says about the data, :math:`p(x \mid z)`.

A likelihood is one small module: how many numbers it asks of the decoder per pixel (``outputs``), the distribution of
one pixel given those numbers, and where the decoder's bias should start given the mean of the data. A new one is a
class of these three things and one row in :data:`LIKELIHOODS`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from pyrovae.nn import lookup, size, sizes

__all__ = [
    "LIKELIHOODS",
    "BernoulliLikelihood",
    "ContinuousBernoulli",
    "ContinuousBernoulliLikelihood",
    "DiscretizedLogistic",
    "DiscretizedLogisticLikelihood",
    "Gaussian",
    "GaussianLikelihood",
    "Likelihood",
    "ScaledLikelihood",
    "make_likelihood",
]


def _near_zero(a: Tensor, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """Where ``|a| < bound``; ``a`` there and 0 elsewhere; ``|a|`` elsewhere and 1 there.

    Both branches of a ``where`` are differentiated, so each gets an argument at which it is finite.
    """
    small = a.abs() < bound
    return small, torch.where(small, a, 0.0), torch.where(small, 1.0, a.abs())


def _log_sinhc(a: Tensor) -> Tensor:
    r""":math:`\log(\sinh(a) / a)`."""
    small, s, m = _near_zero(a, 0.25)
    q = s * s
    series = q * (1 / 6 - q * (1 / 180 - q * (1 / 2835 - q * (1 / 37800 - q / 467775))))
    return torch.where(small, series, m + torch.log1p(-torch.exp(-2 * m)) - torch.log(2 * m))


def _langevin(a: Tensor) -> Tensor:
    r""":math:`\coth(a) - 1/a`, the derivative of :func:`_log_sinhc`."""
    small, s, m = _near_zero(a, 0.25)
    q = s * s
    series = s * (1 / 3 - q * (1 / 45 - q * (2 / 945 - q * (1 / 4725 - q * 2 / 93555))))
    return torch.where(small, series, a.sign() * (1 / torch.tanh(m) - 1 / m))


class _PixelDistribution(TorchDistribution):
    """A distribution whose parameter ``_wide`` has the batch shape; the others keep their own and broadcast.

    A scale is often one number, and what depends on it alone is then computed once, not once per pixel.
    """

    _wide: ClassVar[str] = "loc"

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        setattr(new, self._wide, getattr(self, self._wide).expand(batch_shape))
        TorchDistribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _set_location(self, loc: Tensor, scale: Tensor | float) -> torch.Size:
        self.scale = scale if isinstance(scale, Tensor) else loc.new_full((), scale)
        shape = torch.broadcast_shapes(loc.shape, self.scale.shape)
        self.loc = loc.expand(shape)
        return shape


class Gaussian(_PixelDistribution):
    r"""The normal distribution; where the scale is a scalar, in fewer passes over the pixels than Pyro's.

    .. math:: \log p(x \mid \mu, s) = -\tfrac12 ((x - \mu) / s)^2 - \log s - \tfrac12 \log 2 \pi

    Shapes:
        ``loc`` and ``scale`` broadcast; nats of density per element.

    Example:
        >>> Gaussian(torch.zeros(2), 1.0).log_prob(torch.tensor([0.0, 2.0]))
        tensor([-0.9189, -2.9189])
    """

    arg_constraints: ClassVar[dict] = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor | float, validate_args: bool | None = None) -> None:
        super().__init__(self._set_location(loc, scale), validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return -0.5 * ((value - self.loc) / self.scale).square() - (self.scale.log() + 0.5 * math.log(2 * math.pi))

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return self.scale.square().expand(self.batch_shape)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        return self.loc + self.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)


class ContinuousBernoulli(_PixelDistribution):
    r"""The continuous Bernoulli on [0, 1], exact in float32 at every logit.

    .. math:: p(x \mid l) = \frac{l}{e^l - 1} e^{l x}, \qquad
              \log p = (x - \tfrac12) l - \log \frac{\sinh(l/2)}{l/2}

    PyTorch's class of this name goes through the probability: in float32 its gradient has the wrong sign near
    :math:`l = 0`, and it saturates at :math:`|l| = 16`. Here the normaliser is a function of the logit, by its power
    series near 0.

    Shapes:
        ``logits`` of any shape; nats of density per element.

    Example:
        >>> ContinuousBernoulli(torch.tensor([1e-6, 40.0])).log_prob(torch.tensor([1.0, 1.0]))
        tensor([5.0000e-07, 3.6889e+00])

    Reference:
        Loaiza-Ganem and Cunningham, *The continuous Bernoulli: fixing a pervasive error in variational autoencoders*,
        2019.
    """

    _wide = "logits"
    arg_constraints: ClassVar[dict] = {"logits": constraints.real}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return (value - 0.5) * self.logits - _log_sinhc(self.logits / 2)

    @property
    def mean(self) -> Tensor:
        return 0.5 + 0.5 * _langevin(self.logits / 2)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008
        r"""The inverse distribution function :math:`\log(1 + u (e^l - 1)) / l` at uniform ``u``."""
        u = torch.rand(self._extended_shape(sample_shape), dtype=self.logits.dtype, device=self.logits.device)
        small, s, m = _near_zero(self.logits, 1e-2)
        series = u + s * u * (1 - u) / 2 * (1 + s * (1 - 2 * u) / 3)
        # Written for l < 0, where nothing overflows; x at l has the law of 1 - x at -l.
        falling = (torch.log1p(u * torch.expm1(-m)) / -m).clamp(0, 1)
        return torch.where(small, series, torch.where(self.logits > 0, 1 - falling, falling))


class DiscretizedLogistic(_PixelDistribution):
    r"""A logistic rounded to the grid :math:`\{0, w, 2w, \dots, 1\}`, :math:`w = 1 / (\text{levels} - 1)`.

    The mass of a level is that of the bin of width w around it; the two outer bins extend to infinity. With
    :math:`a, b = (x \mp w/2 - \mu) / s`, no difference of two sigmoids is ever formed:

    .. math:: \log(\sigma(b) - \sigma(a)) = \log \sigma(b) + \log \sigma(-a) + \log(1 - e^{-w/s})

    Values off the grid are given the mass of the bin of width w around them. The mean is the sum over levels by the
    midpoint rule, :math:`s \, [\zeta(\mu/s) - \zeta((\mu - 1)/s)]` with :math:`\zeta` the softplus: off by at most 0.15
    of a level for :math:`s \geq w/8`, by 0.03 for :math:`s \geq w/2`.

    Shapes:
        ``loc`` and ``scale`` broadcast; nats of probability (not density) per element.

    Example:
        >>> pixel = DiscretizedLogistic(torch.tensor(0.4), torch.tensor(0.1))
        >>> pixel.log_prob(torch.arange(256) / 255).exp().sum()
        tensor(1.0000)

    Reference:
        Kingma et al., *Improving variational inference with inverse autoregressive flow*, 2016; Salimans et al.,
        *PixelCNN++*, 2017.
    """

    arg_constraints: ClassVar[dict] = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.unit_interval

    def __init__(
        self, loc: Tensor, scale: Tensor | float, levels: int = 256, validate_args: bool | None = None
    ) -> None:
        self.levels = levels
        super().__init__(self._set_location(loc, scale), validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        width = 1 / (self.levels - 1)
        first, last = value < width / 2, value > 1 - width / 2
        centred = value - self.loc
        log_below = torch.where(last, 0.0, logsigmoid((centred + width / 2) / self.scale))
        log_above = torch.where(first, 0.0, logsigmoid((width / 2 - centred) / self.scale))
        log_both = torch.where(first | last, 0.0, torch.log(-torch.expm1(-width / self.scale)))
        return log_below + log_above + log_both

    @property
    def mean(self) -> Tensor:
        area = softplus(self.loc / self.scale) - softplus((self.loc - 1) / self.scale)
        return (self.scale * area).clamp(0, 1)

    @torch.no_grad()
    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008
        u = torch.rand(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        x = self.loc + self.scale * torch.logit(u)
        return (x * (self.levels - 1)).round().clamp(0, self.levels - 1) / (self.levels - 1)


class Likelihood(nn.Module):
    r"""The decoder's output read as a distribution of the data, one pixel independent of the next.

    A subclass defines :meth:`pixel`, the distribution of single pixels, and :meth:`start`, the first output to start
    from where the data's mean is known.

    Args:
        event_shape: shape of one datum.

    Attributes:
        outputs: numbers that the decoder has to give per pixel.
        options: names of the constructor's other arguments.

    Shapes:
        ``params`` is ``[..., outputs * event_shape[0], *event_shape[1:]]``, the outputs one after another along the
        first event axis; :meth:`distribution` has batch shape ``[...]`` and event shape ``event_shape``.
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

    Example:
        >>> BernoulliLikelihood((1, 28, 28)).distribution(torch.zeros(5, 20, 1, 28, 28)).batch_shape
        torch.Size([5, 20])
    """

    def pixel(self, logits: Tensor) -> TorchDistribution:  # type: ignore[override]
        return dist.Bernoulli(logits=logits)

    def start(self, mean_image: Tensor) -> Tensor:
        return torch.logit(mean_image.clamp(0.001, 0.999))


class ContinuousBernoulliLikelihood(BernoulliLikelihood):
    """Pixels in [0, 1] (:class:`ContinuousBernoulli`); the decoder gives logits.

    Started at the logit of the data's mean, its own mean lies between that and one half.
    """

    def pixel(self, logits: Tensor) -> TorchDistribution:  # type: ignore[override]
        return ContinuousBernoulli(logits)


class ScaledLikelihood(Likelihood):
    r"""A likelihood of location and scale; the decoder gives the location.

    Args:
        event_shape: shape of one datum.
        scale: a number fixes the scale; ``"learned"`` learns one (see the subclass); ``"per_pixel"`` asks it of the
            decoder as a second output. The last two are :math:`\mathrm{floor} + \mathrm{softplus}(r + c)`, with c such
            that :math:`r = 0`, where they start, gives ``floor + first``: the density stays bounded.

    Raises:
        TypeError, ValueError: ``scale`` is none of these, or a number that is not positive and finite.
    """

    options: ClassVar[tuple[str, ...]] = ("scale",)
    first: float
    floor: float

    def __init__(self, event_shape: Sequence[int], scale: float | str = "learned") -> None:
        super().__init__(event_shape)
        if isinstance(scale, bool) or not isinstance(scale, (str, int, float)):
            raise TypeError(f"scale must be a number, 'learned' or 'per_pixel', got {scale!r}")
        if isinstance(scale, str):
            lookup("scale", scale, {"learned": 0, "per_pixel": 0})
        elif not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}: or give 'learned' to fit it")
        self.scale = scale
        self.outputs = 2 if scale == "per_pixel" else 1
        if scale == "learned":
            self.raw_scale = nn.Parameter(torch.zeros(self.scale_shape()))

    def scale_shape(self) -> tuple[int, ...]:
        """Shape of a learned scale."""
        return ()

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

    Example:
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

    Example:
        >>> likelihood = DiscretizedLogisticLikelihood((3, 32, 32), scale="per_pixel")
        >>> likelihood.distribution(torch.zeros(20, 6, 32, 32)).log_prob(torch.zeros(20, 3, 32, 32)).shape
        torch.Size([20])
    """

    options: ClassVar[tuple[str, ...]] = ("scale", "levels")
    first = 0.1

    def __init__(self, event_shape: Sequence[int], scale: float | str = "learned", levels: int = 256) -> None:
        super().__init__(event_shape, scale)
        self.levels = size("levels", levels)
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        self.floor = 1 / (8 * (levels - 1))

    def scale_shape(self) -> tuple[int, ...]:
        return (self.event_shape[0], 1, 1) if len(self.event_shape) == 3 else ()

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

    Raises:
        TypeError, ValueError: an unknown name, or an option that this likelihood does not have.

    Example:
        >>> make_likelihood("gaussian", (1, 28, 28), scale=0.1)
        GaussianLikelihood(event_shape=(1, 28, 28), scale=0.1)
        >>> make_likelihood("bernoulli", (1, 28, 28), scale=0.1)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: likelihood='bernoulli' has no scale, got scale=0.1: leave it out, or use 'gaussian' or ...
    """
    family = lookup("likelihood", name, LIKELIHOODS)
    given: dict[str, Any] = {} if scale == "learned" else {"scale": scale}
    given |= {} if levels is None else {"levels": levels}
    for option, value in given.items():
        if option not in family.options:
            others = " or ".join(repr(other) for other, cls in LIKELIHOODS.items() if option in cls.options)
            raise ValueError(
                f"likelihood={name!r} has no {option}, got {option}={value!r}: leave it out, or use {others}"
            )
    return family(event_shape, **given)
