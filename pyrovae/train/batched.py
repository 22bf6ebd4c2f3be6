r"""The gradients of R pairs of the same programs in one batched function.

A small network leaves most of a device idle. Here the flat graph of one pair's loss and gradients is batched over R
sets of parameters, buffers and noise, so that a step of R models costs little more than a step of one.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import pyro.infer
import torch
from torch import Tensor

from pyrovae.compile.checked import Captured, Checked, compare, signature, tensors, untouched
from pyrovae.compile.noise import stacked_noise
from pyrovae.engine.programs import Batch
from pyrovae.engine.randomness import isolated_rng
from pyrovae.objectives.base import Objective
from pyrovae.train.compiled import CHECK_SEED, Compiled, put, traceable


class Batched:
    """The gradients of several pairs at once: one pair's flat graph, batched over parameters, buffers and noise.

    The pairs live on in the rows of one stack for each tensor; :meth:`separate` gives them tensors of their own again.

    :param factors: for each pair a factor of the objective's kl_weight.
    :raises ValueError: where the pairs differ in shape, or share a parameter or buffer.
    """

    kind = "replicas"

    def __init__(self, each: Sequence[Compiled], factors: Sequence[float]) -> None:
        self.each, self.factors, self.example = list(each), factors, each[0].example
        self.states = [own.eager.state for own in each]
        self.compile_seconds = 0.0
        self.functions: dict[int, Callable[[Batch], Tensor]] = {}
        self.objectives: list[Objective] = []
        self.tensors = [own.inputs for own in each]
        shapes = [[(t.shape, t.dtype) for t in own] for own in self.tensors]
        if any(own != shapes[0] for own in shapes):
            raise ValueError("replicas must be one program, but their parameters differ in shape: build them alike")
        if len({id(t) for own in self.tensors for t in own}) < sum(map(len, self.tensors)):
            raise ValueError("replicas share a parameter or buffer: give each pair networks of its own")
        self.stacks = [torch.stack([t.detach() for t in same]) for same in zip(*self.tensors, strict=True)]
        for stack, same in zip(self.stacks, zip(*self.tensors, strict=True), strict=True):
            for row, tensor in zip(stack, same, strict=True):
                tensor.data = row

    def separate(self) -> None:
        """Give every pair tensors of its own again."""
        for own in self.tensors:
            for tensor in own:
                tensor.data = tensor.data.clone()

    def __call__(self, objective: pyro.infer.ELBO, batch: Batch) -> Tensor:
        if signature(batch) == self.each[0].signature:
            return self.static(objective)(batch)
        own = zip(self.each, self.weighted(objective), strict=True)  # the last batch, of another size
        return torch.stack([torch.as_tensor(one.eager(weighted, batch)) for one, weighted in own])

    def static(self, objective: pyro.infer.ELBO) -> Callable[[Batch], Tensor]:
        """What computes the gradients of an objective, compiled once for a number of particles.

        :raises CannotCompile: with the reason.
        """
        number = objective.num_particles
        if number not in self.functions:
            began = time.perf_counter()
            self.functions[number] = self.compile(objective)
            self.compile_seconds += time.perf_counter() - began
        for one, factor in zip(self.each, self.factors, strict=True):
            one.anneal(objective, factor)
        return self.functions[number]

    def weighted(self, objective: pyro.infer.ELBO) -> list[Objective]:
        """Every pair's own objective; one object each, so that it looks at its pair only once."""
        ours = traceable(objective)
        self.objectives = self.objectives or [copy.copy(ours) for _ in self.each]
        for own, factor in zip(self.objectives, self.factors, strict=True):
            own.num_particles, own.kl_weight = ours.num_particles, ours.kl_weight * factor
        return self.objectives

    def compile(self, objective: pyro.infer.ELBO) -> Callable[[Batch], Tensor]:
        """One function for all pairs, after a check of each."""
        own = [one.differentiated(w) for one, w in zip(self.each, self.weighted(objective), strict=True)]
        captured = [function.capture(self.example) for function, _ in own]
        single = captured[0].graph
        for r, (graph, *_) in enumerate(captured):
            same = all(map(torch.equal, graph.constants, single.constants))
            if graph.key != single.key or not same:
                raise ValueError(f"replica {r} is not the same program as replica 0: build them alike, but for weights")
        stacked = [True] * len(self.stacks) + [False] * len(tensors(self.example))
        compiled = single.batched(len(self.each), stacked).compiled()
        self.check([function for function, _ in own], captured, compiled)

        def gradients(batch: Batch) -> Tensor:
            losses, *found = compiled(*self.stacks, *tensors(batch))
            for r, (one, (_, parameters)) in enumerate(zip(self.each, own, strict=True)):
                put(one.eager.parameters, {p: g[r] for p, g in zip(parameters, found, strict=True)})
            return losses

        return gradients

    def check(
        self, functions: Sequence[Checked], captured: Sequence[Captured], compiled: Callable[..., list[Tensor]]
    ) -> None:
        """Compare every pair's results with its own eager ones, on the same noise."""

        def same_noise() -> tuple[Tensor, ...]:
            torch.manual_seed(CHECK_SEED)
            return captured[0].graph.noise()

        with isolated_rng(), ExitStack() as undo:
            for state in self.states:
                undo.enter_context(untouched(state))
            noise = stacked_noise([same_noise] * len(captured))
            got = compiled(*self.stacks, *tensors(self.example), noise=noise)
            for r, (function, (_, expected, changed)) in enumerate(zip(functions, captured, strict=True)):
                compare(expected, [g[r] for g in got], function.precision)
                compare(changed, function.changes, function.precision)
