"""Checkpoints within an epoch: where one is due, and before a signal ends the training."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from pyrovae.runs.reading import Within
from pyrovae.signals import Signals
from pyrovae.train.ahead import Ahead
from pyrovae.train.outcomes import STREAMED, Outcomes, Watch
from pyrovae.train.shared import Shared
from pyrovae.train.trainee import Trainee

FIRST = 60.0  # seconds of training before one, as long as it is not known what one costs


class Progress:
    """How far an epoch is, and its checkpoints; to be called after each of its steps.

    :param signals: those that wait while there is something to be saved.
    """

    def __init__(self, trainees: Sequence[Trainee], watches: Sequence[Watch], signals: Signals) -> None:
        self.each = list(zip(trainees, watches, strict=True))
        self.runs = [run for trainee in trainees if (run := trainee.run) is not None]
        self.signals, self.since, self.team = signals, time.monotonic(), trainees[0].setup.ranks

    def begin(self, ahead: Ahead, outcomes: Outcomes) -> None:
        """A new epoch, or what is left of the one that a checkpoint is of."""
        self.ahead, self.outcomes, self.spent = ahead, outcomes, (0.0, 0.0)
        ahead.pause = self
        if isinstance(shared := outcomes.step.gradients, Shared):
            shared.asked = lambda: bool(self.signals.number)
        for trainee, watch in self.each:
            if (then := trainee.within) is not None:
                ahead.steps, ahead.data, self.spent = (
                    then["steps"],
                    then["data"],
                    (then["seconds"], then["cpu_seconds"]),
                )
                watch.resume(then["outcomes"])
        self.began, self.first = self.clocks(), ahead.steps

    def metrics(self) -> list[dict[str, float]]:
        """What the last step of each pair shows, though it was taken before a checkpoint."""
        if self.ahead.steps > self.first:
            return [self.outcomes.step.metrics(r) for r in range(len(self.each))]
        return [trainee.within["metrics"] for trainee, _ in self.each if trainee.within is not None]

    def clocks(self) -> tuple[float, float]:
        """Seconds, of the wall's clock (but for what is compiled) and of the processor's."""
        return time.perf_counter() - self.outcomes.step.gradients.compile_seconds, time.process_time()

    def seconds(self) -> tuple[float, float]:
        """What the epoch has taken so far, by both clocks."""
        now, cpu_now = self.clocks()
        return self.spent[0] + now - self.began[0], self.spent[1] + cpu_now - self.began[1]

    def __call__(self) -> None:
        self.signals.waits = True
        if (number := self.signal()) or self.due():
            self.outcomes.read()
            with self.team.together() if number else nullcontext():
                self.save()
            if number:
                self.signals.obey(number)

    def signal(self) -> int:
        """The signal that is to be obeyed now, or 0: of several processes all obey what one has heard, at one step."""
        shared = self.outcomes.step.gradients
        if not isinstance(shared, Shared):
            return self.signals.number
        if self.ahead.steps % min(self.outcomes.every, STREAMED) or not shared.any_asked:
            return 0
        return max(self.team.gather(self.signals.number))

    def due(self) -> bool:
        """Whether a run is to be saved."""
        return any(run.due for run in self.runs) and time.monotonic() - self.since > FIRST

    def save(self) -> None:
        """Save all pairs as they are, where their data can be found again from here."""
        seconds, cpu_seconds = self.seconds()
        place = self.ahead.feed.source.place()
        for (trainee, watch), metrics in zip(self.each, self.metrics(), strict=True):
            if trainee.run is not None:
                within: Within = {
                    "steps": self.ahead.steps, "data": self.ahead.data, "seconds": seconds, "cpu_seconds": cpu_seconds,
                    "outcomes": watch.outcomes(), "metrics": metrics,
                }  # fmt: skip
                trainee.save(trainee.run, within, place)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """What an epoch's end is measured in, which a signal may cut short, as it changes nothing.

        Several processes wait for each other in it, so that what one hears waits for the next step.
        """
        try:
            with self.signals.at_once() if self.team.alone else nullcontext():
                yield
        except KeyboardInterrupt:
            self.save()
            raise
