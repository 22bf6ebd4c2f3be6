"""The data and the model of a job, made from its settings or opened from its run."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, cast

import pyro
import torch
from torch import Tensor
from torch.distributions import constraints

from pyrovae import models, runs
from pyrovae.app.parts import Parts, keywords
from pyrovae.app.settings import CODES, Settings
from pyrovae.arguments import one_of, pick_device
from pyrovae.data import Images, Splits, load
from pyrovae.data.fingerprint import fingerprint
from pyrovae.engine.blame import ADVICE, nan_in
from pyrovae.engine.programs import device_of, evaluating
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.sites import Site, counts, record_pair
from pyrovae.engine.support import first_outside
from pyrovae.engine.unwrap import is_boolean
from pyrovae.errors import CheckpointError, DataError, NumericalError, ResourceError
from pyrovae.memory import Declared, require_memory
from pyrovae.models.base import Pair, as_pair
from pyrovae.parts.labels import hide_labels
from pyrovae.train.resuming import FINGERPRINTS, check_data


@dataclass(frozen=True)
class Terms:
    """On what terms a run is opened: what whoever opens it lets pass.

    :ivar trust: import the class that its config names.
    :ivar override: go on with a warning where its files were changed since they were written.
    """

    trust: bool = False
    override: bool = False

    def run(self, folder: str | Path) -> runs.Run:
        """The run in a folder."""
        return runs.Run(folder, override=self.override)


TERMS = Terms()  # nothing passes


class Opened(NamedTuple):
    """A trained pair, what it was made of, and the SHA-256 that its weights had before they were read."""

    pair: Pair
    job: Settings
    parts: Parts
    weights: str


@dataclass
class Task:
    """A job with its pair and its data."""

    job: Settings
    parts: Parts
    pair: Pair
    splits: Splits
    training: Images  # as the pair takes them
    vqvae: models.VQVAE | None  # whose codes the data are

    @classmethod
    def of(cls, job: Settings, terms: Terms, *, named: bool = True, explicit: Collection[str] = ()) -> Task:
        """Read the data and build the pair; no objective is taken by whom trains by a rule.

        :param named: whether the user named the model, and no run did.
        """
        parts, name = Parts.of(job, trust=named or terms.trust), job.objective
        if "objective" in explicit and issubclass(parts.model_class, Pair) and parts.model_class.train_on:
            raise ValueError(f"{job.model} has a rule of its own to train by, got objective {name}: leave it out")
        splits = load_data(job, parts, None, terms=terms)
        check_parts(splits, parts)
        source = reopen(Path(job.data.removeprefix(CODES)), terms=terms).pair if job.data.startswith(CODES) else None
        vqvae = cast(models.VQVAE | None, source)
        pair = build(parts, splits.train, job.seed, vqvae)
        if observes_bits(pair, as_seen_by(pair, splits.train)):
            splits = as_bits(splits, job, parts)
        if pick_device(job.device).type == "cpu":
            size = 3 * sum(p.nbytes for p in pair.parameters())
            require_memory(size, "the gradients and Adam's moments", "make layers or latents smaller")
        return cls(job, parts, pair, splits, as_seen_by(pair, splits.train), vqvae)

    def config(self) -> dict[str, object]:
        """Settings and data, as a run's config holds them."""
        shape, binarization = list(self.training.event_shape), self.training.binarization
        data = {"name": self.job.data, "shape": shape, "binarization": binarization}
        return {
            "settings": asdict(self.job),
            "data": data,
            FINGERPRINTS: fingerprints(self.pair, self.splits),
        }


def fingerprints(pair: Pair, splits: Splits) -> dict[str, str]:
    """What the parts of the data hold, in a line each, as a pair takes them."""
    train, held_out, test = splits
    parts = {"train": as_seen_by(pair, train), "validation": held_out and as_seen_by(pair, held_out), "test": test}
    return {name: fingerprint(*images.columns) for name, images in parts.items() if images is not None}


def load_data(
    job: Settings, parts: Parts, root: str | None, binarization: str | None = None, terms: Terms = TERMS
) -> Splits:
    """The data set of an experiment, labelled where it has labels; grey, unless asked otherwise."""
    if job.data.startswith(CODES):
        return encode_data(job.data.removeprefix(CODES), root or job.data_dir, terms)
    options = ({} if binarization is None else {"binarization": binarization}) | parts.data
    kept = cast(int | None, options.pop("labels_per_class", None))
    splits = load(job.data, root or job.data_dir, labels=None, seed=job.seed, **options)  # type: ignore[arg-type]
    if kept is None:
        return splits
    labels = hide_labels(cast(Tensor, as_labelled(splits.train).labels), kept, job.seed)
    return splits._replace(train=splits.train.relabelled(labels))


def as_bits(splits: Splits, job: Settings, parts: Parts) -> Splits:
    """Grey data as :func:`load` gives them for binarization="dynamic", unless the settings say otherwise."""
    if job.data.startswith(CODES) or "binarization" in parts.data:
        return splits
    try:
        train, held_out, test = (
            None if x is None else Images(x.x, x.labels, binarization="dynamic", name=x.name) for x in splits
        )
    except DataError:  # by its place in the files
        return load_data(job, parts, None, "dynamic")
    held_out = None if held_out is None else held_out.fixed(job.seed)
    return Splits(cast(Images, train), held_out, cast(Images, test).fixed(job.seed))


def encode_data(folder: str, root: str | None, terms: Terms) -> Splits:
    """The data of a VQ-VAE's run as the codes that it gives them, ``[N, h, w]``."""
    if str(terms.run(folder).config().get("data", {}).get("name")).startswith(CODES):
        raise CheckpointError(f'the data of the run "{folder}" are codes themselves: pass the run of a VQVAE on images')
    (pair, *_), splits = reopen_with_data(Path(folder), root, terms=terms)
    if not isinstance(pair, models.VQVAE):
        raise ValueError(f'"{CODES}{folder}" needs the run of a VQVAE, got {type(pair).__name__}: pass another run')
    device = next(pair.parameters()).device

    def encoded(images: Images) -> Images:
        x = images.fixed().x
        codes = torch.cat([pair.encode(part.to(device)).cpu() for part in x.split(500)])
        return Images(codes.to(x.dtype), images.labels, name=f"{CODES}{folder}")

    with torch.no_grad():
        held_out = None if splits.validation is None else encoded(splits.validation)
        return Splits(encoded(splits.train), held_out, encoded(splits.test))


def check_parts(splits: Splits, parts: Parts) -> None:
    """Before anything is trained: can the test part be measured, and does it have no classes but the trained ones?"""
    train, held_out, test = splits
    if len(test) < 2:
        raise DataError(
            f"a test figure and its error need two data at least, {test.name!r} has {len(test)} to test on, "
            f"{len(train)} to train on: give a test part, or more data"
        )
    if not getattr(parts.model_class, "conditional", False):
        return
    labels = [cast(Tensor, as_labelled(images).labels) for images in (train, test, held_out) if images is not None]
    counted = "num_classes" in keywords(parts.model_class) and not {"num_classes", "num_attributes"} & set(parts.model)
    most, low = int(labels[0].max()), min(int(y.min()) for y in labels)
    if counted and (not 1 <= most < len(train) or low < -1 or any(y.max() > most for y in labels)):
        found = " and ".join(f"{int(y.min())} to {int(y.max())}" for y in labels)
        raise DataError(
            "labels must run from 0, over two classes at least and no more than there are data, and the test part have "
            f"none of its own; those of {train.name!r} run from {found} (train, test): correct, or give num_classes"
        )


def observes_bits(pair: Pair, images: Images) -> bool:
    """Whether the pair observes bits, as all that it observes or all of a datum, and the data are no bits."""
    if pair.observes_bits is False or first_outside(images.x, constraints.boolean) is None:
        return False
    if pair.observes_bits:
        return True
    sites = [site for site in observed_sites(pair, images) if site["value"].numel()]
    bits = [site for site in sites if is_boolean(site["fn"].support)]
    whole = sum(site["value"].numel() for site in bits) >= images.event_shape.numel()  # and not a column of a table
    return bool(bits) and (whole or len(bits) == len(sites))


def observed_sites(pair: Pair, images: Images) -> list[Site]:
    """The sites that observe a datum, its values rounded, as a pair's programs have them."""
    x, *labels = images.subset([0]).columns
    place = device_of(pair.model) or x.device
    with torch.no_grad(), isolated_rng(), evaluating(pair.model, pair.guide), pyro.validation_enabled(False):
        _, joint = record_pair(pair.model, pair.guide, tuple(a.to(place) for a in (x.round(), *labels)), {})
    return [site for site in joint.values() if counts(site) and site["is_observed"]]


def build(parts: Parts, images: Images, seed: int, vqvae: models.VQVAE | None = None) -> Pair:
    """The model, with its weights drawn from ``seed`` and its output bias started from the data where it can be."""
    shape = tuple(images.event_shape)
    classes = None if images.labels is None or "num_attributes" in parts.model else int(images.labels.max()) + 1
    codes = None if vqvae is None else vqvae.quantizer.num_codes
    known = {"input_shape": shape, "num_visible": shape, "num_classes": classes, "num_codes": codes}
    takes = keywords(parts.model_class)
    arguments = {name: value for name, value in known.items() if name in takes and value is not None} | parts.model
    with torch.random.fork_rng(devices=[]), Declared("a weight of the model", "make its layers or latents smaller"):
        torch.manual_seed(seed)
        pair = as_pair(parts.model_class(**arguments))
    pair.initialise(images.x)
    return pair


def as_seen_by(pair: Pair, images: Images) -> Images:
    """The data as a pair takes them: with labels, if its programs are conditional on them."""
    return as_labelled(images) if pair.conditional else images.unlabelled()


def as_labelled(images: Images) -> Images:
    """The data, if they have labels."""
    if images.labels is None:
        raise DataError(f"labels are needed, which {images.name!r} lacks: take labelled data, or another model")
    return images


def example(run: runs.Run) -> Tensor:
    """A datum of the shape that a run's model takes, all zeros."""
    return torch.zeros(1, *run.config()["data"]["shape"])


def reopen_with_data(
    folder: Path, root: str | None = None, checkpoint: str = "last", terms: Terms = TERMS
) -> tuple[Opened, Splits]:
    """The trained pair of a run, and the data that it was trained and is to be measured on."""
    found = reopen(folder, checkpoint, terms)
    with runs.opening(folder):
        drawn = terms.run(folder).config()["data"].get("binarization", "none")
        splits = load_data(found.job, found.parts, root, drawn, terms)
    check_data(terms.run(folder), fingerprints(found.pair, splits))
    return found, splits


def reopen(folder: Path, checkpoint: str = "last", terms: Terms = TERMS) -> Opened:
    """The trained pair of a run, with the settings it was made with."""
    one_of("checkpoint", checkpoint, ("last", "best"))
    run = terms.run(folder)
    config = run.config()
    if "settings" not in config:
        raise ValueError(f'the run "{folder}" was not made by pyrovae train: load it in Python with pyrovae.load')
    with runs.opening(folder):
        job = Settings.of(config["settings"])
        parts = Parts.of(job, trust=terms.trust)
        # The arguments of a class without .config are the settings.
        built = None if config.get("model") else build(parts, Images(example(run)), job.seed).module
    pair = as_pair(runs.load(run, pair=built, checkpoint=checkpoint, trust=terms.trust))
    if found := nan_in(pair.state_dict(keep_vars=True)):
        raise NumericalError(f'{found.said} in the checkpoint "{checkpoint}" of "{folder}": {ADVICE[found.kind]}')
    return Opened(pair, job, parts, run.loaded)


@contextmanager
def run_of(job: Settings, run_dir: Path | None, resume: bool, terms: Terms) -> Iterator[runs.Run]:
    """The run of a job, which no other process writes to meanwhile.

    In the folder given, else in runs/MODEL-DATA-OBJECTIVE, numbered on if that is taken.
    """
    words = [job.model.rpartition(":")[2], Path(job.data.rpartition(":")[2]).stem]
    model_class = cast(type[Pair], models.MODELS.get(job.model, Pair))
    words += [job.objective] if model_class.train_on is None else []
    base = Path("runs") / "-".join(words).lower()
    numbered = [base, *(base.with_name(f"{base.name}-{i}") for i in range(2, 10_000))]
    free = next(i for i, place in enumerate(numbered) if not runs.Run(place).exists)
    places = numbered[max(free - 1, 0) :][:1] if resume else numbered[free:]
    with ExitStack() as held:
        for place in places if run_dir is None else [run_dir]:
            run = terms.run(place)
            try:
                held.enter_context(run.writing())
            except ResourceError:  # another process has just begun there
                if run_dir is not None or resume:
                    raise
            else:
                if not run.exists or run_dir is not None or resume:
                    break
                held.close()
        yield run
