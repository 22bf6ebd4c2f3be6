"""Labels: classes and attributes, and labels of which some are not known."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyrovae.arguments import positive_int
from pyrovae.engine.support import DROP, at, first_outside
from pyrovae.errors import DataError
from pyrovae.parts.shared import Shape


class Classes:
    """Class labels: integers ``[...]`` from 0 on, encoded one-hot, ``[..., number]``.

    >>> Classes(3).encode(torch.tensor([2, 0]), torch.zeros(1))
    tensor([[0., 0., 1.],
            [1., 0., 0.]])
    """

    event_dim = 0

    def __init__(self, number: int) -> None:
        self.size = positive_int("num_classes", number, minimum=2)

    def check(self, y: Tensor) -> None:
        """Their type and shape, known without a look at the values."""
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise DataError(
                f"labels must be integers, one class index per datum, got {y.dtype}: convert with y.long(), or one-hot "
                "rows with y.argmax(-1)"
            )

    def check_values(self, y: Tensor) -> None:
        """Their range; on CUDA this waits for the device."""
        y = torch.atleast_1d(y)
        if (bad := first_outside(y, constraints.integer_interval(0, self.size - 1))) is not None:
            raise DataError(
                f"{at('labels', bad, y[bad])}: with num_classes={self.size}, labels run from 0 to {self.size - 1}; "
                "correct the labels, or build the model with more classes"
            )

    def encode(self, y: Tensor, like: Tensor) -> Tensor:
        """One-hot rows of the dtype of ``like``; NaN for a label out of range, so that it cannot pass unnoticed."""
        hot = y.unsqueeze(-1) == torch.arange(self.size, device=y.device)
        return hot.to(like.dtype).masked_fill(~hot.any(-1, keepdim=True), torch.nan)

    def distribution(self, like: Tensor) -> TorchDistribution:
        """Any distribution of such labels: only its support matters."""
        return dist.Categorical(logits=like.new_zeros(self.size))


class Attributes:
    """Attribute vectors: real numbers ``[..., number]``, taken as they are."""

    event_dim = 1

    def __init__(self, number: int) -> None:
        self.size = positive_int("num_attributes", number)

    def check(self, y: Tensor) -> None:
        if not y.is_floating_point() or y.shape[-1:] != (self.size,):
            raise DataError(
                f"attributes must be real numbers [batch, {self.size}] with num_attributes={self.size}, got "
                f"{list(y.shape)} of {y.dtype}: convert with y.float(), or build the model with as many attributes"
            )

    def check_values(self, y: Tensor) -> None:
        """That they are finite; on CUDA this waits for the device."""
        y = torch.atleast_2d(y)
        if (bad := first_outside(y)) is not None:
            raise DataError(f"{at('attributes', bad, y[bad])}: attributes must be finite; {DROP}")

    def encode(self, y: Tensor, like: Tensor) -> Tensor:
        """The attributes in the dtype of ``like``."""
        return y.to(like.dtype)

    def distribution(self, like: Tensor) -> TorchDistribution:
        """Any distribution of such attributes: only its support matters."""
        return dist.Normal(like.new_zeros(self.size), 1.0).to_event(1)


UNKNOWN = -1  # the label of unlabelled data
#: Labels as programs and verbs take them: class numbers or vectors of attributes.
Labels = Tensor | Sequence[object] | int


class SoftOneHot(dist.OneHotCategorical):
    r"""A one-hot categorical that scores soft one-hot vectors as well, points v of the simplex.

    .. math:: \log p(v) = \sum_c v_c \log p_c = \mathbb E_{y \sim v} \log p(y)

    >>> SoftOneHot(probs=torch.tensor([0.5, 0.5])).log_prob(torch.tensor([0.3, 0.7])).exp()
    tensor(0.5000)
    """

    support = constraints.simplex  # type: ignore[assignment]

    def log_prob(self, value: Tensor) -> Tensor:
        """The expected log-probability, in nats; of a one-hot value its own."""
        return (value * self.logits).sum(-1)


class Weighted(TorchDistribution):
    r"""A distribution whose log-density counts ``weight`` times, as one term of an expectation over classes.

    ``poutine.scale`` would not do: a scale stands for more data of the same kind, and is ignored where log p(x) is
    measured. Shapes: those of ``base``, whose batch shape ``weight`` broadcasts to.
    """

    def __init__(self, base: TorchDistribution, weight: Tensor) -> None:
        self.base, self.weight = base, weight
        self.has_rsample = base.has_rsample
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint | None:
        return self.base.support

    @property
    def mean(self) -> Tensor:
        return self.base.mean

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> Weighted:
        return Weighted(self.base.expand(batch_shape), self.weight)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        return self.base.rsample(sample_shape)

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        return self.base.sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.weight * self.base.log_prob(value)


class PartialLabel(TorchDistribution):
    r"""Of a class label :math:`y` its :math:`\alpha \log q(y)`; of -1, a label that is not known, 0.

    Shapes: ``log_q`` is ``[..., num_classes]``, labels are integers ``[...]``.
    """

    def __init__(self, log_q: Tensor, weight: float) -> None:
        self.log_q, self.weight = log_q, weight
        super().__init__(log_q.shape[:-1], torch.Size(), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(UNKNOWN, self.log_q.shape[-1] - 1)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> PartialLabel:
        return PartialLabel(self.log_q.expand(*batch_shape, -1), self.weight)

    def log_prob(self, value: Tensor) -> Tensor:
        """The weighted log-probability, in nats; NaN for a label that does not exist."""
        known = value != UNKNOWN
        code = Classes(self.log_q.shape[-1]).encode(torch.where(known, value, 0), self.log_q)
        return torch.where(known, self.weight * (code * self.log_q).sum(-1), 0.0)


def hide_labels(y: Tensor, per_class: int, seed: int = 0) -> Tensor:
    """Labels ``[N]`` of which ``per_class`` of every class, drawn by ``seed``, are kept; the others become -1.

    :raises DataError: a class with fewer labels than that.

    >>> hide_labels(torch.tensor([0, 1, 0, 1, 1]), per_class=1).ge(0).sum()
    tensor(2)
    """
    per_class = positive_int("per_class", per_class)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    hidden = torch.full_like(y, UNKNOWN)
    for label in y.unique():
        chosen = order[y[order] == label][:per_class]
        if len(chosen) < per_class:
            raise DataError(f"class {int(label)} has {len(chosen)} labels, per_class={per_class} asked for: keep fewer")
        hidden[chosen] = label
    return hidden
