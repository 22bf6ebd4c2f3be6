"""Steps that are taken many at once: by C++, where it knows all that they do, or as replays of one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.infer
import torch
from torch import Tensor
from torch.optim import Adam

from pyrovae.compile import steps
from pyrovae.compile.checked import tensors
from pyrovae.compile.graph import Runnable
from pyrovae.compile.noise import plain_draws
from pyrovae.compile.recording import Replays
from pyrovae.data.feed import Feed
from pyrovae.data.images import Images
from pyrovae.engine.programs import Batch
from pyrovae.engine.updates import is_plain
from pyrovae.train.compiled import Compiled, CompiledGraph, put
from pyrovae.train.outcomes import Outcomes
from pyrovae.train.plan import Plan
from pyrovae.train.step import Recorded, Step

#: What the C++ knows of Adam's options.
OPTIONS = {"weight_decay": 0, "amsgrad": False, "maximize": False, "decoupled_weight_decay": False}

#: A graph, and what takes its steps.
Made = tuple[CompiledGraph, steps.Steps | Replays]


class Ahead:
    """Takes steps of an epoch: those of a compiled graph on data in memory, on a CPU by Adam without extras.

    :ivar steps: those of the epoch that were taken so far, here and elsewhere, on so many ``data``.
    """

    def __init__(self, epoch: int, feed: Feed, step: Step | Recorded, plan: Plan, outcomes: Outcomes) -> None:
        self.epoch, self.feed, self.plan, self.outcomes = epoch, feed, plan, outcomes
        self.steps = self.data = 0
        self.recorded = step if isinstance(step, Recorded) else None
        self.step = step.step if isinstance(step, Recorded) else step
        self.gradients = step.gradients if isinstance(step.gradients, Compiled) else None
        self.pause: Callable[[], None] = lambda: None  # called between steps
        self.made: dict[int, Made | None] = {}  # for each number of particles

    def now(self, more: int = 0) -> float:
        """How many epochs there were, after ``more`` steps."""
        return self.epoch + ((self.steps + more) / self.feed.steps if self.feed.steps else 0.0)

    def __call__(self, order: Tensor) -> int:
        """Take steps on the first of these data, on as many as it can, and give their number."""
        taken = 0
        if self.gradients is None or not self.step.optimizers[0].state:  # which a first step makes
            return 0
        self.made.clear()  # a step that was taken elsewhere may have put tensors in place, too
        while whole := min((len(order) - taken) // self.feed.batch_size, steps.AT_ONCE):
            objective = self.plan.at(self.now())
            if (number := objective.num_particles) not in self.made:
                self.made[number] = self.make(objective)
            made = self.made[number]
            if made is None or not (more := self.take(*made, order[taken:], whole)):
                break
            taken += more
            self.pause()
        return taken

    def take(self, graph: CompiledGraph, run: steps.Steps | Replays, order: Tensor, most: int) -> int:
        """Take steps of one graph; gives the number of their data."""
        rates, weights = [], []
        number = self.plan.at(self.now()).num_particles
        for i in range(most):
            objective = self.plan.at(now := self.now(i))
            if objective.num_particles != number:
                break
            rates.append(self.step.base_lr[0][0] * self.plan.factor(now))
            weights.append(float(getattr(objective, "kl_weight", 1.0)))
        if not (came := run(order, rates, weights)):
            return 0  # the step failed, and fails again in Python, which says why
        last = self.now(len(came) - 1)
        self.step.set_lr(self.plan.factor(last))
        data = len(came) * self.feed.batch_size
        indices = order[:data].split(self.feed.batch_size)
        given: list[Batch] = [(index,) for index in indices]
        if isinstance(run, steps.Steps):
            put(graph.reached, run.adam.gradients, graph.others)
            given = [tuple(t.clone() for t in run.batch)] * len(came)  # of the last, which may have been withheld
        self.feed.index = indices[-1]
        first, self.steps, self.data = self.steps, self.steps + len(came), self.data + data
        self.outcomes.took(self.plan.at(last), came, self.epoch, first, list(zip(given, indices, strict=True)))
        return data

    def make(self, objective: pyro.infer.ELBO) -> Made | None:
        """What takes the steps of an objective's graph, or None where nothing can."""
        gradients, images, step = self.gradients, self.feed.images, self.step
        if gradients is None or images is None or gradients.static(objective) is None:
            return None
        graph = gradients.graphs[objective.num_particles]
        if self.recorded is not None:
            replays = self.recorded.in_a_row(objective, [gradients.kl_weight] if gradients.anneals else [])
            return None if replays is None else (graph, replays)
        if self.feed.device.type != "cpu" or step.clip_norm is not None or not fit_for_rows(images):
            return None
        run, adam = graph.run.func, known_adam(step, graph)
        if adam is None or not isinstance(run, Runnable):
            return None
        batch = [torch.empty_like(t) for t in tensors(gradients.example)]
        if [(t.dtype, t.shape[1:]) for t in batch] != [(c.dtype, c.shape[1:]) for c in images.columns]:
            return None
        noise, found = plain_draws(run.graph.noise), run.library([*graph.run.args, *batch])
        if noise is None or found is None or not as_expected(found[1], adam):
            return None
        inputs = [*graph.run.args, *batch, *run.graph.constants]
        kl_weight = gradients.kl_weight if gradients.anneals else None
        if kl_weight is not None and kl_weight.dtype is not torch.float32:
            return None
        binarised = images.binarization == "dynamic"
        return graph, steps.Steps(
            found[0], inputs, noise, images.columns, batch, adam, binarised=binarised, kl_weight=kl_weight
        )


def fit_for_rows(images: Images) -> bool:
    """Whether data lie row after row, and bits are drawn of them in single precision only."""
    drawn = images.binarization == "dynamic"
    return all(c.is_contiguous() for c in images.columns) and not (drawn and images.x.dtype is not torch.float32)


def as_expected(results: list[Tensor], adam: steps.Adam) -> bool:
    """Whether a graph gives what is read there: its loss in single precision, and gradients that lie as parameters do.

    Those of convolutions lie channels last.
    """
    loss, left_out, *gradients = results
    lie = all(g.stride() == p.stride() for g, p in zip(gradients, adam.parameters, strict=True))
    return lie and left_out.dtype is torch.int64 and all(t.dtype is torch.float32 for t in (loss, *gradients))


def known_adam(step: Step, graph: CompiledGraph) -> steps.Adam | None:
    """A step's optimizer, where it is Adam as the C++ knows it, over contiguous parameters of single precision."""
    optimizer, (group, *others) = step.optimizers[0], step.optimizers[0].param_groups
    states: list[dict[str, Any]] = [optimizer.state.get(p, {}) for p in graph.reached]
    gradients = [torch.empty_like(p) for p in graph.reached]
    held = {id(p) for p in group["params"]}
    plain = type(optimizer) is Adam and step.updates[0].plain and not others and all(states)
    if not plain or any(group[name] != value for name, value in OPTIONS.items()) or isinstance(group["lr"], Tensor):
        return None
    put(graph.reached, gradients, graph.others)
    if not is_plain(group, graph.reached, states) or any(id(p) not in held for p in graph.reached):
        return None
    flat = [
        t for p, s in zip(graph.reached, states, strict=True) for t in (p, s["exp_avg"], s["exp_avg_sq"], s["step"])
    ]
    if any(t.dtype is not torch.float32 or not t.is_contiguous() for t in flat):
        return None
    return steps.Adam(graph.reached, states, gradients, group["betas"], group["eps"])
