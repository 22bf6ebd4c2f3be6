"""One experiment, from names to results: what the command line runs, usable from Python as well."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from rich.console import Console
from torch import Tensor, nn

from pyrovae import data as datasets
from pyrovae import models, objectives, runs
from pyrovae.arguments import lookup, one_of, pick_device, positive_int
from pyrovae.evaluate import active_units, ais_log_likelihood, information, log_likelihood, posterior_gap
from pyrovae.fit import fit
from pyrovae.log import Fit
from pyrovae.models.semi_supervised import hide_labels
from pyrovae.monitor import MONITORED
from pyrovae.objectives import Objective
from pyrovae.programs import evaluating, isolated_rng
from pyrovae.report import columns_for, labels_for, pictures, print_comparison, print_results, reconstruction_error
from pyrovae.sampling import sample as draw
from pyrovae.sites import counts, record_pair
from pyrovae.support import is_boolean


@dataclass
class Settings:
    """The settings of one experiment, by name; ``settings`` holds any other argument of its parts."""

    model: str = "vae"
    data: str = "digits"
    data_dir: str | None = None
    objective: str = "elbo"
    particles: int | None = None
    groups: int | None = None
    latent_dim: int | None = None
    epochs: int = 200
    batch_size: int = 100
    lr: float = 1e-3
    device: str = "auto"
    seed: int = 0
    samples: int = 5000
    settings: dict[str, Any] = field(default_factory=dict)


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """``key=value`` pairs, each value read as JSON where it is JSON, else as a string.

    >>> parse_settings(["hidden=[64, 64]", "likelihood=gaussian"])
    {'hidden': [64, 64], 'likelihood': 'gaussian'}
    """
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise ValueError(f"--set takes KEY=VALUE, got {pair!r}: write, for instance, --set hidden=[200,200]")
        try:
            settings[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            settings[key.strip()] = value
    return settings


def keywords(function: Callable[..., Any]) -> list[str]:
    """The arguments that ``--set`` can give to a class or function."""
    return [
        name for name in inspect.signature(function).parameters if name not in ("self", "options", "args", "kwargs")
    ]


_OWN_FIT = ("epochs", "batch_size", "lr", "seed", "device", "progress")  # what a model that trains itself is told
FIT_KEYS = ("schedule", "kl_warmup", "clip_norm", "patience", "num_workers", "particles", "compile", "precision")
DATA_KEYS = ("binarization", "validation", "labels_per_class")
CODES = "codes:"  # data that are the codes of a VQ-VAE's run


@dataclass
class Parts:
    """The settings sorted by the part that takes them."""

    model_class: type[nn.Module]
    objective: Objective
    model: dict[str, Any]
    fit: dict[str, Any]
    data: dict[str, Any]

    @classmethod
    def of(cls, job: Settings, *, run: Path | None = None) -> Parts:
        """Look every name up, and give each setting to the part that knows it; no class is taken from ``run``."""
        own = ":" in job.model
        model_class: Any = runs.find_class(job.model, outside=run) if own else lookup("model", job.model, models.MODELS)
        objective_class = lookup("objective", job.objective.lower(), objectives.OBJECTIVES)
        known = {
            "model": [k for k in keywords(model_class) if k != "input_shape"],
            "objective": list(objective_class.defaults()),
            "fit": list(FIT_KEYS),
            "data": list(DATA_KEYS),
        }
        if trains_itself(job.model):
            known |= {"objective": [], "fit": [k for k in keywords(model_class.fit) if k not in ("data", *_OWN_FIT)]}
        sorted_: dict[str, dict[str, Any]] = {part: {} for part in known}
        shorthand = {"latent_dim": job.latent_dim, "num_particles": job.particles, "num_groups": job.groups}
        for key, value in (job.settings | {k: v for k, v in shorthand.items() if v is not None}).items():
            part = next((p for p, keys in known.items() if key in keys), None)
            if part is None:
                everything = sorted({k for keys in known.values() for k in keys})
                one_of(f"setting of {job.model}, {job.objective}, training and data", key, everything)
            sorted_[part][key] = value  # type: ignore[index]
        objective = objective_class(**sorted_.pop("objective"))
        return cls(model_class, objective, **sorted_)


def trains_itself(model: str) -> bool:
    """Whether a model of the zoo has a ``.fit`` of its own, and no objective."""
    return hasattr(models.MODELS.get(model), "fit")


def load_data(job: Settings, parts: Parts, root: str | None = None, **options: Any) -> datasets.Splits:
    """The data set of an experiment, labelled where it has labels; grey, unless asked otherwise."""
    if job.data.startswith(CODES):
        return _codes(Path(job.data.removeprefix(CODES)), root or job.data_dir)
    options = options | parts.data
    kept = options.pop("labels_per_class", None)
    splits = datasets.load(job.data, root or job.data_dir, labels=None, seed=job.seed, **options)
    if kept is None:
        return splits
    labels: Any = as_labelled(splits.train).labels
    return splits._replace(train=splits.train.relabelled(hide_labels(labels, kept, job.seed)))


def _codes(folder: Path, root: str | None) -> datasets.Splits:
    """The data of a VQ-VAE's run as the codes that it gives them, ``[N, h, w]``."""
    pair, splits = reopen_with_data(folder, root)
    if not isinstance(pair, models.VQVAE):
        raise ValueError(f'"{CODES}{folder}" needs the run of a VQVAE, got {type(pair).__name__}: pass another run')
    device = next(pair.parameters()).device

    def encoded(images: datasets.Images) -> datasets.Images:
        x = images.fixed().x
        codes = torch.cat([pair.encode(part.to(device)).cpu() for part in x.split(500)])
        return datasets.Images(codes.to(x.dtype), images.labels, name=f"{CODES}{folder}")

    with torch.no_grad():
        held_out = None if splits.validation is None else encoded(splits.validation)
        return datasets.Splits(encoded(splits.train), held_out, encoded(splits.test))


def describe_data(name: str, images: datasets.Images) -> dict[str, Any]:
    """A data set, as JSON can hold it."""
    return {"name": name, "shape": list(images.event_shape), "binarization": images.binarization}


def observes_bits(pair: Any, images: datasets.Images) -> bool:
    """Whether the pair's observed site is boolean and the data are not."""
    if (binary := getattr(pair, "binary", None)) is False or bool(((images.x == 0) | (images.x == 1)).all()):
        return False
    if binary:
        return True
    first = images.subset([0])
    batch = (first.x.round(),) if first.labels is None else (first.x.round(), first.labels)
    with torch.no_grad(), isolated_rng(), evaluating(pair.model, pair.guide), pyro.validation_enabled(False):
        _, joint = record_pair(pair.model, pair.guide, batch, {})
    observed = [s for s in joint.values() if counts(s) and s["is_observed"] and s["value"].numel()]
    return any(is_boolean(site["fn"].support) for site in observed)


def build(
    parts: Parts,
    shape: torch.Size,
    grey: Tensor,
    seed: int,
    num_classes: int | None = None,
    num_codes: int | None = None,
) -> Any:
    """The model, with its weights drawn from ``seed`` and its output bias started from the data where it can be."""
    takes = keywords(parts.model_class)
    known: dict[str, Any] = {
        "input_shape": tuple(shape),
        "num_visible": tuple(shape),
        "num_classes": None if "num_attributes" in parts.model else num_classes,
        "num_codes": num_codes,
    }
    arguments = {name: value for name, value in known.items() if name in takes and value is not None} | parts.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pair: Any = parts.model_class(**arguments)
    for program in ("model", "guide"):
        if not callable(getattr(pair, program, None)):
            raise ValueError(
                f"{parts.model_class.__name__} has no .{program}(x): a model class needs .model and .guide"
            )
    if hasattr(pair, "initialise"):
        pair.initialise(grey)
    return pair


def as_seen_by(pair: Any, images: datasets.Images) -> datasets.Images:
    """The data as a pair takes them: with labels, if its programs are conditional on them."""
    return as_labelled(images) if getattr(pair, "conditional", False) else images.unlabelled()


def as_labelled(images: datasets.Images) -> datasets.Images:
    """The data, if they have labels."""
    if images.labels is None:
        raise datasets.DataError(
            f"labels are needed, which {images.name!r} lacks: take labelled data, or another model"
        )
    return images


def train(job: Settings, *, run_dir: Path | None, resume: bool, explicit: set[str], out: Console) -> None:
    """Train, evaluate, draw: the main job."""
    folder = _folder(job, run_dir, resume)
    run = runs.Run(folder)
    if trains_itself(job.model) and "objective" in explicit:
        raise ValueError(f"{job.model} has a rule of its own to train by, got objective {job.objective}: leave it out")
    if resume and run.exists and (then := run.config().get("settings")):
        changed = {k: v for k, v in dataclasses.asdict(job).items() if k in explicit}
        job = Settings(**(then | changed))
    parts, place = Parts.of(job, run=folder if resume else None), pick_device(job.device)
    positive_int("samples", job.samples)
    splits = load_data(job, parts)
    classes = None if splits.train.labels is None else int(splits.train.labels.max()) + 1
    vqvae = reopen(Path(job.data.removeprefix(CODES)))[0] if job.data.startswith(CODES) else None
    codes = None if vqvae is None else vqvae.quantizer.num_codes
    pair = build(parts, splits.train.event_shape, splits.train.x, job.seed, classes, codes)
    training = as_seen_by(pair, splits.train)
    if observes_bits(pair, training):
        splits = load_data(job, parts, binarization="dynamic")
        training = as_seen_by(pair, splits.train)
    alone = trains_itself(job.model)
    out.print(
        f"{type(pair).__name__} on {job.data} ({len(training):,} images), "
        f"{'its own rule' if alone else parts.objective}, run in {folder}"
    )
    config = {"settings": dataclasses.asdict(job), "data": describe_data(job.data, training)}
    if alone:
        result = _fit_alone(pair, training, job, parts.fit, run, resume, place, config)
    else:
        result = fit(
            pair.model, pair.guide, training, objective=parts.objective, epochs=job.epochs,
            batch_size=job.batch_size, lr=job.lr, device=place, seed=job.seed, run_dir=folder, resume=resume,
            validation=None if splits.validation is None else as_seen_by(pair, splits.validation),
            config=config, **parts.fit,
        )  # fmt: skip
    if (folder / runs.RESULTS).exists():
        out.print(f'the run "{folder}" is finished; its results are in {runs.RESULTS}')
        return
    if result.timings.get("steps"):
        t = result.timings
        speed = f"{t['ms_per_step']:.2f} ms a step, {t['path']}"
        out.print(f"trained {len(result.history)} epochs in {t['seconds']:.1f} s ({speed})")
    results = measure(pair, splits.test, samples=job.samples, seed=job.seed) | {"timings": result.timings}
    if hasattr(pair, "fit_density"):
        run.save("last", pair.fit_density(training).state_dict(), run.state())
    if vqvae is not None:
        joined = _join(vqvae.with_prior(pair), Path(job.data.removeprefix(CODES)), folder / "vqvae")
        out.print(f'the VQ-VAE with this prior is the run "{joined}": pyrovae evaluate {joined}')
    results["seconds_per_epoch"] = sum(row["seconds"] for row in result.history) / max(len(result.history), 1)
    drawn = pictures(pair, as_seen_by(pair, splits.test), splits.test.labels, result.history, folder, seed=job.seed)
    runs.write_json(folder / runs.RESULTS, results | {"checkpoint": "last"})
    print_results(results, out)
    out.print(f"pictures in {folder}: " + ", ".join(path.name for path in drawn))


def _join(vqvae: Any, source: Path, folder: Path) -> Path:
    """A VQ-VAE with its learned prior as a run of its own, made of the run it comes from."""
    run = runs.Run(folder)
    run.start(runs.Run(source).config() | {"model": runs.describe(vqvae)})
    run.save("last", vqvae.state_dict())
    return folder


def _fit_alone(
    pair: Any,
    training: datasets.Images,
    job: Settings,
    options: dict[str, Any],
    run: runs.Run,
    resume: bool,
    place: torch.device,
    config: dict[str, Any],
) -> Fit:
    """Train a model that has its own ``.fit``; it is saved in the end, and begins anew if it did not get there."""
    if run.exists and not resume:
        raise ValueError(f'"{run.path}" holds a run already: pass resume=True to go on with it, or another run_dir')
    if run.exists and (state := run.state()) is not None and state["finished"]:
        runs.restore(dict(pair.state_dict(keep_vars=True)), run.weights(), where=str(run.path))
        return Fit(run.history(), finished=True)
    asked = {k: getattr(job, k) for k in ("epochs", "batch_size", "lr") if getattr(job, k) != getattr(Settings, k)}
    takes = keywords(pair.fit)
    if unknown := [k for k in asked if k not in takes]:
        raise ValueError(f"{type(pair).__name__} has no {unknown[0]}, got {asked[unknown[0]]!r}: leave it out")
    run.start({"model": runs.describe(pair), "objective": None, "versions": runs.versions()} | config)
    given = asked | {k: v for k, v in (("seed", job.seed), ("device", place)) if k in takes}
    history = pair.to(place).fit(training, **given, **options)
    for row in history:
        run.log(row)
    state = {"epoch": len(history), "best_epoch": None, "finished": True, "optimizer": {}, "rng": runs.rng_snapshot()}
    run.save("last", pair.state_dict(), state)
    return Fit(history, finished=True)


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


def sample(
    folder: Path,
    number: int,
    *,
    draws: bool,
    output: Path | None,
    checkpoint: str,
    seed: int,
    label: str | None = None,
    temperature: float = 1.0,
) -> Path:
    """Draw new data from a run's model into a picture."""
    from pyrovae.plots import image_grid

    number = positive_int("number", number)
    pair, _, _ = reopen(folder, checkpoint)
    labels = labels_for(pair, number, label)
    images = draw(
        pair, number, *labels,
        returns="draws" if draws else "means", temperature=temperature, seed=seed, like=_example(folder),
    )  # fmt: skip
    return Path(image_grid(images, output or folder / "samples.png", columns=columns_for(pair, label)))


def _example(folder: Path) -> Tensor:
    return torch.zeros(1, *runs.Run(folder).config()["data"]["shape"])


def reopen_with_data(folder: Path, root: str | None = None, checkpoint: str = "last") -> tuple[Any, datasets.Splits]:
    """The trained pair of a run, and the data that it was trained and is to be measured on."""
    pair, job, parts = reopen(folder, checkpoint)
    binarization = runs.Run(folder).config()["data"].get("binarization", "none")
    return pair, load_data(job, parts, root, binarization=binarization)


def reopen(folder: Path, checkpoint: str = "last") -> tuple[Any, Settings, Parts]:
    """The trained pair of a run, with the settings it was made with."""
    one_of("checkpoint", checkpoint, ("last", "best"))
    config = runs.Run(folder).config()
    if "settings" not in config:
        raise ValueError(f'the run "{folder}" was not made by pyrovae train: load it in Python with pyrovae.load')
    job = Settings(**config["settings"])
    parts = Parts.of(job, run=folder)
    pair = None
    if config.get("model") is None:  # a class without .config: its arguments are the settings
        pair = build(parts, torch.Size(config["data"]["shape"]), _example(folder), job.seed)
    return runs.load(folder, pair=pair, checkpoint=checkpoint), job, parts


def compare(folders: Sequence[Path], out: Console) -> None:
    """A table of runs, one row each, from what their results.json say."""
    rows, base = [], Path(os.path.commonpath([folder.absolute().parent for folder in folders]))
    for folder in folders:
        run = runs.Run(folder)
        config, results = run.config(), run.results()
        if not results:
            raise datasets.DataError(f'the run "{folder}" has no {runs.RESULTS}: run pyrovae evaluate {folder}')
        rows.append((str(folder.absolute().relative_to(base)), config, results))
    print_comparison(rows, out)


def catalogue() -> dict[str, dict[str, str]]:
    """Models, objectives and data sets, with one line each."""
    return {
        "Models": {name: _first_line(cls) for name, cls in models.MODELS.items()}
        | {"my_module:MyPair": "Your own nn.Module with .model(x) and .guide(x)."},
        "Objectives": {name: _first_line(cls) for name, cls in objectives.OBJECTIVES.items()},
        "Data": dict(datasets.DATASETS),
    }


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").split("\n")[0]


def _folder(job: Settings, run_dir: Path | None, resume: bool) -> Path:
    """The run's folder: as given, else runs/MODEL-DATA-OBJECTIVE, numbered on if that is taken."""
    if run_dir is not None:
        return run_dir
    words = [job.model.rpartition(":")[2], Path(job.data.rpartition(":")[2]).stem]
    words += [] if trains_itself(job.model) else [job.objective]
    base = Path("runs") / "-".join(words).lower()
    taken = [base, *(base.with_name(f"{base.name}-{i}") for i in range(2, 10_000))]
    free = next(i for i, path in enumerate(taken) if not runs.Run(path).exists)
    return taken[max(free - 1, 0)] if resume else taken[free]
