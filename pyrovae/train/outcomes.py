"""What the steps of an epoch come to, of each pair: their mean loss, the data left out, the steps withheld."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pyro.infer
import torch
from torch import Tensor
from torch.optim import Optimizer

from pyrovae.data.feed import Feed, number_in
from pyrovae.engine.blame import ADVICE, Cause
from pyrovae.engine.guard import last_good
from pyrovae.engine.programs import Batch, protected_buffers, rows, warn
from pyrovae.engine.randomness import isolated_rng
from pyrovae.errors import DataError, NumericalError, is_out_of_memory
from pyrovae.ranks import ALONE, Ranks
from pyrovae.train.blame import Moment, cause_of, gradient_at_fault, site_at_fault
from pyrovae.train.step import Eager, Outcome, Recorded, Step

UNKNOWN = Cause("the loss is no number, though it is one on other noise", "gradient")
MOST = 10  # steps in a row that may be skipped
EVERY, STREAMED = 100, 10  # steps after which a device is asked; of a stream, whose batches are held until then


class Watch:
    """What the steps of one pair come to, epoch by epoch.

    :param eager: the pair, and its gradients.
    :param checkpoint: where the last one is, if there is one.
    :param skips: whether steps that are withheld are counted; else the first one is an error.
    :param called: which pair it is, where there are several.
    :param ranks: processes that hear of a step at once, of which one alone may have the data that are at fault.
    """

    def __init__(
        self, eager: Eager, checkpoint: Callable[[], Path | None], skips: bool, called: str, ranks: Ranks = ALONE
    ) -> None:
        self.eager, self.checkpoint, self.skips, self.called, self.ranks = eager, checkpoint, skips, called, ranks
        self.streak, self.warned = 0, set[str]()

    @contextmanager
    def epoch(self, optimizer: Optimizer) -> Iterator[None]:
        """A new epoch, after which parameters are finite, and all that the optimizer keeps of them."""
        self.total = self.data = 0.0
        self.counts = {"left_out": 0, "skipped": 0}
        parameters = self.eager.state.parameters
        with last_good(parameters):
            yield
            for name, parameter in parameters.items():
                for kept, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor) and not value.isfinite().all():
                        self.fail(f'a gradient was so large that "{kept}" of parameter "{name}" overflowed: lower lr')

    def outcomes(self) -> dict[str, float]:
        """What the epoch has come to so far."""
        return {"total": self.total, "taken": self.data, "streak": self.streak, **self.counts}

    def resume(self, outcomes: dict[str, float]) -> None:
        """Take up what a part of the epoch had come to."""
        self.total, self.data, self.streak = outcomes["total"], outcomes["taken"], int(outcomes["streak"])
        self.counts = {name: int(outcomes[name]) for name in self.counts}

    def take(self, size: int, loss: float, left_out: float) -> None:
        """A step that was taken, on ``size`` data of which so many were left out."""
        self.streak, self.total, self.data = 0, self.total + loss * size, self.data + size - left_out
        self.counts["left_out"] += int(left_out)

    def withheld(self, moment: Moment, cause: Cause | None = None) -> None:
        """A step that was not: an error, or counted, which the first is told of."""
        found = [cause] if cause else self.ranks.gather(self.cause(moment))
        said, kind = min(found, key=lambda c: (c.kind == "gradient", c == UNKNOWN))
        self.streak += 1
        if not self.skips:
            skip = "" if kind == "state" else ', or pass on_nan="skip"'
            self.fail(f"{at(moment)} was not taken, because {said}: {ADVICE[kind]}{skip}")
        if self.streak == MOST or kind == "state":
            self.fail(f"{at(moment)} was not taken ({self.streak} in a row), because {said}: {ADVICE[kind]}")
        self.counts["skipped"] += 1
        self.warn(f'{at(moment)} was skipped, because {said}; the history counts such steps as "skipped"', "skipped")

    def left_out(self, moment: Moment, number: int, size: int) -> None:
        """Tell of the first data that were left out of a step."""
        if "left out" not in self.warned:
            found = site_at_fault(self.eager.model, self.eager.guide, moment, dead=True)
            self.warn(
                f"{number} of {size} data have a bound of -inf in {at(moment)}"
                f"{'' if found is None else f' ({found.said})'}: such data are left out of loss, gradient and bound, "
                'and the history counts them as "left_out"',
                "left out",
            )

    def known(self, moment: Moment) -> Cause | None:
        """Why a step failed, if that is because something is no number."""
        with suppress(Exception):
            return cause_of(self.eager.model, self.eager.guide, self.eager.state, moment, tries=1)
        return None

    def cause(self, moment: Moment) -> Cause:
        """Why a step is no number."""
        pair = self.eager.model, self.eager.guide
        if found := cause_of(*pair, self.eager.state, moment):
            return found
        gradient, dead = gradient_at_fault(self.eager.state), site_at_fault(*pair, moment, dead=True)
        if gradient is not None and dead is not None:
            return Cause(f"{gradient.said}, where {dead.said}", "site")
        return gradient or dead or UNKNOWN

    def mean(self, epoch: int) -> float:
        """The mean loss of an epoch's data, but of those left out."""
        if not self.data:
            self.fail(f"no step of epoch {epoch} was taken: they have no finite loss and gradient")
        return self.total / self.data

    def warn(self, message: str, kind: str) -> None:
        """Say something once."""
        if kind not in self.warned:
            self.warned.add(kind)
            warn(self.called + message)

    def fail(self, message: str) -> None:
        """End the training."""
        path = self.checkpoint()
        kept = "" if path is None else f', and "{path}" is the last checkpoint'
        raise NumericalError(f"{self.called}{message}; the pair keeps its last good weights{kept}")


def at(moment: Moment) -> str:
    """A step in words."""
    return f"step {moment.step} of epoch {moment.epoch}"


class Outcomes:
    """Reads what steps come to: on a CPU at once, from a device now and then, so that no step waits for it."""

    def __init__(self, watches: Sequence[Watch], step: Step | Recorded, feed: Feed) -> None:
        self.watches, self.step, self.feed = watches, step, feed
        self.every = 1 if step.guard.waits else STREAMED if feed.images is None else EVERY
        self.pending: list[tuple[int, int, Batch, Tensor | None, int, Outcome]] = []

    def take(self, objective: pyro.infer.ELBO, batch: Batch, epoch: int, step: int) -> None:
        """Take a step."""
        self.objective = objective
        try:
            outcome = self.step(objective, batch)
        except (ValueError, RuntimeError) as error:  # of Pyro's checks, or of torch's; they show tensors, and no cause
            if isinstance(error, DataError) or is_out_of_memory(error):
                raise
            self.read()
            self.step.guard.undo()
            moment = self.moment(epoch, step, batch, self.feed.index)
            found = self.watches[0].ranks.gather([watch.known(moment) for watch in self.watches])
            causes = next((each for each in found if any(each)), found[0])
            if not any(causes):
                raise
            of_all = next(Cause(f"{w.called}{c.said}", c.kind) for w, c in zip(self.watches, causes, strict=True) if c)
            # No pair took the step; the first that are told of it are those at fault.
            for watch, cause in sorted(zip(self.watches, causes, strict=True), key=lambda found: found[1] is None):
                watch.withheld(moment, cause or of_all)
            return
        self.pending.append((epoch, step, batch, self.feed.index, number_in(self.feed, batch), outcome))
        if len(self.pending) >= self.every:
            self.read()

    def took(
        self,
        objective: pyro.infer.ELBO,
        came: Sequence[tuple[float, int]],
        epoch: int,
        step: int,
        given: Sequence[tuple[Batch, Tensor]],
    ) -> None:
        """Take in steps of one pair from number ``step`` on that were taken already, with batch and index of each."""
        self.read()
        self.objective = objective
        for number, ((loss, left_out), (batch, index)) in enumerate(zip(came, given, strict=True)):
            self.count(self.watches[0], loss, left_out, rows(batch), (epoch, step + number, batch, index))

    def read(self) -> None:
        """Read back what was taken in since."""
        pending, self.pending = self.pending, []
        read = [t for *_, outcome in pending for t in outcome]
        numbers = [t.tolist() for t in read] if self.every == 1 else torch.stack(read).tolist() if read else []
        for number, (epoch, step, batch, index, size, _) in enumerate(pending):
            losses, left_out = (row if isinstance(row, list) else [row] for row in numbers[2 * number : 2 * number + 2])
            for watch, loss, left in zip(self.watches, losses, left_out, strict=True):
                self.count(watch, loss, left, size, (epoch, step, batch, index))

    def count(
        self, watch: Watch, loss: float, left_out: float, size: int, taken: tuple[int, int, Batch, Tensor | None]
    ) -> None:
        """Take in what a step of one pair on so many data came to, by its loss per datum."""
        if math.isnan(loss):
            watch.withheld(self.moment(*taken, watch))
            return
        watch.take(size, loss, left_out)
        if left_out:
            watch.left_out(self.moment(*taken), int(left_out), size)

    def moment(self, epoch: int, step: int, batch: Batch, index: Tensor | None, again: Watch | None = None) -> Moment:
        """A step with its data; on a device, its gradients too are found again."""
        given = self.step.gathered(batch)
        if again is not None and not self.step.guard.waits:
            with isolated_rng(), protected_buffers(again.eager.model, again.eager.guide):
                again.eager(self.objective, given)
        return Moment(epoch + 1, step + 1, given, index)
