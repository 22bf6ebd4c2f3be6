"""Measuring a trained pair: test NLL, reconstruction, units; annealing and diagnostics."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from pyrovae import data as datasets
from pyrovae import runs
from pyrovae.app.job import as_seen_by, reopen_with_data
from pyrovae.app.tables import print_results
from pyrovae.arguments import pick_device, positive_int
from pyrovae.data.images import Images
from pyrovae.engine.programs import device_of, evaluating
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.sites import counts, latent, record_pair
from pyrovae.evaluate import information
from pyrovae.evaluate.ais import ais_log_likelihood
from pyrovae.evaluate.gaps import posterior_gap
from pyrovae.evaluate.likelihood import log_likelihood
from pyrovae.evaluate.units import active_units
from pyrovae.train.monitor import MONITORED


def measure(pair: Any, test: datasets.Images, *, samples: int, seed: int) -> dict[str, Any]:
    """Test NLL with its errors, reconstruction error and active units, as JSON can hold them.

    The NLL is measured with importance samples where the model's is an estimate; any other takes one.
    """
    whole, classifies = test, hasattr(pair, "classify")
    test = test.unlabelled() if classifies else as_seen_by(pair, test)  # log p(x), not log p(x, y)
    kind = getattr(pair, "likelihood_is", "estimate")
    results: dict[str, Any] = {
        "likelihood_is": kind,
        "num_images": len(test),
        "parameters": sum(p.numel() for p in pair.parameters()),
        "reconstruction_error": reconstruction_error(pair, test, seed=seed),
        "seed": seed,
    }
    if kind is not None:
        count = samples if kind == "estimate" else 1
        estimate = log_likelihood(pair.model, pair.guide, test, num_samples=count, seed=seed, progress=None)
        error = estimate.nll_std_error if kind == "estimate" else 0.0
        if kind == "annealed":
            error = pair.log_partition(return_std_error=True)[1].item()
        results |= {
            "nll": estimate.nll,
            "nll_std_error": error,
            "nll_data_std_error": estimate.nll_data_std_error,
            "bits_per_dim": estimate.nll / (test.event_shape.numel() * math.log(2)),
            "num_samples": count,
            "median_ess": estimate.ess.median().item(),
            "unreliable": estimate.unreliable,
            "warning": estimate.warning() if kind == "estimate" else None,
            "precision": estimate.dtype,
        }
    if classifies and whole.labels is not None:
        results["accuracy"] = pair.accuracy(whole.x.to(next(pair.parameters()).device), whole.labels)
    if hasattr(pair, "metrics"):
        results |= pair.metrics(test.subset(slice(0, MONITORED)).x.to(next(pair.parameters()).device))
    units = {} if "perplexity" in results else active_units(pair.guide, test)  # codes are no units
    results["active_units"] = {name: {"active": u.count, "of": u.variances.numel()} for name, u in units.items()}
    return results


def evaluate(
    folder: Path,
    *,
    samples: int,
    checkpoint: str,
    data_dir: str | None,
    device: str,
    seed: int,
    out: Console,
    ais: bool = False,
    diagnostics: bool = False,
) -> None:
    """Measure a run again and write its results.json; if asked, by annealing, and with what its latents carry."""
    positive_int("samples", samples)
    place = pick_device(device)
    pair, splits = reopen_with_data(folder, data_dir, checkpoint)
    pair, test = pair.to(place), splits.test
    if (ais or diagnostics) and getattr(pair, "likelihood_is", "estimate") != "estimate":
        raise ValueError(
            f"{type(pair).__name__} has nothing to anneal or diagnose, its log p(x) is no estimate: leave --ais and "
            "--diagnostics out"
        )
    results = measure(pair, test, samples=samples, seed=seed) | {"checkpoint": checkpoint}
    results |= {k: v for k, v in runs.Run(folder).results().items() if k in ("timings", "seconds_per_epoch")}
    few = as_seen_by(pair, test.subset(slice(0, CLOSER)))
    if diagnostics:
        results["diagnostics"] = diagnose(pair, as_seen_by(pair, test), few, samples=samples, seed=seed)
    if ais:
        results["ais"] = anneal(pair, few, samples=samples, seed=seed)
    runs.write_json(folder / runs.RESULTS, results)
    print_results(results, out)


CLOSER = 100  # test images that are looked at closer: annealed, and their guide refined


def diagnose(pair: Any, test: datasets.Images, few: datasets.Images, *, samples: int, seed: int) -> dict[str, Any]:
    """What the latents carry, and where the bound is lost, as JSON can hold it."""
    found = {
        name: {"kl": i.kl, "mutual_information": i.mutual_information, "aggregate_kl": i.aggregate_kl}
        for name, i in information(pair.model, pair.guide, test, seed=seed).items()
    }
    averaged = active_units(pair.guide, test, samples=64)
    gap = posterior_gap(pair.model, pair.guide, few, num_samples=max(samples, 64), refine_steps=200, seed=seed)
    lost = {"gap": gap.gap, "amortisation": gap.amortisation, "approximation": gap.approximation}
    return {
        "information": found,
        "active_units_averaged": {name: u.count for name, u in averaged.items()},
        "posterior_gap": gap._asdict() | lost | {"num_images": len(few)},
    }


def anneal(pair: Any, few: datasets.Images, *, samples: int, seed: int) -> dict[str, Any]:
    """The NLL of some images by annealing, and by importance sampling beside it, as JSON can hold them."""
    annealed = ais_log_likelihood(pair.model, few, seed=seed, progress=None)
    sampled = log_likelihood(pair.model, pair.guide, few, num_samples=samples, seed=seed)
    return {
        "nll": annealed.nll,
        "nll_std_error": annealed.nll_std_error,
        "acceptance": annealed.acceptance.mean().item(),
        "num_chains": annealed.num_chains,
        "num_temperatures": annealed.num_temperatures,
        "num_images": len(few),
        "importance_nll": sampled.nll,
        "importance_nll_std_error": sampled.nll_std_error,
    }


def _batch(images: Images) -> tuple[Tensor, ...]:
    """All of a set as one batch."""
    return (images.x,) if images.labels is None else (images.x, images.labels)


def _device(pair: Any, x: Tensor) -> torch.device:
    return device_of(pair.model) or x.device


def reconstruct(pair: Any, batch: tuple[Tensor, ...], *, seed: int = 0) -> Tensor | None:
    """Mean of p(x' | z) at one draw z from q(z | x); None where no latent is drawn, or x has no mean."""
    x = batch[0]
    place = _device(pair, x)
    with torch.no_grad(), isolated_rng(seed), evaluating(pair.model, pair.guide):
        drawn, joint = record_pair(pair.model, pair.guide, tuple(a.to(place) for a in batch), {})
    observed = [s for s in joint.values() if counts(s) and s["is_observed"] and s["value"].shape == x.shape]
    try:
        return observed[0]["fn"].mean.to(x.device) if observed and latent(drawn) else None
    except NotImplementedError:
        return None


def reconstruction_error(pair: Any, test: Images, *, seed: int = 0, batch_size: int = 500) -> float | None:
    """Squared distance of data to their reconstructions, summed over a datum and averaged over data; or None."""
    total, fixed = 0.0, test.fixed(seed)
    for index in torch.arange(len(fixed)).split(batch_size):
        batch = _batch(fixed.subset(index))
        rebuilt = reconstruct(pair, batch, seed=seed)
        if rebuilt is None:
            return None
        total += (batch[0] - rebuilt).square().sum(dtype=torch.float64).item()
    return total / len(fixed)
