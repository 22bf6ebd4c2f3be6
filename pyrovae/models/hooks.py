"""What a job must know of the model that it trains and measures, which differs from family to family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

Rule = Callable[..., list[dict[str, float]]]  # trains on data, with options by name; the history


class Hooks:
    """What is so in general; a family overrides what is otherwise with it."""

    #: Whether the programs take labels after x.
    conditional: bool = False
    #: What ``log_likelihood`` finds: "estimate", "bound", "exact", or "annealed" (exact but for a partition function
    #: that is estimated); None for what is not a generative model.
    likelihood_is: str | None = "estimate"
    #: Whether the data must be bits; None, as the observed site says.
    observes_bits: bool | None = None
    #: Whether unknown labels are summed over, so that log p(x) is measured without them.
    sums_over_labels: bool = False
    #: Trains the pair by a rule of its own, as ``train_on(data, **options)``; None where :func:`pyrovae.fit` does.
    train_on: ClassVar[Rule | None] = None

    def metrics(self, x: Tensor, *labels: Any) -> dict[str, object]:
        """What is worth knowing of a batch beside the bound, by name."""
        return {}

    def score_labels(self, x: Tensor, labels: Tensor) -> dict[str, float]:
        """How well the labels of data ``[N, *input_shape]`` are predicted, by name."""
        return {}

    def log_prob_error(self) -> float:
        """Standard error, in nats, of a log p(x) that is no estimate by importance sampling."""
        return 0.0

    def after_training(self, data: object) -> bool:
        """Do what follows training on ``data``; whether it changed the weights."""
        return False
