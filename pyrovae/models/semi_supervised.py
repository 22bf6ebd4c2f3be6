"""The semi-supervised variational autoencoder: labels where there are some, summed over where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from pyrovae.arguments import in_range, one_of, sizes
from pyrovae.models.conditional import ConditionalVAE, Options
from pyrovae.nn.conv import networks
from pyrovae.parts.labels import UNKNOWN, Labels, PartialLabel, SoftOneHot, Weighted

CERTAIN = 1e4  # a difference of logits whose exponential is 0 in every precision


class Classifier(TypedDict, total=False):
    """What the network of q(y | x) may have of its own."""

    hidden: Sequence[int]
    network: str
    activation: str
    channels: Sequence[int] | None


class SemiSupervisedVAE(ConditionalVAE):
    r"""Variational autoencoder with a class, latent where the label is not known: M2 of Kingma et al.

    .. math:: y \sim p(y), \quad z \sim N(0, I), \quad x \mid z, y \sim p(x; f_\theta(z, y)), \qquad
              q_\phi(y \mid x), \quad q_\phi(z \mid x, y)

    A label of -1 is not known, and batches may mix. With :math:`L(x, y)` the log-weight
    :math:`\log p(x, y, z) - \log q(z \mid x, y)`, a training step follows

    .. math:: \text{labelled: } L(x, y) + \alpha \log q(y \mid x), \qquad
              \text{unlabelled: } \sum_y q(y \mid x) \big[ L(x, y) - \log q(y \mid x) \big]

    The sum over classes is exact and part of the programs, so every objective with ``gradient="total"`` trains them,
    Pyro's too, and the step compiles. More particles than one give a lower bound as well, but one that does not reach
    log p(x), as the sum stands inside each log-weight. In eval mode, which measuring and generation use, the programs
    are the equations: y is drawn from q(y | x) where it is not known, :math:`\alpha` is out of the weights, and
    ``pv.log_likelihood`` finds log p(x) of unlabelled and log p(x, y) of labelled data.

    Shapes: As :class:`ConditionalVAE`, with labels ``[B]`` in -1 ... num_classes - 1, none at all meaning -1
    throughout. The latent site ``"y"`` has event ``[num_classes]``: one-hot, in training the probabilities q(y | x), of
    which a known label has all. The given labels are at site ``"label"``. In training ``"z"`` and ``"x"`` lie in a
    plate ``"classes"`` at dim -2, each class weighed by its probability. Nats throughout.

    :param input_shape: shape of one datum.
    :param num_classes: number of classes.
    :param latent_dim: number of latent units.
    :param hidden: widths of the encoders' dense layers; the decoder has them in reverse.
    :param likelihood: as in :class:`VAE`; ``scale`` and ``levels`` too.
    :param classification_weight: :math:`\alpha`, per labelled datum. The paper's :math:`\alpha = 0.1 N` weighs the mean
        over the labelled data: of N data with M labels it is 0.1 N / M here.
    :param class_probs: p(y), uniform by default.
    :param posterior: as in :class:`VAE`; ``flows`` and ``flow_hidden`` too.
    :param network: as in :class:`VAE`; ``activation`` and ``channels`` too.
    :param classifier: ``hidden``, ``network``, ``activation`` or ``channels`` of q(y | x), where they differ from the
        rest's. In training the rest runs once for each class, so that here convolutions come cheap.
    :raises TypeError, ValueError: at construction, for arguments that are out of range, unknown or do not go together.
    :raises DataError: from programs and verbs, for data or labels of another shape, type or range.

    >>> import pyrovae as pv
    >>> digits = pv.data.load("digits", binarization="threshold", labels=True)
    >>> y = pv.parts.hide_labels(digits.train.labels, per_class=20)
    >>> model = SemiSupervisedVAE((1, 8, 8), 10, latent_dim=5, hidden=(64,), classification_weight=1.0)
    >>> result = pv.fit(model.model, model.guide, (digits.train.x, y), objective=pv.ELBO(), epochs=1)
    >>> model.classify(digits.test.x).shape
    torch.Size([360, 10])

    Kingma, Rezende, Mohamed and Welling, *Semi-supervised learning with deep generative models*, 2014.
    """

    sums_over_labels = True

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        latent_dim: int = 50,
        hidden: Sequence[int] = (200, 200),
        likelihood: str = "bernoulli",
        scale: float | str = "learned",
        *,
        classification_weight: float = 1.0,
        class_probs: Sequence[float] | None = None,
        network: str = "mlp",
        activation: str = "tanh",
        channels: Sequence[int] | None = None,
        classifier: Classifier | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            input_shape, num_classes, latent_dim, hidden, likelihood, scale,
            network=network, activation=activation, channels=channels, **options,
        )  # fmt: skip
        self.classification_weight = in_range("classification_weight", classification_weight, 0.0)
        probs = [1.0] * num_classes if class_probs is None else [in_range("class_probs", p, 1e-12) for p in class_probs]
        if len(probs) != num_classes:
            raise ValueError(f"class_probs must have {num_classes} entries, one per class, got {len(probs)}: give all")
        self.class_logits: Tensor
        self.register_buffer("class_logits", log_softmax(torch.tensor(probs).log(), -1), persistent=False)
        for name in classifier or {}:
            one_of("setting of the classifier", name, Classifier.__annotations__)
        own: Classifier = {"hidden": hidden, "network": network, "activation": activation, "channels": channels}
        own.update(classifier or {})
        if own["network"] != network:  # channels are for networks of their kind
            own["channels"] = (classifier or {}).get("channels")
        make_classifier, _ = networks(own["network"], own["activation"], own["channels"])
        self.classifier = make_classifier(self.input_shape, sizes("hidden", own["hidden"]), num_classes)

    def model(self, x: Tensor, y: Labels | None = None) -> Tensor:
        """p(y) p(z) p(x | z, y) over the plate ``"data"``, with ``x`` observed and y where it is known."""
        self.check(x)
        known, code = self.known(x, y)
        with pyro.plate("data", len(x)):
            if y is not None:
                log_q = self.log_class_probs(x) if self.training else x.new_zeros(len(x), self.labels.size)
                labels = PartialLabel(log_q, self.classification_weight).mask(self.training)
                pyro.sample("label", labels, obs=self.tensor(y, x))
            drawn = pyro.sample("y", SoftOneHot(logits=self.class_logits.to(x.dtype)))
            probs = torch.where(known.unsqueeze(-1), code, drawn)  # the guide agrees; generation must
            if not self.training:
                z = pyro.sample("z", self.prior(probs))
                return pyro.sample("x", self.likelihood(z, probs), obs=x)
            with pyro.plate("classes", self.labels.size, dim=-2):
                every, weight = self.every_class(x), self.weights(probs)
                z = pyro.sample("z", Weighted(self.prior(every), weight))
                return pyro.sample("x", Weighted(self.likelihood(z, every), weight), obs=x)

    def guide(self, x: Tensor, y: Labels | None = None) -> Tensor:
        """q(y | x) q(z | x, y) over the plate ``"data"``; a known label is certain."""
        self.check(x)
        known, code = self.known(x, y)
        logits = torch.where(known.unsqueeze(-1), (code - 1) * CERTAIN, self.log_class_probs(x))
        with pyro.plate("data", len(x)):
            if not self.training:
                drawn = pyro.sample("y", SoftOneHot(logits=logits))
                return pyro.sample("z", self.posterior(x, drawn))
            q = logits.exp()
            probs = pyro.sample("y", dist.Delta(q, log_density=(q * logits).sum(-1), event_dim=1))
            with pyro.plate("classes", self.labels.size, dim=-2):
                return pyro.sample("z", Weighted(self.posterior(x, self.every_class(x)), self.weights(probs)))

    def known(self, x: Tensor, y: Labels | None) -> tuple[Tensor, Tensor]:
        """Which labels are known, ``[B]``, and the code of those, ``[B, num_classes]``."""
        given = x.new_full((len(x),), UNKNOWN, dtype=torch.long) if y is None else self.tensor(y, x)
        known = given != UNKNOWN
        some = torch.where(known, given, given.new_zeros(()))
        return known, self.labels.encode(self.checked(some, x, x.shape[:1]), x)

    def every_class(self, like: Tensor) -> Tensor:
        """The codes of all classes, along the dim of their plate."""
        return torch.eye(self.labels.size, dtype=like.dtype, device=like.device).unsqueeze(1)

    def weights(self, probs: Tensor) -> Tensor:
        """Probabilities ``[B, C]`` or ``[K, 1, B, C]`` as weights in the plate of classes, ``[..., C, B]``."""
        return probs.mT if probs.dim() == 2 else probs.mT.squeeze(-3)

    def log_class_probs(self, x: Tensor) -> Tensor:
        """log q(y | x), ``[..., *input_shape]`` to ``[..., num_classes]``."""
        return log_softmax(self.classifier(x), -1)

    @torch.no_grad()
    def classify(self, x: Tensor) -> Tensor:
        """q(y | x), probabilities ``[N, num_classes]``."""
        self.check(x)
        return self.log_class_probs(x).exp()

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor, batch_size: int = 1000) -> float:
        """The share of data ``[N, *input_shape]`` whose most probable class is their label."""
        found = torch.cat([self.classify(part).argmax(-1) for part in x.split(batch_size)])
        return (found == self.checked(y, x, x.shape[:1])).double().mean().item()

    def score_labels(self, x: Tensor, labels: Tensor) -> dict[str, float]:
        """The accuracy."""
        return {"accuracy": self.accuracy(x, labels)}

    def completed(self, x: Tensor, y: Labels | None = None) -> Tensor:
        """Labels, with the most probable class for those that are not known."""
        guess = self.log_class_probs(x).argmax(-1)
        if y is None:
            return guess
        given = self.tensor(y, x)
        return torch.where(given == UNKNOWN, guess, given)

    def encode(self, x: Tensor, y: Labels | None = None) -> Tensor:  # type: ignore[override]
        """The centre of q(z | x, y), y the most probable class where it is not known."""
        return super().encode(x, self.completed(x, y))

    def reconstruct(self, x: Tensor, y: Labels | None = None, **where: Any) -> Tensor:  # type: ignore[override]
        """Encode and decode again, with y the most probable class where it is not known."""
        return super().reconstruct(x, self.completed(x, y), **where)
