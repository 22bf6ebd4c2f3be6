"""What the families of the zoo share: checks, hooks, the verbs for using a trained model; modules of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn, Self

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyrovae.arguments import in_range, one_of, positive_int, sizes
from pyrovae.configured import Configured
from pyrovae.engine.programs import evaluating
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.sites import Sites, counts, record_pair
from pyrovae.engine.unwrap import innermost
from pyrovae.errors import DataError
from pyrovae.html import table
from pyrovae.nn.conv import Decoder
from pyrovae.nn.residual import PatchDecoder, ResidualDecoder
from pyrovae.parts.likelihoods import Likelihood
from pyrovae.sampling import blank

Rule = Callable[..., list[dict[str, float]]]  # trains on data, with options by name; the history


class Hooks:
    """What a job must know of the model that it trains and measures; a family overrides what is otherwise with it."""

    #: Whether the programs take labels after x.
    conditional: bool = False
    #: How many classes the labels are of, or how many attributes a label has; None for what they are not.
    num_classes: int | None = None
    num_attributes: int | None = None
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


class Pair(Hooks, Configured, nn.Module):
    r"""A family of the zoo: a Pyro model and guide in one module, and the verbs for using it once it is trained.

    A subclass gives ``model`` and ``guide``, ``encode`` and ``decode``; what it cannot do it refuses by name. The
    labels of a conditional family follow ``x`` (or ``z``) everywhere. What sets it apart stands in :class:`Hooks`.

    :ivar config: the constructor's arguments; ``type(pair)(**pair.config)`` has the same architecture.
    :ivar input_shape: shape of one datum.
    """

    input_shape: tuple[int, ...]
    observation: Likelihood
    decoder: Decoder | PatchDecoder | ResidualDecoder

    def set_shape(self, input_shape: object) -> tuple[int, ...]:
        """Take the shape of one datum, after checking it."""
        self.input_shape = sizes("input_shape", input_shape)
        if not self.input_shape:
            raise ValueError("input_shape is empty: give the shape of one datum, such as (1, 28, 28)")
        return self.input_shape

    def model(self, x: Tensor, *labels: Any) -> object:
        """The generative program, with ``x`` observed."""
        raise NotImplementedError(f"{type(self).__name__} has no model")

    def guide(self, x: Tensor, *labels: Any) -> object:
        """The inference program."""
        raise NotImplementedError(f"{type(self).__name__} has no guide")

    def likelihood(self, z: Tensor, *code: Tensor) -> TorchDistribution:
        """p(x | z) of latents ``[..., latent_dim]``, given encoded labels where the decoder reads some."""
        return self.observation.distribution(self.decoder(z, *code))

    def encode(self, x: Tensor, *labels: Any) -> Tensor:
        """The code of data ``[N, *input_shape]``."""
        self.refuse("encode", "it has no code of a datum")

    def decode(self, z: Tensor, *labels: Any) -> Tensor:
        """The data that codes stand for, ``[N, *input_shape]``."""
        self.refuse("decode", "it has no code of a datum")

    def reconstruct(self, x: Tensor, *labels: Any, **where: Any) -> Tensor:
        """Encode and decode again, ``[N, *input_shape]`` to the same; ``where`` goes to both."""
        return self.decode(self.encode(x, *labels, **where), *labels, **where)

    def interpolate(
        self, a: Tensor, b: Tensor, *labels: Any, steps: int = 9, path: str = "linear", **where: Any
    ) -> Tensor:
        r"""What lies between pairs of data, by way of their codes :math:`z_a, z_b`.

        .. math:: \text{linear: } (1 - t) z_a + t z_b, \qquad \text{spherical: }
                  \frac{\sin((1 - t) \omega)\, z_a + \sin(t \omega)\, z_b}{\sin \omega},
                  \quad \cos\omega = \frac{z_a \cdot z_b}{|z_a| |z_b|}

        A spherical path keeps to the radii at which a Gaussian prior has its mass.

        :param a: data ``[N, *input_shape]`` at t = 0.
        :param b: data at t = 1.
        :param steps: points on the way, both ends included.
        :param path: "linear" or "spherical" (Shoemake 1985; White 2016).
        :return: ``[N, steps, *input_shape]``.
        """
        count = positive_int("steps", steps, minimum=2)
        between = one_of("path", path, ("linear", "spherical"))
        start, end = (self.encode(x, *labels, **where).unsqueeze(1) for x in (a, b))
        t = torch.linspace(0, 1, count, dtype=start.dtype, device=start.device).view(-1, *[1] * (start.dim() - 2))
        z = (1 - t) * start + t * end if between == "linear" else slerp(start, end, t)
        repeated = (y.repeat_interleave(count, 0) if isinstance(y, Tensor) and y.dim() else y for y in labels)
        return self.decode(z.flatten(0, 1), *repeated, **where).unflatten(0, (-1, count))

    def traverse(
        self,
        x: Tensor,
        *labels: Any,
        units: Sequence[int] | None = None,
        span: float = 3.0,
        steps: int = 9,
        **where: Any,
    ) -> Tensor:
        """One datum with one latent unit after another moved from ``-span`` to ``span``, the others as encoded.

        :param x: one datum, ``[1, *input_shape]``.
        :param units: which; all by default.
        :return: ``[units, steps, *input_shape]``.
        """
        if len(x) != 1:
            raise ValueError(f"traverse moves the units of one datum, got {len(x)}: pass x[:1]")
        code = self.encode(x, *labels, **where)
        if code.dim() != 2:
            self.refuse("traverse", f"its code has shape {tuple(code.shape[1:])}, no vector of units")
        chosen = list(range(code.shape[1])) if units is None else [int(unit) for unit in units]
        if not chosen or not all(0 <= unit < code.shape[1] for unit in chosen):
            raise ValueError(f"units must be among 0 ... {code.shape[1] - 1}, got {chosen}: pass such")
        end, count = in_range("span", span, 0.0), positive_int("steps", steps, minimum=2)
        moved = code.repeat(len(chosen) * count, 1)
        value = torch.linspace(-end, end, count, dtype=code.dtype, device=code.device).repeat(len(chosen))
        index = torch.tensor(chosen, device=code.device).repeat_interleave(count)
        moved[torch.arange(len(moved), device=code.device), index] = value
        repeated = (y.repeat(len(moved)) if isinstance(y, Tensor) and y.dim() == 1 else y for y in labels)
        return self.decode(moved, *repeated, **where).unflatten(0, (len(chosen), count))

    def refuse(self, verb: str, why: str) -> NoReturn:
        """Say that a verb has no meaning for this family."""
        raise ValueError(f"{type(self).__name__} has no {verb}: {why}")

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Self:
        r"""Start the decoder's output bias at the mean of the data ``[N, *input_shape]``; returns the model itself.

        For a Bernoulli the bias is :math:`\mathrm{logit}(\mathrm{clip}(\bar x, .001, .999))`, as in the IWAE paper's
        code, where it is worth about a nat.
        """
        self.check(x)
        mean = x.mean(0, dtype=torch.float64)
        bias = self.decoder.output_bias
        bias.copy_(self.observation.initial_bias(mean).reshape(bias.shape))
        return self

    @property
    def module(self) -> nn.Module:
        """The module whose programs and weights these are."""
        return self

    @property
    def decodes(self) -> bool:
        """Whether codes stand for data."""
        return type(self).decode is not Pair.decode

    def check(self, x: Tensor) -> None:
        """A DataError for data of another shape."""
        if not isinstance(x, Tensor):
            fix = "let a collate_fn give tuples of its tensors" if isinstance(x, dict) else "pass one"
            raise DataError(f"data must be a tensor [batch, *input_shape], got a {type(x).__name__}: {fix}")
        if x.shape[1:] != self.input_shape:
            raise DataError(
                f"data must be [batch, *input_shape] with input_shape={self.input_shape}, got {tuple(x.shape)}: "
                "reshape it, or build the model with the shape of one datum"
            )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items() if value is not None)

    def _repr_html_(self) -> str:
        return described(self)


#: What a module may have beside its two programs, each as :class:`Pair` has it.
OPTIONAL = (
    "encode", "decode", "initialise", "metrics", "score_labels", "log_prob_error", "after_training", "conditional",
    "num_classes", "num_attributes", "likelihood_is", "observes_bits", "sums_over_labels", "config",
)  # fmt: skip


class OwnPair(Pair):
    """A module with ``.model`` and ``.guide``, dressed as a pair: what it does not have is as in general.

    :param owner: the module, with any of :data:`OPTIONAL`.
    :raises ValueError: for a module without the two programs.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner, self.config = owner, {}
        for program in ("model", "guide"):
            if not callable(getattr(owner, program, None)):
                raise ValueError(f"{type(owner).__name__} has no .{program}(x): a model class needs .model and .guide")
        # Not by setattr, for which a program that is a module would be a part of this one.
        has = [name for name in ("model", "guide", *OPTIONAL) if hasattr(owner, name)]
        vars(self).update({name: getattr(owner, name) for name in has})
        if isinstance(given := self.config, dict):  # numbers that the class leaves open
            self.num_classes = given.get("num_classes") if self.num_classes is None else self.num_classes
            self.num_attributes = given.get("num_attributes") if self.num_attributes is None else self.num_attributes

    @property
    def module(self) -> nn.Module:
        return self.owner

    @property
    def decodes(self) -> bool:
        return "decode" in vars(self)

    def initialise(self, x: Tensor) -> Self:
        """Nothing, unless the module has this itself."""
        return self


def as_pair(module: nn.Module) -> Pair:
    """A module as a :class:`Pair`: the zoo's as they are, any other with ``.model`` and ``.guide`` dressed as one.

    >>> pair = nn.Module()
    >>> pair.model = pair.guide = lambda x: None
    >>> as_pair(pair).conditional, as_pair(pair).likelihood_is
    (False, 'estimate')
    """
    return module if isinstance(module, Pair) else OwnPair(module)


def described(pair: Pair) -> str:
    """A pair as a notebook shows it: the sites of a run, and the parameters of each part."""
    try:
        drawn, joint = blank_run(pair)
    except Exception as error:  # of a pair that is yet to be fitted
        sites = table("Sites", [], [], f"not known: {error}")
    else:
        kinds = {
            name: [type(innermost(s[name]["fn"])).__name__ if name in s else "" for s in (joint, drawn)]
            for name in joint
        }
        rows = [
            (name, *kinds[name], list(site["fn"].event_shape), "latent" if name in drawn else "observed")
            for name, site in joint.items() if counts(site)
        ]  # fmt: skip
        sites = table("Sites", ["site", "in the model", "in the guide", "event shape", "is"], rows)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in pair.named_children()}
    parts |= {name: p.numel() for name, p in pair.named_parameters(recurse=False)}
    inside = table(
        f"{sum(parts.values()):,} parameters", ["part", "parameters"], [row for row in parts.items() if row[1]]
    )
    return table(f"{type(pair).__name__}({pair.extra_repr()})", [], []) + sites + inside


def blank_run(pair: Pair) -> tuple[Sites, Sites]:
    """The sites of guide and model on one blank datum."""
    x = blank(pair.model, 1, None, (), {})
    label = x.new_zeros(1, pair.num_attributes) if pair.num_attributes else x.new_zeros(1, dtype=torch.long)
    labels = (label,) if pair.conditional else ()
    with torch.no_grad(), isolated_rng(0), evaluating(pair.model, pair.guide), pyro.validation_enabled(False):
        return record_pair(pair.model, pair.guide, (x, *labels), {})


def layer_number(layer: int, count: int) -> int:
    """A layer's number among 1 ... count, or one clear error."""
    if positive_int("layer", layer) > count:
        raise ValueError(f"layer must be at most {count}, got {layer}: this pair has no more")
    return int(layer)


def slerp(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation of vectors on the last axis; linear where they (almost) point the same way."""
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=-1).clamp(-1, 1).unsqueeze(-1)
    angle = cosine.acos()
    sine = angle.sin()
    straight = sine < 1e-4
    safe = torch.where(straight, 1.0, sine)
    a = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / safe)
    b = torch.where(straight, t, (t * angle).sin() / safe)
    return a * start + b * end
