"""Schedules of the learning rate: training progress in [0, 1) to its factor."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim.lr_scheduler import LRScheduler

from pyrovae.arguments import lookup

Schedule = Callable[[float], float]  # training progress in [0, 1) -> factor of the learning rate


def constant(progress: float) -> float:
    """The learning rate as it is."""
    return 1.0


def cosine(progress: float) -> float:
    r""":math:`0.01 + 0.99\,(1 + \cos \pi t)/2`: from the learning rate down to a hundredth of it."""
    return 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2


def linear(progress: float) -> float:
    r""":math:`1 - t`: straight down to nothing."""
    return 1 - progress


def iwae(progress: float) -> float:
    r"""Stages i = 0..7 of :math:`3^i` epochs (3,280 in all) at :math:`10^{-i/7}`, stretched to the epochs at hand.

    Burda, Grosse, Salakhutdinov (2016), *Importance weighted autoencoders*.

    >>> [round(iwae(epoch / 3280), 3) for epoch in (0, 1, 4, 3279)]
    [1.0, 0.72, 0.518, 0.1]
    """
    epochs = progress * 3280 + 1e-6  # an epoch that begins exactly at a boundary belongs to the later stage
    stage = next((i for i in range(8) if epochs < (3 ** (i + 1) - 1) / 2), 7)
    return 10 ** (-stage / 7)


SCHEDULES: dict[str, Schedule] = {"constant": constant, "cosine": cosine, "linear": linear, "iwae": iwae}


def make_schedule(schedule: str | Schedule) -> Schedule:
    """A schedule by its name, or any function of progress."""
    kind = schedule if isinstance(schedule, type) else type(schedule)
    if issubclass(kind, LRScheduler):
        raise TypeError(
            f"schedule must be a name or a function of progress in [0, 1), got torch's {kind.__name__}: pass such as "
            "lambda t: 0.1**t"
        )
    return schedule if callable(schedule) else lookup("schedule", schedule, SCHEDULES)
