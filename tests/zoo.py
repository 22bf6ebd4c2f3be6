"""The zoo's variants, one row each, on small data: a new one joins the laws, and the compiler's, by adding its row."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyrovae.models import MODELS
from pyrovae.models.autoencoders import CORRUPTIONS
from pyrovae.models.base import Pair
from pyrovae.models.hierarchical import GUIDES
from pyrovae.parts import LIKELIHOODS, POSTERIORS, PRIORS

GREY = torch.rand(55, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BITS = torch.bernoulli(GREY, generator=torch.Generator().manual_seed(1))
CLASSES = torch.arange(55) % 3
PARTLY = torch.where(torch.arange(55) % 2 == 0, CLASSES, -1)
ATTRIBUTES = GREY[:, -2:] * 2 - 1


@dataclass(frozen=True, eq=False)
class Variant:
    """One architecture: its family's name, the constructor's arguments, and the labels that its data have."""

    name: str
    options: dict[str, Any]
    labels: Tensor | None = None
    brief: bool = True  # whether it stands for its kind where all would take too long
    family: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", self.name.split(",")[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one datum."""
        shape = self.options.get("input_shape", self.options.get("num_visible"))
        return shape if isinstance(shape, tuple) else (shape,)

    @property
    def codes(self) -> bool:
        """Whether the guide's draws are point masses that carry parameters."""
        return "autoencoder" in self.family or self.family in ("vqvae", "semi_supervised")

    def make(self) -> Pair:
        return MODELS[self.family](**self.options)

    def batch(self, size: int = 7) -> tuple[Tensor, ...]:
        """Bits, and labels where it has them."""
        x = BITS[:size, : math.prod(self.shape)].view(-1, *self.shape)
        return (x,) if self.labels is None else (x, self.labels[:size])

    def used(self, std: float = 0.1) -> Pair:
        """One away from its start, where flows are the identity and layers silent, with all that generation needs."""
        pair, x = self.make(), self.batch(55)[0]
        with torch.no_grad():
            for parameter in pair.parameters():
                parameter.add_(std * torch.randn_like(parameter))
        if self.family == "pca":
            pair.fit(x)
        if "autoencoder" in self.family:
            pair.fit_density(x)
        return pair


def variants(family: str, common: dict[str, Any], rows: dict[str, dict[str, Any]], brief: bool = True) -> list[Variant]:
    """Rows of one family, named by what they differ in; ``labels`` is no argument of the constructor."""
    made = []
    for name, row in rows.items():
        options = common | row
        labels = options.pop("labels", None)
        made.append(Variant(f"{family}, {name}" if name else family, options, labels, brief))
    return made


FLOWS = {"flow": {"flows": 2, "flow_hidden": [8]}, "iaf": {"flows": 2}}
COMPONENTS = {"mixture": {"components": 3}, "vamp": {"components": 3}}
CONVOLUTIONS = {"input_shape": (1, 4, 4), "network": "conv", "channels": (2,), "activation": "relu"}
SCALES = {"gaussian": ("learned", 0.3, "per_pixel"), "discretized_logistic": ("learned", "per_pixel")}
VAE = {"input_shape": (6,), "latent_dim": 2, "hidden": (3,)}
LAYERS = {"input_shape": (6,), "latent_dims": (3, 2), "hidden": ((4,), (3,))}
DEEP = {"input_shape": (2, 4, 8), "channels": (2, 3), "latent_channels": (1, 2), "blocks": (2, 1)}
AVERAGES = {"ema_decay": 0.9, "revive_below": 0.3}

ZOO: list[Variant] = [
    *variants("vae", VAE, {
        "": {}, "linear": {"hidden": ()}, "convolutions": CONVOLUTIONS,
        **{name: {"likelihood": name} for name in LIKELIHOODS if name not in ("bernoulli", *SCALES)},
        **{f"{name}, {scale}": {"likelihood": name, "scale": scale} for name in SCALES for scale in SCALES[name]},
        **{name: {"posterior": name} | FLOWS.get(name, {}) for name in POSTERIORS if name != "diagonal"},
        **{f"prior {name}": {"prior": name} | COMPONENTS.get(name, {}) for name in PRIORS if name != "normal"},
    }),
    *variants("vae", VAE, {
        "17 levels": {"likelihood": "discretized_logistic", "levels": 17},
        "prior and posterior": {"prior": "flow", "posterior": "full"},
        "linear convolutions": CONVOLUTIONS | {"hidden": (), "likelihood": "gaussian", "scale": "per_pixel"},
        "any shape": {"input_shape": (2, 1, 3)},
    }, brief=False),
    *variants("hierarchical", LAYERS, {
        **{guide: {"guide": guide} for guide in GUIDES},
        "richer": {"prior": "vamp", "components": 3, "posterior": "iaf", "flows": 1},
        "top_down, prior flow": {"guide": "top_down", "prior": "flow", "flows": 2},
    }),
    *variants("hierarchical", LAYERS, {
        f"{name}, {guide}": {"guide": guide} | options
        for guide in GUIDES
        for name, options in {
            "linear": {"hidden": ((), ())},
            "one layer": {"latent_dims": (3,), "hidden": ((4,),)},
            "three layers": {"latent_dims": (3, 2, 2), "hidden": ((4,), (), (3, 2))},
            "convolutions": CONVOLUTIONS,
            "gaussian": {"likelihood": "gaussian", "scale": "per_pixel"},
            "mixture": {"prior": "mixture", "components": 3},
            "vamp": {"prior": "vamp", "components": 3},
        }.items()
    } | {
        "full": {"posterior": "full"},
        "flow": {"posterior": "flow", "flows": 2},
        "linear, iaf": {"posterior": "iaf", "flows": 2, "hidden": ((), ())},
        "vamp, one layer": {"prior": "vamp", "components": 3, "latent_dims": (3,), "hidden": ((4,),)},
        "17 levels": {"likelihood": "discretized_logistic", "levels": 17},
    }, brief=False),
    *variants("deep", DEEP, {
        "": {"input_shape": (1, 2, 2), "channels": (3, 2), "blocks": (1, 1), "likelihood": "bernoulli", "patch": 1},
    }),
    *variants("deep", DEEP, {
        "logistic": {}, "gaussian": {"likelihood": "gaussian", "scale": 0.1}, "per_pixel": {"scale": "per_pixel"},
        "three scales": {"patch": 1, "channels": (2, 3, 4), "latent_channels": (1, 2, 3), "blocks": (1, 1, 2)},
        "one scale": {"patch": 4, "channels": (4,), "latent_channels": (2,), "blocks": (1,)},
    }, brief=False),
    *variants("conditional", VAE | {"num_classes": 3, "labels": CLASSES}, {"": {"conditional_prior": True}}),
    *variants("conditional", VAE | {"num_attributes": 2, "labels": ATTRIBUTES}, {"attributes": {}}),
    *variants("conditional", VAE | {"num_classes": 3, "labels": CLASSES}, {
        "plain": {}, "linear": {"hidden": ()}, "full": {"posterior": "full"},
        "iaf": {"posterior": "iaf", "flows": 2}, "convolutions": CONVOLUTIONS,
        "gaussian": {"likelihood": "gaussian", "scale": "per_pixel"},
    }, brief=False),
    *variants("conditional", VAE | {"num_attributes": 2, "labels": ATTRIBUTES}, {
        "linear attributes": {"hidden": (), "conditional_prior": True},
    }, brief=False),
    *variants("semi_supervised", VAE | {"num_classes": 3}, {
        "": {}, "partly labelled": {"classification_weight": 0.7, "labels": PARTLY},
    }),
    *variants("semi_supervised", VAE | {"num_classes": 3, "labels": PARTLY}, {
        "linear": {"hidden": ()}, "full": {"posterior": "full"}, "flow": {"posterior": "flow", "flows": 1},
        "gaussian": {"likelihood": "gaussian"}, "convolutions": CONVOLUTIONS,
        "class_probs": {"class_probs": (0.2, 0.3, 0.5)},
        "own classifier": {
            "input_shape": (1, 4, 4), "classifier": {"network": "conv", "channels": [3], "hidden": ()},
        },
    }, brief=False),
    *variants("autoencoder", VAE | {"density_components": 3}, {"": {}, "gaussian": {"likelihood": "gaussian"}}),
    *variants("autoencoder", VAE | {"density_components": 3}, {
        "linear": {"hidden": ()}, "convolutions": CONVOLUTIONS,
        "per_pixel": {"likelihood": "gaussian", "scale": "per_pixel", "hidden": ()},
        "continuous_bernoulli": {"likelihood": "continuous_bernoulli"},
        "17 levels": {"likelihood": "discretized_logistic", "levels": 17},
    }, brief=False),
    *variants("sparse_autoencoder", VAE | {"density_components": 3}, {
        "l1": {"penalty": "l1", "weight": 0.3}, "kl": {"penalty": "kl", "weight": 2.0, "rho": 0.2},
    }),
    *variants("denoising_autoencoder", VAE | {"density_components": 3}, {
        noise: {"noise": noise, "level": 0.4} for noise in CORRUPTIONS
    }),
    *variants("vqvae", {
        "input_shape": (1, 2, 2), "num_codes": 5, "code_dim": 3, "channels": 8, "num_downsamplings": 1,
    }, {"": {}, "averages": AVERAGES, "residual": {"ema_decay": 0.9, "num_quantizers": 2}}),
    *variants("vqvae", {
        "input_shape": (1, 4, 4), "num_codes": 5, "code_dim": 3, "channels": 8, "num_downsamplings": 1,
    }, {
        "residual without averages": {"num_quantizers": 2},
        "gaussian": {"likelihood": "gaussian", "scale": "per_pixel"},
        "logistic": {"likelihood": "discretized_logistic", "levels": 2},
        "17 levels": {"likelihood": "discretized_logistic", "scale": "per_pixel", "levels": 17},
        "continuous_bernoulli": {"likelihood": "continuous_bernoulli"},
        "no residual layers": {"residual_layers": 0}, "two downsamplings": {"num_downsamplings": 2},
    }, brief=False),
    *variants("code_prior", {"num_codes": 2, "channels": 3, "num_layers": 2}, {"": {"input_shape": (2, 2)}}),
    *variants("rbm", {"num_visible": 6, "num_hidden": 2, "burn_in": 20}, {"": {}}),
    *variants("rbm", {"num_hidden": 2, "burn_in": 20}, {"of a shape": {"num_visible": (1, 2, 3)}}, brief=False),
    *variants("pca", {"input_shape": (1, 2, 3), "latent_dim": 2}, {"": {}}, brief=False),
]  # fmt: skip
