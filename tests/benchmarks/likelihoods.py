"""Images times samples per second of log p(x), ours beside a hand-written loop and Pythae's ``get_nll``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import pyrovae as pv
from tests.benchmarks import contenders, images
from tests.benchmarks.contenders import COMPILED, HAND, OURS, PYTHAE, Setting
from tests.benchmarks.options import Options
from tests.benchmarks.tables import Row, Table
from tests.benchmarks.timing import take_turns

FEW = 2  # images for Pythae, which goes through them one by one: its time is proportional to them
COST = {"mlp": 1, "conv": 10}  # what divides the number of images
NLL = f"NLL of the first {FEW}"

# of network, images and samples: log p(x) of each image, or their mean
Evaluate = Callable[[pv.models.VAE, Tensor, int], object]


def ours(**keywords: bool) -> Evaluate:
    """The library's estimate, with its standard errors and diagnostics."""
    return lambda vae, x, samples: (
        pv.log_likelihood(vae.model, vae.guide, x, num_samples=samples, seed=0, **keywords).log_prob
    )


def pythae(**keywords: int) -> Evaluate:
    """Pythae's ``get_nll``, without gradients; it returns the mean of log p(x), not its negative."""

    @torch.no_grad()
    def evaluate(vae: pv.models.VAE, x: Tensor, samples: int) -> object:
        return contenders.pythae_model(vae, 1).eval().get_nll(x, n_samples=samples, **keywords)

    return evaluate


def make(samples: int, images: int) -> dict[str, tuple[Evaluate, int]]:
    """Each contender, and how many images it takes."""
    chosen = "compile" in inspect.signature(pv.log_likelihood).parameters
    return {
        HAND: (contenders.hand_log_likelihood, images),
        OURS: (ours(compile=False) if chosen else ours(), images),
        COMPILED: (ours(compile=True), images),
        PYTHAE: (pythae(), FEW),
        f"{PYTHAE}, batch_size={samples}": (pythae(batch_size=samples), FEW),
    }


def run(options: Options) -> list[Table]:
    """One table: rates, and the mean of log p(x) of the first images as everyone finds it."""
    _, test, data = images.load(options.data_dir)
    x = test.subset(slice(max(options.images, FEW))).unlabelled().x.to(options.device)
    rows: list[Row] = []
    absent: dict[str, str] = {}
    for network in options.networks:
        print(f"likelihoods: {network}", file=sys.stderr)
        found = make(options.samples, max(len(x) // COST[network], FEW))
        rows += _rows(network, found, x, options, absent)
    columns = ["network", "contender", "images", "samples", "images x samples / s", NLL]
    notes = [
        f"Data: {data}. The network after {options.warmup} training steps of the ELBO.",
        *(f"Left out: {name} ({why})." for name, why in absent.items()),
    ]
    return [Table("log p(x)", columns, rows, notes)]


def _rows(
    network: str, found: dict[str, tuple[Evaluate, int]], x: Tensor, options: Options, absent: dict[str, str]
) -> list[Row]:
    vae = contenders.trained(Setting(network, 20), options)
    nll: dict[str, float] = {}
    for name, (evaluate, _) in found.items():
        with contenders.left_out(name, absent):
            nll[name] = -torch.as_tensor(evaluate(vae, x[:FEW], options.samples)).double().mean().item()
    runs = {name: partial(found[name][0], vae, x[: found[name][1]], options.samples) for name in nll}
    times = take_turns(runs, options.seconds, options.device)
    return [
        {"network": network, "contender": name, "images": found[name][1], "samples": options.samples}
        | {"images x samples / s": 1e3 * found[name][1] * options.samples / times[name].median}
        | {NLL: value, "details": times[name].summary()}
        for name, value in nll.items()
    ]
