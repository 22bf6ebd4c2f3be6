"""One experiment, from names to results: what the command line runs, usable from Python as well."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterable
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
from pyrovae.evaluate import active_units, log_likelihood
from pyrovae.fit import fit
from pyrovae.objectives import Objective
from pyrovae.programs import evaluating, isolated_rng
from pyrovae.report import pictures, print_results
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


FIT_KEYS = ("schedule", "kl_warmup", "clip_norm", "patience", "num_workers", "particles", "compile", "precision")
DATA_KEYS = ("binarization", "validation")


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
        model_class = runs.find_class(job.model, outside=run) if own else lookup("model", job.model, models.MODELS)
        objective_class = lookup("objective", job.objective.lower(), objectives.OBJECTIVES)
        known = {
            "model": [k for k in keywords(model_class) if k != "input_shape"],
            "objective": list(objective_class.defaults()),
            "fit": list(FIT_KEYS),
            "data": list(DATA_KEYS),
        }
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


def load_data(job: Settings, parts: Parts, root: str | None = None, **options: Any) -> datasets.Splits:
    """The data set of an experiment, labelled where it has labels; grey, unless asked otherwise."""
    return datasets.load(job.data, root or job.data_dir, labels=None, seed=job.seed, **(options | parts.data))


def describe_data(name: str, images: datasets.Images) -> dict[str, Any]:
    """A data set, as JSON can hold it."""
    return {"name": name, "shape": list(images.event_shape), "binarization": images.binarization}


def observes_bits(pair: Any, x: Tensor) -> bool:
    """Whether the pair's observed site is boolean and the data ``x`` are not."""
    if bool(((x == 0) | (x == 1)).all()):
        return False
    with torch.no_grad(), isolated_rng(), evaluating(pair.model, pair.guide), pyro.validation_enabled(False):
        _, joint = record_pair(pair.model, pair.guide, (x[:1].round(),), {})
    observed = [s for s in joint.values() if counts(s) and s["is_observed"] and s["value"].numel()]
    return any(is_boolean(site["fn"].support) for site in observed)


def build(parts: Parts, shape: torch.Size, grey: Tensor, seed: int) -> Any:
    """The model, with its weights drawn from ``seed`` and its output bias started from the data where it can be."""
    takes = keywords(parts.model_class)
    arguments = ({"input_shape": tuple(shape)} if "input_shape" in takes else {}) | parts.model
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


def train(job: Settings, *, run_dir: Path | None, resume: bool, explicit: set[str], out: Console) -> None:
    """Train, evaluate, draw: the main job."""
    folder = _folder(job, run_dir, resume)
    run = runs.Run(folder)
    if resume and run.exists and (then := run.config().get("settings")):
        changed = {k: v for k, v in dataclasses.asdict(job).items() if k in explicit}
        job = Settings(**(then | changed))
    parts, place = Parts.of(job, run=folder if resume else None), pick_device(job.device)
    positive_int("samples", job.samples)
    splits = load_data(job, parts)
    pair = build(parts, splits.train.event_shape, splits.train.x, job.seed)
    if observes_bits(pair, splits.train.x):
        splits = load_data(job, parts, binarization="dynamic")
    training = splits.train.unlabelled()
    out.print(f"{type(pair).__name__} on {job.data} ({len(training):,} images), {parts.objective}, run in {folder}")
    result = fit(
        pair.model, pair.guide, training, objective=parts.objective, epochs=job.epochs, batch_size=job.batch_size,
        lr=job.lr, device=place, seed=job.seed, run_dir=folder, resume=resume,
        validation=None if splits.validation is None else splits.validation.unlabelled(),
        config={"settings": dataclasses.asdict(job), "data": describe_data(job.data, training)},
        **parts.fit,
    )  # fmt: skip
    if (folder / runs.RESULTS).exists():
        out.print(f'the run "{folder}" is finished; its results are in {runs.RESULTS}')
        return
    if result.timings["steps"]:
        t = result.timings
        speed = f"{t['ms_per_step']:.2f} ms a step, {t['path']}"
        out.print(f"trained {len(result.history)} epochs in {t['seconds']:.1f} s ({speed})")
    results = measure(pair, splits.test, samples=job.samples, seed=job.seed) | {"timings": result.timings}
    drawn = pictures(pair, splits.test, result.history, folder, seed=job.seed)
    runs.write_json(folder / runs.RESULTS, results | {"checkpoint": "last"})
    print_results(results, out)
    out.print(f"pictures in {folder}: " + ", ".join(path.name for path in drawn))


def measure(pair: Any, test: datasets.Images, *, samples: int, seed: int) -> dict[str, Any]:
    """Test NLL with its errors, and active units, as JSON can hold them."""
    test = test.unlabelled()
    estimate = log_likelihood(pair.model, pair.guide, test, num_samples=samples, seed=seed, progress=None)
    units = active_units(pair.guide, test)
    return {
        "nll": estimate.nll,
        "nll_std_error": estimate.nll_std_error,
        "nll_data_std_error": estimate.nll_data_std_error,
        "bits_per_dim": estimate.nll / (test.event_shape.numel() * 0.6931471805599453),
        "num_images": len(test),
        "num_samples": samples,
        "median_ess": estimate.ess.median().item(),
        "unreliable": estimate.unreliable,
        "warning": estimate.warning(),
        "active_units": {name: {"active": u.count, "of": u.variances.numel()} for name, u in units.items()},
        "seed": seed,
        "precision": estimate.dtype,
    }


def evaluate(
    folder: Path, *, samples: int, checkpoint: str, data_dir: str | None, device: str, seed: int, out: Console
) -> None:
    """Measure a run again and write its results.json."""
    positive_int("samples", samples)
    place = pick_device(device)
    pair, job, parts = reopen(folder, checkpoint)
    binarization = runs.Run(folder).config()["data"].get("binarization", "none")
    splits = load_data(job, parts, data_dir, binarization=binarization)
    results = measure(pair.to(place), splits.test, samples=samples, seed=seed) | {"checkpoint": checkpoint}
    if timings := runs.Run(folder).results().get("timings"):
        results |= {"timings": timings}
    runs.write_json(folder / runs.RESULTS, results)
    print_results(results, out)


def sample(folder: Path, number: int, *, draws: bool, output: Path | None, checkpoint: str, seed: int) -> Path:
    """Draw new data from a run's model into a picture."""
    from pyrovae.plots import image_grid

    number = positive_int("number", number)
    pair, _, _ = reopen(folder, checkpoint)
    images = draw(pair, number, returns="draws" if draws else "means", seed=seed, like=_example(folder))
    return Path(image_grid(images, output or folder / "samples.png"))


def _example(folder: Path) -> Tensor:
    return torch.zeros(1, *runs.Run(folder).config()["data"]["shape"])


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
    words = (job.model.rpartition(":")[2], Path(job.data.rpartition(":")[2]).stem, job.objective)
    base = Path("runs") / "-".join(words).lower()
    taken = [base, *(base.with_name(f"{base.name}-{i}") for i in range(2, 10_000))]
    free = next(i for i, path in enumerate(taken) if not runs.Run(path).exists)
    return taken[max(free - 1, 0)] if resume else taken[free]
