"""Steps that are taken many at once: by C++, where it knows all that they do, or as replays of one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.infer
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

from pyrovae.compile import steps
from pyrovae.compile.checked import tensors
from pyrovae.compile.graph import Runnable
from pyrovae.compile.noise import plain_draws
from pyrovae.compile.recording import Replays
from pyrovae.data.feed import Feed
from pyrovae.data.images import Images
from pyrovae.engine.programs import Batch
from pyrovae.engine.updates import MOMENTS
from pyrovae.train.compiled import Compiled, CompiledGraph, put
from pyrovae.train.outcomes import Outcomes
from pyrovae.train.plan import Plan
from pyrovae.train.step import Recorded, Step

#: A graph, and what takes its steps.
Made = tuple[CompiledGraph, steps.Steps | Replays]


class Ahead:
    """Takes steps of an epoch: those of a compiled graph on data in memory, on a CPU by Adam, AdamW or SGD.

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
        if self.gradients is None or self.epoch == self.steps == 0:  # the first step makes what an optimizer keeps
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
        factors, weights = [], []
        number = self.plan.at(self.now()).num_particles
        for i in range(most):
            objective = self.plan.at(now := self.now(i))
            if objective.num_particles != number:
                break
            factors.append(self.plan.factor(now))
            weights.append(float(getattr(objective, "kl_weight", 1.0)))
        rates = [[base * factor for factor in factors] for base in self.step.base_lr[0]]
        if not (came := run(order, rates, weights)):
            return 0  # the step failed, and fails again in Python, which says why
        last = self.now(len(came) - 1)
        self.step.set_lr(self.plan.factor(last))
        data = len(came) * self.feed.batch_size
        indices = order[:data].split(self.feed.batch_size)
        given: list[Batch] = [(index,) for index in indices]
        if isinstance(run, steps.Steps):
            put(graph.reached, run.moves.gradients, graph.others)
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
        if self.feed.device.type != "cpu" or not fit_for_rows(images):
            return None
        run, moves = graph.run.func, known_moves(step, graph)
        if moves is None or not isinstance(run, Runnable):
            return None
        batch = [t.clone() for t in tensors(gradients.example)]  # of values that a program takes
        if [(t.dtype, t.shape[1:]) for t in batch] != [(c.dtype, c.shape[1:]) for c in images.columns]:
            return None
        noise, found = plain_draws(run.graph.noise), run.library([*graph.run.args, *batch])
        if noise is None or found is None or not as_expected(found.results, moves):
            return None
        inputs = [*graph.run.args, *batch, *run.graph.constants]
        changed = [inputs[i] for i in found.changed]
        kl_weight = gradients.kl_weight if gradients.anneals else None
        weight_is_known = kl_weight is None or kl_weight.dtype is torch.float32
        if not (weight_is_known and all(t.is_contiguous() for t in changed)):
            return None
        binarised = images.binarization == "dynamic"
        return graph, steps.Steps(
            found.library, inputs, noise, images.columns, batch, moves, binarised=binarised, kl_weight=kl_weight,
            changed=changed,
        )  # fmt: skip


def fit_for_rows(images: Images) -> bool:
    """Whether data lie row after row, and bits are drawn of them in single precision only."""
    drawn = images.binarization == "dynamic"
    return all(c.is_contiguous() for c in images.columns) and not (drawn and images.x.dtype is not torch.float32)


def as_expected(results: list[Tensor], moves: steps.Moves) -> bool:
    """Whether a graph gives what is read there: a loss in single precision, and gradients that lie as parameters do."""
    loss, left_out, *gradients = results
    lie = all(g.stride() == p.stride() for g, p in zip(gradients, moves.parameters, strict=True))
    return lie and left_out.dtype is torch.int64 and all(t.dtype is torch.float32 for t in (loss, *gradients))


def known_moves(step: Step, graph: CompiledGraph) -> steps.Moves | None:
    """What a step's optimizer does, where it is one that the C++ knows, over contiguous parameters of single precision.

    How it would do so itself (``fused``, ``foreach``) makes a difference to rounding only.
    """
    optimizer, reached = step.optimizers[0], graph.reached
    groups: list[dict[str, Any]] = optimizer.param_groups
    group_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
    alone = type(optimizer) in (Adam, AdamW, SGD) and step.updates[0].alone
    if not alone or any(id(p) not in group_of for p in reached):
        return None
    of = [group_of[id(p)] for p in reached]
    kept = [own for p, i in zip(reached, of, strict=True) if (own := kept_of(groups[i], optimizer.state.get(p, {})))]
    if len(kept) < len(reached) or any(group.get("capturable") or group["differentiable"] for group in groups):
        return None
    held = [*reached, *(t for own in kept for t in own if t is not None)]
    if any(t.dtype is not torch.float32 or not t.is_cpu or not t.is_contiguous() for t in held):
        return None
    return steps.Moves(reached, kept, [torch.empty_like(p) for p in reached], of, groups, step.clip_norm)


def kept_of(group: dict[str, Any], state: dict[str, Any]) -> list[Tensor | None] | None:
    """What an optimizer keeps of a parameter: a count of steps, or None, and the rest; None before its first step."""
    adam = "betas" in group
    names = ["step", *MOMENTS[: 2 + group["amsgrad"]]] if adam else ["momentum_buffer"] * bool(group["momentum"])
    own = [state.get(name) for name in names]
    if not all(isinstance(t, Tensor) for t in own):
        return None
    return own if adam else [None, *own]
