"""The parts of a report that are computed from a run's pair and its test data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pyrovae.app.measure import as_measured, reconstruct
from pyrovae.app.pictures import columns_for, vectors_of
from pyrovae.app.report import figures, words
from pyrovae.app.report.drawing import pictures
from pyrovae.app.report.figures import Drawn
from pyrovae.app.report.gathered import Gathered
from pyrovae.app.tables import nll as nll_of
from pyrovae.app.tables import perplexity
from pyrovae.data.images import Images
from pyrovae.engine.programs import device_of, evaluating
from pyrovae.engine.randomness import isolated_rng
from pyrovae.evaluate import active_units, log_likelihood
from pyrovae.evaluate.units import mean_draws
from pyrovae.models import VQVAE

RANKED, FEWEST, SAMPLES = 1000, 40, 100  # test data that are looked at, at most and at least; samples of each
WORK = 2e11  # multiplications, at most
MOST = 3  # sites whose active units are named at the top
SAMPLED, SHOWN, ENDS, PATHS, BETWEEN = 60, 12, 8, 5, 9  # samples; reconstructions; best and worst; interpolations, of 9


@dataclass
class Ranked:
    """Data by log p(x): how many, of how many samples each, and those at both ends with their figures."""

    count: int
    samples: int
    histogram: Drawn
    best: list[tuple[str, str]]
    worst: list[tuple[str, str]]


def data(found: Gathered) -> Images:
    """The test data as log p(x) is measured on them."""
    return as_measured(found.opened, found.tested)


def within_reach(found: Gathered) -> tuple[int, int]:
    """How many test data can be looked at, with how many samples each, in the time that one waits for a page."""
    pair, few = found.opened, data(found).subset(slice(0, 2))
    place: Any = device_of(pair.model) or few.x.device
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), isolated_rng(0), evaluating(pair.model, pair.guide), counter:
        mean_draws(pair.guide, few.to(place).columns)
        reconstruct(pair, few.columns, found.seed)
    samples = SAMPLES if pair.likelihood_is == "estimate" else 1
    products = max(counter.get_total_flops() / 4, 1)  # of a datum, about
    return min(len(data(found)), max(FEWEST, min(RANKED, int(WORK / products / samples)))), samples


def ranked(found: Gathered) -> Ranked | None:
    """Test data by their log p(x); None for a model without."""
    pair = found.opened
    if pair.likelihood_is is None:
        return None
    count, samples = within_reach(found)
    seen = data(found).subset(slice(0, count))
    estimate = log_likelihood(pair.model, pair.guide, seen, num_samples=samples, seed=found.seed, progress=None)
    log_prob = estimate.log_prob.cpu()
    order = log_prob.argsort(descending=True)
    ends = order[:ENDS], order[-ENDS:].flip(0)
    shown: list[list[tuple[str, str]]] = [[], []]
    if found.shown:
        figures_of = [[f"{log_prob[i]:.1f}".replace("-", "\N{MINUS SIGN}") for i in end] for end in ends]
        shown = [list(zip(pictures(seen.x[e]), f, strict=True)) for e, f in zip(ends, figures_of, strict=True)]
    return Ranked(count, samples, figures.likelihoods(log_prob), *shown)


def lead(found: Gathered) -> str:
    """What was trained on what, in a line."""
    config = found.config
    model = str((config.get("model") or {}).get("class") or config.get("settings", {}).get("model") or "Two programs")
    on = config.get("data", {}).get("name") or (found.test.name if found.test and found.test.name != "data" else None)
    arguments = (config.get("model") or {}).get("arguments", {})
    size = arguments.get("latent_dim")
    latent = f" with {size} latent units" if isinstance(size, int) else ""
    by = f", trained by {words.objective(config)}" if config.get("objective") else ", trained by a rule of its own"
    return f"{model.rpartition(':')[2]}{latent}{f' on {on}' if on else ''}{by}"


def status(found: Gathered) -> str:
    """How far training came."""
    planned = found.config.get("training", {}).get("epochs") or found.config.get("settings", {}).get("epochs")
    if not found.trained:
        return ""
    if found.epoch is None:
        return "no checkpoint yet"
    if found.finished:
        return "finished"
    return f"not finished: epoch {found.epoch}{f' of {planned}' if planned else ''}"


def cards(found: Gathered) -> list[tuple[str, str, str]]:
    """The figures that one looks for first: what, how much, and in what unit."""
    shown, results = [], found.results
    if results is not None and results["likelihood_is"] is not None:
        value, _, error = nll_of(results).partition(" ± ")
        shown.append(("test NLL", value, f"± {error} nats" if error else "nats"))
        if "bits_per_dim" in results:
            shown.append(("bits per dimension", f"{results['bits_per_dim']:z.3f}", ""))
    if results is not None:
        if results.get("accuracy") is not None:
            shown.append(("accuracy", f"{results['accuracy']:.1%}", ""))
        if results.get("perplexity") is not None:
            shown.append(("codes in use", perplexity(results), "perplexity"))
        if sites := list(results["active_units"].values()):
            active, of = ("+".join(str(units[key]) for units in sites[:MOST]) for key in ("active", "of"))
            more = "" if len(sites) <= MOST else f", by the first {MOST} of {len(sites)} layers"
            shown.append(("active units", active, f"of {of}{more}"))
    if found.pair is not None and (count := sum(p.numel() for p in found.pair.parameters())):
        shown.append(("parameters", f"{count:,}", ""))
    if found.history and all("seconds" in row for row in found.history):
        spent = words.seconds(sum(float(row["seconds"]) for row in found.history))
        shown.append(("training", spent, f"{len(found.history):,} epoch{'s' * (len(found.history) > 1)}"))
    return shown


def network(found: Gathered) -> list[tuple[str, str, str]]:
    """Each parameter of the pair: its name, its shape and how many numbers it has."""
    named = found.opened.module.named_parameters()
    return [(name, " × ".join(map(str, p.shape)) or "1", f"{p.numel():,}") for name, p in named]


def unit_charts(found: Gathered) -> list[Drawn]:
    """What the units carry."""
    active: dict[str, Tensor] = {}
    if found.test is not None and found.history and found.history[-1].get("kl_per_unit"):
        measured = active_units(found.opened.guide, data(found).subset(slice(0, RANKED)))
        active = {name: (units.variances > 0.01).cpu() for name, units in measured.items()}
    return figures.units(found.history, active)


def codebook(found: Gathered) -> list[Drawn]:
    """How the codes of a VQ-VAE are used by the test data."""
    pair = found.pair
    assert isinstance(pair, VQVAE)
    x = found.columns(RANKED)[0].to(next(pair.parameters()).device)
    with torch.no_grad():
        codes = pair.encode(x).cpu()
    number, several = pair.quantizer.num_codes, pair.quantizer.num_quantizers > 1
    books = codes.movedim(-3, 0) if several else codes.unsqueeze(0)
    return [figures.codebook(torch.bincount(book.flatten(), minlength=number).double()) for book in books]


def drawn_samples(found: Gathered) -> tuple[list[str], int | None]:
    """Samples of the model; of a conditional one a column for every class."""
    columns = columns_for(found.opened)
    number = SAMPLED if columns is None else columns * max(1, SAMPLED // columns)
    return pictures(found.samples(number, "means")[0]), columns


def rebuilt(found: Gathered) -> list[tuple[str, str]]:
    """Test data, and what the model makes of them."""
    few = found.tested.subset(slice(0, SHOWN))
    made = reconstruct(found.opened, few.columns, found.seed)
    return [] if made is None else list(zip(pictures(few.x), pictures(made), strict=True))


def between(found: Gathered) -> list[list[str]]:
    """What lies between pairs of test data, of one label where the model takes labels, of two, if it can be, else."""
    pair, test, labels = found.opened, found.tested, found.labels
    left, ends = list(range(min(len(test), RANKED))), list[tuple[int, int]]()
    while left and len(ends) < PATHS:
        i = left.pop(0)
        fits = (j for j in left if labels is None or bool((labels[i] == labels[j]).all()) == pair.conditional)
        if (j := next(fits, None if pair.conditional else next(iter(left), None))) is not None:
            left.remove(j)
            ends.append((i, j))
    if not ends:
        return []
    place: Any = device_of(pair.model) or test.x.device
    (a, *given), (b, *_) = (test.subset(list(side)).to(place).columns for side in zip(*ends, strict=True))
    with torch.no_grad(), isolated_rng(found.seed):
        images = pair.interpolate(a, b, *given, steps=BETWEEN)
    return [pictures(row) for row in images]


def plane(found: Gathered) -> Drawn | None:
    """The codes of test data, where a site has vectors of them."""
    pair, some = found.opened, found.tested.subset(slice(0, 2 * RANKED))
    place: Any = device_of(pair.model) or some.x.device
    with torch.no_grad(), isolated_rng(found.seed), evaluating(pair.model, pair.guide):
        averages = mean_draws(pair.guide, some.to(place).columns)
    vectors = vectors_of({name: average.mean.cpu() for name, average in averages.items()})
    labels = found.labels if found.labels is None or found.labels.dim() == 1 else None
    return None if vectors is None else figures.plane(vectors, None if labels is None else labels[: len(some)])
