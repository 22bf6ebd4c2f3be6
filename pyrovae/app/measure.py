"""Measuring a trained pair: test NLL, reconstruction, units; annealing and diagnostics."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from pyrovae import runs
from pyrovae.app.card import write_card
from pyrovae.app.job import Terms, as_seen_by, observed_sites, reopen_with_data
from pyrovae.app.results import Diagnostics, Results, timed
from pyrovae.app.tables import print_results
from pyrovae.arguments import pick_device, positive_int
from pyrovae.data.feed import Feed
from pyrovae.data.images import Images
from pyrovae.engine.programs import Batch, device_of, evaluating
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.sites import counts, latent, record_pair
from pyrovae.engine.unwrap import is_discrete
from pyrovae.evaluate import active_units, ais_log_likelihood, information, log_likelihood, posterior_gap
from pyrovae.models.base import Pair
from pyrovae.plots.images import is_image
from pyrovae.ranks import ranks
from pyrovae.train.monitor import MONITORED, look_on

CLOSER = 100  # test data that are looked at closer: annealed, and their guide refined


def as_measured(pair: Pair, test: Images) -> Images:
    """The data as the programs take them when log p(x) is measured, not log p(x, y)."""
    return test.unlabelled() if pair.sums_over_labels else as_seen_by(pair, test)


def check_test(pair: Pair, test: Images) -> None:
    """Refuse, before anything is trained, test data that the pair cannot observe."""
    if pair.train_on is not None and not pair.observes_bits:
        return  # it has no programs before it is fitted, by PCA's rule, to any reals
    with isolated_rng():
        look_on(Feed(as_measured(pair, test), 100, test.x.device), pair.model, pair.guide)


def evaluate(
    folder: Path, *, samples: int, checkpoint: str, root: str | None, device: str, seed: int, ais: bool,
    diagnostics: bool, terms: Terms, out: Console,
) -> None:  # fmt: skip
    """Measure a run: results.json anew, and printed."""
    positive_int("samples", samples)
    out.quiet = out.quiet or not ranks().first
    place = pick_device(device)
    found, splits = reopen_with_data(folder, root, checkpoint, terms)
    run = terms.run(folder)
    run.check_files()
    pair, test = found.pair.to(place), splits.test
    if (ais or diagnostics) and pair.likelihood_is != "estimate":
        raise ValueError(
            f"{type(pair.module).__name__} has nothing to anneal or diagnose, its log p(x) is no estimate: leave --ais "
            "and --diagnostics out"
        )
    results = measure(pair, test, samples=samples, seed=seed)
    results |= {"checkpoint": checkpoint, "weights": found.weights, **timed(run)}
    seen = as_seen_by(pair, test)
    few = seen.subset(slice(0, CLOSER))
    if diagnostics:
        results["diagnostics"] = diagnose(pair, seen, few, samples=samples, seed=seed)
    if ais:
        results["ais"] = anneal(pair, few, samples=samples, seed=seed)
    if ranks().first:
        runs.write_json(folder / runs.RESULTS, results)
        write_card(run)
    print_results(results, out)


def measure(pair: Pair, test: Images, *, samples: int, seed: int) -> Results:
    """Test NLL with its errors, reconstruction error and active units.

    The NLL is measured with importance samples where the model's is an estimate; any other takes one.
    """
    place = device_of(pair.model) or test.x.device
    seen = as_measured(pair, test)
    results: Results = {
        "likelihood_is": pair.likelihood_is,
        "num_images": len(seen),
        "counted": "images" if is_image(seen.event_shape) else "data",
        "parameters": sum(p.numel() for p in pair.parameters()),
        "reconstruction_error": reconstruction_error(pair, seen, seed),
        "seed": seed,
    }
    if pair.likelihood_is is not None:
        sampled = pair.likelihood_is == "estimate"
        count = samples if sampled else 1
        estimate = log_likelihood(pair.model, pair.guide, seen, num_samples=count, seed=seed, progress=None)
        results |= {
            "nll": estimate.nll,
            "nll_std_error": estimate.nll_std_error if sampled else pair.log_prob_error(),
            "nll_data_std_error": estimate.nll_data_std_error,
            "num_samples": count,
            "median_ess": estimate.ess.median().item(),
            "unreliable": estimate.unreliable,
            "criterion": estimate.criterion,
            "warning": estimate.warning() if sampled else None,
            "precision": estimate.dtype,
        }
        if is_image(seen.event_shape) or observes_discrete(pair, seen):  # of other densities the unit is anyone's
            results["bits_per_dim"] = estimate.nll / (seen.event_shape.numel() * math.log(2))
    if test.labels is not None:
        results |= pair.score_labels(test.x.to(place), test.labels)  # type: ignore[typeddict-item]
    results |= pair.metrics(seen.subset(slice(0, MONITORED)).x.to(place))  # type: ignore[typeddict-item]
    units = {} if "perplexity" in results else active_units(pair.guide, seen)  # codes are no units
    results["active_units"] = {name: {"active": u.count, "of": u.variances.numel()} for name, u in units.items()}
    return results


def observes_discrete(pair: Pair, seen: Images) -> bool:
    """Whether p(x) is of discrete data, a probability and no density."""
    return bool(pair.observes_bits) or all(is_discrete(site["fn"]) for site in observed_sites(pair, seen))


def diagnose(pair: Pair, test: Images, few: Images, *, samples: int, seed: int) -> Diagnostics:
    """What the latents carry, and where the bound is lost."""
    found = information(pair.model, pair.guide, test, seed=seed)
    averaged = active_units(pair.guide, test, samples=64)
    gap = posterior_gap(pair.model, pair.guide, few, num_samples=max(samples, 64), refine_steps=200, seed=seed)
    lost = {"gap": gap.gap, "amortisation": gap.amortisation, "approximation": gap.approximation}
    return {
        "information": {name: {k: v.tolist() for k, v in site._asdict().items()} for name, site in found.items()},
        "active_units_averaged": {name: u.count for name, u in averaged.items()},
        "posterior_gap": gap._asdict() | lost | {"num_images": len(few)},
    }


def anneal(pair: Pair, few: Images, *, samples: int, seed: int) -> dict[str, float]:
    """The NLL of some data by annealing, and by importance sampling beside it."""
    annealed = ais_log_likelihood(pair.model, few, seed=seed, progress=None)
    sampled = log_likelihood(pair.model, pair.guide, few, num_samples=samples, seed=seed)
    return {
        "nll": annealed.nll, "nll_std_error": annealed.nll_std_error, "median_ess": annealed.ess.median().item(),
        "acceptance": annealed.acceptance.mean().item(), "num_chains": annealed.num_chains,
        "num_temperatures": annealed.num_temperatures, "num_images": len(few),
        "importance_nll": sampled.nll, "importance_nll_std_error": sampled.nll_std_error,
    }  # fmt: skip


def reconstruct(pair: Pair, batch: Batch, seed: int) -> Tensor | None:
    """Mean of p(x' | z) at one draw z from q(z | x); None where no latent is drawn, or x has no mean."""
    x = batch[0]
    place = device_of(pair.model) or x.device
    with torch.no_grad(), isolated_rng(seed), evaluating(pair.model, pair.guide):
        drawn, joint = record_pair(pair.model, pair.guide, tuple(a.to(place) for a in batch), {})
    observed = [s for s in joint.values() if counts(s) and s["is_observed"] and s["value"].shape == x.shape]
    try:
        return observed[0]["fn"].mean.to(x.device) if observed and latent(drawn) else None
    except NotImplementedError:
        return None


def reconstruction_error(pair: Pair, test: Images, seed: int) -> float | None:
    """Squared distance of data to their reconstructions, summed over a datum and averaged over data; or None."""
    total, fixed = 0.0, test.fixed(seed)
    for index in torch.arange(len(fixed)).split(500):
        batch = fixed.subset(index).columns
        rebuilt = reconstruct(pair, batch, seed)
        if rebuilt is None:
            return None
        total += (batch[0] - rebuilt).square().sum(dtype=torch.float64).item()
    return total / len(fixed)
