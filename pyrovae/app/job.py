"""The data and the model of a job, made from its settings or opened from its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyrovae import data as datasets
from pyrovae import models, runs
from pyrovae.app.settings import CODES, Parts, Settings, keywords, trains_itself
from pyrovae.arguments import one_of
from pyrovae.engine.programs import evaluating
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.sites import counts, record_pair
from pyrovae.engine.unwrap import is_boolean
from pyrovae.parts.labels import hide_labels


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


def _join(vqvae: Any, source: Path, folder: Path) -> Path:
    """A VQ-VAE with its learned prior as a run of its own, made of the run it comes from."""
    run = runs.Run(folder)
    run.start(runs.Run(source).config() | {"model": runs.describe(vqvae)})
    run.save("last", vqvae.state_dict())
    return folder


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
