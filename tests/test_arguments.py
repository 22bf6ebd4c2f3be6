"""Arguments: what each check says, once and in full; then that everything public has its arguments checked, by name."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import pyrovae as pv
from pyrovae.arguments import in_range, one_of, pick_device, positive_int, rising_betas, sizes, weight
from pyrovae.models import MODELS
from tests.pairs import guide_of, model_of
from tests.zoo import ZOO

ACTIVATION = partial(one_of, "activation", choices=("tanh", "relu"))
MESSAGES = [
    *(
        (positive_int, ("n", bad), f"n must be an integer of at least 1, got {bad!r}: pass 1 or more")
        for bad in (0, -3, 2.5, 2.0, True, "3", None)
    ),
    (positive_int, ("n", 1, 2), "n must be an integer of at least 2, got 1: pass 2 or more"),
    (sizes, ("hidden", 200), "hidden must be a sequence of integers, got 200: pass such as [200, 200]"),
    (sizes, ("hidden", "ab"), "hidden must be a sequence of integers, got 'ab': pass such as [200, 200]"),
    (sizes, ("hidden", (4, 0)), "every entry of hidden must be an integer of at least 1, got 0: pass 1 or more"),
    *(
        (in_range, ("p", bad, 0, 1), f"p must be a number in [0, 1], got {bad!r}: pass a value in that range")
        for bad in (-0.1, 1.5, math.nan, math.inf, True, "0.5", None)
    ),
    (in_range, ("x", -1.0, 0), "x must be a number in [0, inf), got -1.0: pass a value in that range"),
    (weight, ("w", -1.0), "w must be a number in [0, inf), got -1.0: pass a value in that range"),
    *(
        (rising_betas, (bad,), f"betas must rise from 0 to 1, got {bad}: pass such as (0, .1, .5, 1)")
        for bad in ([], [0.0], [0.0, 0.5], [0.1, 1.0], [0.0, 0.5, 0.5, 1.0])
    ),
    (rising_betas, ([0, 2],), "every beta must be a number in [0, 1], got 2: pass a value in that range"),
    (ACTIVATION, ("thanh",), "unknown activation 'thanh': did you mean 'tanh'? Choose one of tanh, relu"),
    (ACTIVATION, (7,), "unknown activation 7: did you mean 'tanh'? Choose one of tanh, relu"),
    (pick_device, ("gpu",), "unknown device 'gpu': pass \"auto\", \"cpu\", \"cuda\" or \"cuda:0\""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("check", "arguments", "message"), MESSAGES, ids=lambda value: getattr(value, "__name__", str(value)[:30])
)
def test_a_check_states_the_rule_the_value_and_the_fix(check, arguments, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        check(*arguments)
    assert str(caught.value) == message


def test_what_is_right_comes_back_plain():
    assert [type(v) for v in (positive_int("n", np.int64(3)), in_range("p", np.float32(1), 0))] == [int, float]
    assert sizes("hidden", np.array([3, 4])) == (3, 4)
    assert sizes("hidden", ()) == ()
    assert rising_betas((0, 0.5, 1)) == [0.0, 0.5, 1.0]
    annealed = torch.tensor(-1.0)
    assert weight("w", annealed) is annealed
    assert pick_device("cpu") == torch.device("cpu")


# --- models ----------------------------------------------------------------------------------------------------------

NETWORK = {"network": ["cnn", "mpl"], "likelihood": ["gausian", 3]}
BAD_MODELS: dict[str, dict[str, list[Any]]] = {
    "vae": {
        "input_shape": [784, (), (1, 0, 8), (1, 8.0, 8), "abc"], "latent_dim": [0, 2.5], "hidden": [200, (200, -1)],
        "posterior": ["diag"], "prior": ["vampire"], "activation": ["tan", torch.nn.Tanh], **NETWORK,
    },
    "vae, convolutions": {"channels": [8, (), (0,)]},
    "vae, flow": {"flows": [0], "flow_hidden": [(2, 0), 8]},
    "vae, prior mixture": {"components": [0, 2.5]},
    "vae, gaussian, learned": {"scale": [0.0, -0.1, math.inf, math.nan, "learnt", True, None]},
    "vae, 17 levels": {"levels": [1, 2.5]},
    "hierarchical, bottom_up": {
        "input_shape": [()], "latent_dims": [(), 50, (5, 0)], "hidden": [200, (200, 100), ((16,), (0,))],
        "guide": ["topdown"], **NETWORK,
    },
    "hierarchical, vamp, bottom_up": {"components": [0]},
    "deep": {
        "patch": [0], "channels": [(), 4, (4,)], "blocks": [2, (0, 1)], "latent_channels": [(1.5, 2)],
        "likelihood": ["bernouli"],
    },
    "conditional": {"num_classes": [1, 2.0], "latent_dim": [0], "posterior": ["diag"], **NETWORK},
    "conditional, attributes": {"num_attributes": [0]},
    "semi_supervised": {
        "num_classes": [1], "classification_weight": [-1.0], "class_probs": [(0.5, 0.5), (0.5, 0.5, 0.0)], **NETWORK,
    },
    "autoencoder": {"input_shape": [()], "latent_dim": [0], "density_components": [0], **NETWORK},
    "sparse_autoencoder, l1": {"penalty": ["l2"], "weight": [-1.0]},
    "sparse_autoencoder, kl": {"rho": [0.0, 1.0]},
    "denoising_autoencoder, gaussian": {"noise": ["gausian"], "level": [-0.1]},
    "denoising_autoencoder, masking": {"level": [1.5]},
    "vqvae": {
        "num_codes": [1], "code_dim": [0], "commitment_weight": [-1.0], "ema_decay": [1.5], "num_quantizers": [0],
        "residual_layers": [-1], "num_downsamplings": [0], "likelihood": ["bernouli"],
    },
    "code_prior": {"num_codes": [1], "channels": [0], "num_layers": [0], "kernel_size": [1]},
    "rbm": {"num_visible": [0, "64"], "num_hidden": [2.5], "ais_chains": [1], "ais_steps": [0], "burn_in": [0]},
    "pca": {"input_shape": [()], "latent_dim": [0]},
}  # fmt: skip


def rows(table):
    return [(owner, name, bad) for owner, rules in table.items() for name, values in rules.items() for bad in values]


@pytest.mark.parametrize(("variant", "name", "bad"), rows(BAD_MODELS), ids=repr)
def test_a_models_arguments_are_checked(variant, name, bad):
    (row,) = [row for row in ZOO if row.name == variant]
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b") as caught:
        MODELS[row.family](**row.options | {name: bad})
    assert "\n" not in str(caught.value)


FLOWS = "prior='normal' with posterior='diagonal' has no flows, got flows=3: leave it out, or use prior='flow' or "
COMPONENTS = "prior='normal' with posterior='diagonal' has no components, got components=3: leave it out, or use prior="
TOGETHER = [  # what is refused though each argument is one that there is
    ("vae", {"channels": (8,)}, "network='mlp' has no channels"),
    ("vae", {"scale": 0.1}, "likelihood='bernoulli' has no scale"),
    ("vae, gaussian, learned", {"levels": 256}, "has no levels"),
    ("vae", {"flows": 3}, FLOWS + "posterior='flow' or posterior='iaf'"),
    ("vae", {"components": 3}, COMPONENTS + "'mixture' or prior='vamp'"),
    ("vae, prior mixture", {"flows": 3}, "prior='mixture' with posterior='diagonal' has no flows"),
    ("vae, full", {"flow_hidden": (9,)}, "posterior='full' has no flow_hidden"),
    ("vae, iaf", {"components": 3}, "has no components, got components=3"),
    ("vae, iaf", {"latent_dim": 5, "flow_hidden": (2,)}, r"5 or more units each, got \(2,\)"),
    ("vae, iaf", {"latent_dim": 1}, "a flow needs at least 2 latent units, got 1"),
    ("hierarchical, bottom_up", {"latent_dims": (5, 4, 3)}, "hidden must give widths for each of 3 layers .* got 2"),
    ("hierarchical, bottom_up", {"channels": (8,)}, "network='mlp' has no channels"),
    ("hierarchical, top_down", {"posterior": "iaf"}, "'top_down' multiplies diagonal normals, got posterior='iaf'"),
    ("hierarchical, top_down", {"posterior": "full"}, "use guide='bottom_up'"),
    ("hierarchical, top_down", {"flows": 2}, "prior='normal' with posterior='diagonal' has no flows"),
    ("hierarchical, top_down, prior flow", {"latent_dims": (5, 1)}, "at least 2 latent units, got 1"),
    ("deep, logistic", {"input_shape": (64,)}, r"scales need a shape \(channels, height, width\), got \(64,\)"),
    ("deep, logistic", {"input_shape": (1, 8, 8, 8)}, r"scales need a shape .*got \(1, 8, 8, 8\)"),
    ("deep, logistic", {"input_shape": (1, 7, 8)}, "height 7 is no multiple of 2, the step of scale 1 of 2.*pad to 8"),
    ("deep, logistic", {"input_shape": (1, 8, 30)}, "width 30 is no multiple of 4, the step of scale 2 .*pad to 32"),
    ("deep, logistic", {"channels": (4,)}, r"entry per scale, got channels=\(4,\), latent_channels=\(1, 2\)"),
    ("deep", {"levels": 4}, "has no levels"),
    ("conditional", {"num_classes": None}, "or attributes, got neither: give num_classes or num_attributes"),
    ("conditional", {"num_attributes": 2}, "got both"),
    ("semi_supervised", {"class_probs": (0.5, 0.5)}, "class_probs must have 3 entries, one per class, got 2"),
    ("semi_supervised", {"classifier": {"netwrok": "conv"}}, "setting of the classifier 'netwrok': did you mean"),
    ("semi_supervised", {"classifier": {"channels": [3]}}, "network='mlp' has no channels"),
    ("autoencoder", {"channels": (4,)}, "network='mlp' has no channels"),
    ("sparse_autoencoder, l1", {"rho": 0.1}, "penalty='l1' has no rho, got rho=0.1: leave it out, or use 'kl'"),
    ("vqvae", {"input_shape": (1, 28, 30), "num_downsamplings": 2}, "of 4, got 28x30: pad to 28x32, or give num_down"),
    ("vqvae", {"input_shape": (1, 27, 28), "num_downsamplings": 2}, "multiples of 4, got 27x28: pad to 28x28$"),
    ("vqvae", {"input_shape": (28, 28)}, r"needs images \(channels, height, width\), got \(28, 28\)"),
    ("vqvae", {"prior": {"input_shape": [4, 4], "num_codes": 5}}, r"over grids \(1, 1\) of 5 codes, got \(4, 4\)"),
    ("code_prior", {"input_shape": (1, 2, 2)}, r"input_shape must be a grid \(height, width\), got \(1, 2, 2\)"),
    ("code_prior", {"kernel_size": 4}, "kernel_size must be odd, got 4: pass 5"),
    ("rbm", {"num_visible": ()}, "input_shape is empty"),
    ("pca", {"latent_dim": 6}, "below the 6 entries of a datum, got 6: pass at most 5"),
]


@pytest.mark.parametrize(("variant", "options", "message"), TOGETHER, ids=str)
def test_what_does_not_go_together_is_refused(variant, options, message):
    (row,) = [row for row in ZOO if row.name == variant]
    with pytest.raises(ValueError, match=message):
        MODELS[row.family](**row.options | options)


# --- functions -------------------------------------------------------------------------------------------------------

X = torch.zeros(4)
model = model_of(lambda z: dist.Normal(z, 1.0))
guide = guide_of(lambda x: dist.Normal(x, 1.0))


VAE = pv.models.VAE((1, 2, 2), 2, (3,))
BITS = torch.zeros(4, 1, 2, 2)
FUNCTIONS = {
    "log_likelihood": (partial(pv.log_likelihood, model, guide, X), {
        "num_samples": [0, 2.5], "num_draws": [-1], "chunk_size": [0], "batch_size": [-1], "refine_steps": [-1],
        "compile": ["yes", None, 3],
    }),
    "ais_log_likelihood": (partial(pv.ais_log_likelihood, model, X), {
        "num_chains": [1], "num_temperatures": [0], "schedule": ["sigmod"], "target_acceptance": [1.5],
        "batch_size": [0], "compile": ["yes"],
    }),
    "posterior_gap": (partial(pv.posterior_gap, model, guide, X), {"num_particles": [0], "num_samples": [10]}),
    "inflate": (partial(pv.inflate, guide), {"factor": [0.0, -1.0, math.nan], "weight": [0.0, 1.5, math.nan]}),
    "information": (partial(pv.information, model, guide, X), {"num_data": [1]}),
    "active_units": (partial(pv.active_units, guide, X), {
        "threshold": [-1, math.nan, math.inf, "0.1", None], "samples": [0, 1.5, True],
    }),
    "sample": (partial(pv.sample, model, like=X), {
        "n": [0], "returns": ["mean"], "temperature": [0, -1.0],
    }),
    "fit": (partial(pv.fit, VAE.model, VAE.guide, BITS, objective=pv.ELBO(), epochs=1), {
        "epochs": [0], "batch_size": [2.5], "lr": [-1.0], "clip_norm": [0], "patience": [0],
        "kl_warmup": [-1, math.nan], "compile": ["yes", None, 2, "True"], "device": ["gpu"], "seed": [None],
        "precision": ["float16", 32, None],
        "schedule": ["parabolic"], "particles": [5, (), (0,)],
    }),
    "rbm.fit": (partial(pv.models.RBM((1, 2, 2), 3).fit, BITS, epochs=1), {
        "epochs": [0], "cd_steps": [0], "lr": [-1], "momentum": [1.0], "weight_decay": [math.nan], "chains": [0],
        "schedule": ["cosin"], "device": ["tpu"],
    }),
    "interpolate": (partial(VAE.interpolate, BITS, BITS), {"steps": [1], "path": ["curved"]}),
    "traverse": (partial(VAE.traverse, BITS[:1]), {"steps": [1], "span": [-1.0], "units": [[2], [-1], []]}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "name", "bad"), rows({name: rules for name, (_, rules) in FUNCTIONS.items()}), ids=repr
)
def test_a_functions_arguments_are_checked(function, name, bad):
    state = torch.get_rng_state()
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b") as caught:
        FUNCTIONS[function][0](**{"n": 2} | {name: bad} if function == "sample" else {name: bad})
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), state)
