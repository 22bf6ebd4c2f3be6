"""What a report is made of, as far as it is there: the run, its pair, its data; and what is missing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrovae import runs
from pyrovae.app.job import Terms, as_seen_by, example, reopen, reopen_with_data
from pyrovae.app.measure import measure
from pyrovae.app.pictures import labels_for
from pyrovae.app.report.given import NOTHING, Given, loaded, matched
from pyrovae.app.results import Results, belongs, kept_results, timed
from pyrovae.arguments import one_line
from pyrovae.data.fingerprint import fingerprint
from pyrovae.data.images import Images
from pyrovae.errors import is_out_of_memory
from pyrovae.models.base import Pair
from pyrovae.plots.images import is_image
from pyrovae.sampling import sample as draw
from pyrovae.train.resuming import FINGERPRINTS


class Notes(list[str]):
    """What is missing from a report, and why, a sentence each."""

    @contextmanager
    def missing(self, what: str) -> Iterator[None]:
        """Go on without a part that cannot be had, and keep what it warns of."""
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", UserWarning)
            try:
                yield
            except Exception as error:  # whatever a part of a run, or a user's own program, may raise
                if is_out_of_memory(error):
                    raise
                reason = f": {one_line(error, longest=None) or type(error).__name__}"
                others = [note.removesuffix(reason) for note in self if note.endswith(reason)]
                self[:] = [note for note in self if not note.endswith(reason)]
                self.add(" and ".join([*others, what]) + reason)
        for warning in heard:
            if issubclass(warning.category, UserWarning):
                self.add(one_line(warning.message, longest=None))

    def add(self, sentence: str) -> None:
        """A sentence that is not there already."""
        sentence = sentence[:1].upper() + sentence[1:]
        if sentence not in self:
            self.append(sentence)


@dataclass
class Gathered:
    """A run as a report finds it; what is absent is None, or empty, and ``notes`` say why."""

    run: runs.Run
    given: Given = NOTHING
    notes: Notes = field(default_factory=Notes)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    results: Results | None = None
    epoch: int | None = None  # of the last checkpoint
    finished: bool = False
    trained: bool = True  # by itself, and not put together from other runs
    pair: Pair | None = None
    seed: int = 0
    shape: tuple[int, ...] = ()  # of a datum
    test: Images | None = None  # to be measured on, as the pair takes it, its bits drawn
    labels: Tensor | None = None  # of ``test``, whether the pair takes them or not
    keeps: bool = False  # what was measured, as the run's results

    @classmethod
    def of(
        cls, folder: Path, *, checkpoint: str, root: str | None, device: torch.device, trust: bool,
        given: Given = NOTHING,
    ) -> Gathered:  # fmt: skip
        """Read all that there is of a run; files that were changed, or are newer, are read with a note.

        :raises CheckpointError: a folder that holds no run.
        :raises DataError: data that were given, and are none for the pair.
        """
        terms = Terms(trust, override=True)
        self = cls(terms.run(folder), given)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.config = self.run.config()
        with self.notes.missing("the config"):
            self.run.config()
        with self.notes.missing("the state of training"):
            last = self.run.checkpoint()
            kept = None if last is None else self.run.manifest(last)
            self.trained = kept is None or runs.STATE in kept["files"]
            if self.trained and (state := self.run.state()) is not None:
                self.epoch, self.finished = state["epoch"], state["finished"]
        with self.notes.missing("the curves"):
            self.history = self.run.history()
            if self.trained and self.epoch != 0 and (last := self.run.checkpoint()) is not None:
                self.run.check_file(last, runs.METRICS)
        self.read_results(checkpoint)
        with self.notes.missing("the model") if given.pair is None else nullcontext():
            self.open(folder, checkpoint, root, terms)
        if self.pair is not None:
            if given.pair is None:
                self.pair.to(device)
            if given.data is not None:
                self.take(self.pair, given.data)
            if given.samples is not None:
                self.results = measure(self.pair, self.tested, samples=given.samples, seed=self.seed)
                self.results |= {"checkpoint": checkpoint, "weights": self.run.digest(checkpoint), **timed(self.run)}
        return self

    def read_results(self, checkpoint: str) -> None:
        """Take what was measured last, if it is of the weights that are there."""
        if self.given.samples is not None:
            return
        with self.notes.missing("what was measured"):
            found = kept_results(self.run)
            if found is None:
                if self.given.data is None and self.run.checkpoint() is not None:
                    self.notes.add(f"the run was never evaluated: {self.fuller} does it")
            elif found.get("checkpoint", "last") != checkpoint or not belongs(found, self.run):
                self.notes.add(
                    f"{runs.RESULTS} is of other weights than are shown here and was left out: run pyrovae evaluate "
                    f"{self.run.path}{'' if checkpoint == 'last' else f' --checkpoint {checkpoint}'}"
                )
            else:
                self.results = found

    def open(self, folder: Path, checkpoint: str, root: str | None, terms: Terms) -> None:
        """Build the pair, and read the data that it is measured on."""
        given = self.given
        if given.pair is not None or "settings" not in self.config:
            self.pair = loaded(self.run, given, checkpoint, terms.trust)
            self.shape = tuple((self.config.get("model") or {}).get("arguments", {}).get("input_shape", ()))
            if given.data is None:
                self.notes.add("no test data are at hand, the run was made in Python: pass them, pv.report(run, data)")
            return
        self.seed = int(self.config["settings"].get("seed", 0))
        if given.data is None:
            with self.notes.missing("the test data"):
                found, splits = reopen_with_data(folder, root, checkpoint, terms)
                self.pair, self.labels = found.pair, splits.test.labels
                self.test = as_seen_by(self.pair, splits.test).fixed(self.seed)
        if self.pair is None:
            self.pair = reopen(folder, checkpoint, terms).pair
        self.shape = tuple(example(self.run).shape[1:])

    def take(self, pair: Pair, data: Images) -> None:
        """Make data that were given those that the pair is measured on."""
        seen, self.keeps = as_seen_by(pair, data), "settings" not in self.config  # whose test data are others
        if fingerprint(*seen.columns) == (self.config.get(FINGERPRINTS) or {}).get("train"):
            self.notes.add("the data are those that the run was trained on: others tell how well it fits")
            self.keeps = False
        self.test, self.labels = matched(pair, seen.fixed(self.seed)), data.labels
        self.shape = tuple(data.event_shape)

    @property
    def fuller(self) -> str:
        """How all the data are measured."""
        by_command = "settings" in self.config and self.given.data is None
        return f"pyrovae evaluate {self.run.path}" if by_command else "pv.report(run, data, num_samples=5000)"

    @property
    def opened(self) -> Pair:
        """The pair, or a ValueError."""
        if self.pair is None:
            raise ValueError("there is no model")
        return self.pair

    @property
    def tested(self) -> Images:
        """The test data, or a ValueError."""
        if self.test is None:
            raise ValueError("there are no test data")
        return self.test

    @property
    def shown(self) -> bool:
        """Whether a datum is an image."""
        return is_image(self.shape)

    def samples(self, number: int, returns: str) -> tuple[Tensor, ...]:
        """What the model generates, ``[number, *shape]``, and the labels by which it did; attributes are all 0."""
        pair, like = self.opened, torch.zeros(1, *self.shape)
        label = ",".join("0" * pair.num_attributes) if pair.conditional and pair.num_attributes else None
        labels = labels_for(pair, number, label)
        return draw(pair.module, number, *labels, returns=returns, seed=self.seed, like=like).cpu(), *labels

    def columns(self, number: int) -> tuple[Tensor, ...]:
        """At most so many of the test data as the pair takes them, or else what the model draws itself."""
        few = slice(0, number)
        return self.samples(number, "draws") if self.test is None else self.test.subset(few).columns
