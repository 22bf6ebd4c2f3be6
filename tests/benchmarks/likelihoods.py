"""Draws per second of log p(x): ours beside NumPyro's, each in a process held to its cores; and, in one process,
beside a hand-written loop and Pythae's ``get_nll``."""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import pyrovae as pv
from tests.benchmarks import contenders, images, rates
from tests.benchmarks.contenders import COMPILED, HAND, OURS, PYTHAE, Setting
from tests.benchmarks.options import Options
from tests.benchmarks.tables import Row, Table, ratio
from tests.benchmarks.timing import take_turns
from tests.benchmarks.turns import Run, in_turns, numbers_of_cores

FEW = 2  # images for Pythae, which goes through them one by one: its time is proportional to them
COST = {"mlp": 1, "conv": 10}  # what divides the number of images
FIT, NUMPYRO, VMAP = rates.FIT, rates.NUMPYRO, rates.VMAP
FAR = 7.0  # standard errors between two estimates
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
    """Two tables: ours beside NumPyro's rate; all rates in one process, and log p(x) of the first images from each."""
    _, test, data = images.load(options.data_dir)
    x = test.subset(slice(max(options.images, FEW))).unlabelled().fixed().x.to(options.device)
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
    return [beside_numpyro(options), Table("log p(x)", columns, rows, notes)]


def beside_numpyro(options: Options) -> Table:
    """Draws per second on each number of cores, of the dense network as it is after the warm-up."""
    vae = contenders.trained(Setting("mlp", 20), options)
    x = images.load(options.data_dir)[1].subset(slice(options.images)).unlabelled().batch(torch.arange(options.images))
    rows: list[Row] = []
    absent: dict[str, str] = {}
    notes: list[str] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "pair.npz"
        state = {name: value.detach().cpu().numpy() for name, value in vae.state_dict().items()}
        np.savez(file, x=x.flatten(1).numpy(), **state)
        for cores in numbers_of_cores(options.cores, options.device):
            print(f"likelihoods beside NumPyro: {cores} cores", file=sys.stderr)
            found = in_turns(
                "rates", rates.NAMES, (cores, options.samples, file, options.device), options.rounds, absent, folder
            )
            draws = len(x) * options.samples
            rows.append({"cores": cores, "images": len(x), "samples": options.samples})
            rows[-1] |= {name: draws / run.best for name, run in found.items()}
            rows[-1]["cpu"] = {name: draws / min(run.cpu[1:]) for name, run in found.items()}
            rows[-1] |= {f"/ {name}": ratio(rows[-1].get(FIT), rows[-1].get(name)) for name in (NUMPYRO, VMAP, HAND)}
            rows[-1] |= {f"log p(x), {name}": run.losses[-1] for name, run in found.items()}
            notes += [f"!! {cores} cores: {why}." for why in unequal(found)]
    notes += [f"Left out: {name} ({why})." for name, why in absent.items()]
    names = [name for name in rates.NAMES if any(name in row for row in rows)]
    columns = [*names, *(f"/ {name}" for name in names if name != FIT), *(f"log p(x), {name}" for name in names)]
    return Table("Draws per second of log p(x)", ["cores", "images", "samples", *columns], rows, notes)


def unequal(found: dict[str, Run]) -> list[str]:
    """Whose log p(x) is not ours within the error."""
    if (ours := found.get(FIT)) is None:
        return []
    mean, error = ours.losses[-1], ours.errors[-1]
    return [
        f"{name} finds {run.losses[-1]:.3f} where pyrovae finds {mean:.3f} ± {error:.3f}"
        for name, run in found.items()
        if not abs(run.losses[-1] - mean) <= FAR * error
    ]


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
