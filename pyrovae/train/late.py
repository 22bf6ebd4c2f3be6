"""Parameters that only some batches reach: noticed when one does, given to the optimizer, kept by checkpoints."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyrovae import runs
from pyrovae.data.arrays import is_storable
from pyrovae.data.feed import as_batch
from pyrovae.engine.probe import Look, PairState, look
from pyrovae.engine.programs import Batch, Program, warn_of_eval
from pyrovae.engine.randomness import isolated_rng
from pyrovae.errors import DataError
from pyrovae.train.moments import load_moments
from pyrovae.train.plan import MakeOptimizer

TRIES = 5  # runs in which a branch that is taken by chance is looked for again


class Reach:
    """What one pair has reached so far; a step that reaches more says so.

    :ivar parameters: what is trained, in the order in which it was met.
    :ivar new: those among them that no optimizer has yet.
    :ivar examples: the batches that reached something new, each with the seed of a run that found it again.
    :ivar weights: tensors of a checkpoint that nothing has reached since, by name.
    :ivar moments: what the checkpoint's optimizer knew of them.
    """

    def __init__(self, model: Program, guide: Program, state: PairState) -> None:
        self.model, self.guide, self.state = model, guide, state
        self.parameters, self.first = list(state.parameters.values()), set(state.tensors)
        self.known = set(map(id, self.parameters))
        self.passing: list[weakref.ref[Tensor]] = []  # what else the last step reached: perhaps made by the run itself
        self.new: list[Tensor] = []
        self.examples: list[tuple[int, Batch]] = []
        self.weights: dict[str, Tensor] = {}
        self.moments: dict[str, Any] = {}

    def meet(self, batch: Batch, leaves: Sequence[Tensor]) -> bool:
        """Take in the leaves, unknown so far, that a step on a batch reached; whether any got a saved value."""
        waiting = len(self.weights)
        if not leaves:
            return False
        lasting = [leaf for leaf in leaves if any(ref() is leaf for ref in self.passing)]
        if len(leaves) > len(self.passing):
            number = len(self.state.modules)
            for seed in range(TRIES):
                self.explore(seed, batch, leaves)
                if all(id(leaf) in self.known for leaf in leaves):
                    break
            warn_of_eval(self.state.modules[number:], self.model, self.guide)
        for leaf in lasting:
            if id(leaf) not in self.known:
                self.state.loose[f"leaf.later.{len(self.state.loose)}"] = leaf
        self.register()
        self.passing = [weakref.ref(leaf) for leaf in leaves if id(leaf) not in self.known]
        return len(self.weights) < waiting

    def explore(self, seed: int, batch: Batch, leaves: Iterable[Tensor] | None = None) -> None:
        """Take in what a batch reaches; ``leaves`` of another run, so that nothing is taken that a run makes itself."""
        leaves = self.seen(seed, batch).leaves() if leaves is None else leaves
        self.state.add(self.seen(seed, batch).state, leaves)
        if self.register() and is_storable(batch):
            self.examples.append((seed, as_batch(batch, torch.device("cpu"))))

    def seen(self, seed: int, batch: Batch) -> Look:
        """A look at the pair."""
        with isolated_rng(seed):
            return look(self.model, self.guide, batch, validate=False)

    def register(self) -> bool:
        """Note which parameters of the state are new, and whether any is; they get what was saved of them."""
        found = [p for p in self.state.parameters.values() if id(p) not in self.known]
        self.known.update(map(id, found))
        self.parameters += found
        self.new += found
        if self.weights:
            here = self.state.tensors
            with torch.no_grad():
                for name in self.weights.keys() & here.keys():
                    here[name].copy_(self.weights.pop(name))
        return bool(found)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold."""
        return self.state.tensors | self.weights

    def find(self, examples: Iterable[tuple[int, Batch]], device: torch.device) -> None:
        """Reach again what a run had reached."""
        for seed, batch in examples:
            try:
                self.explore(seed, as_batch(batch, device))
            except DataError as error:
                raise ValueError(f"it holds examples that are no batches: {error}") from error

    def restore(self, weights: dict[str, Tensor], late: Iterable[str], run: runs.Run) -> None:
        """Take up the tensors of a checkpoint; what joined late and is not reached by now waits."""
        here = self.state.tensors
        self.weights = {name: weights.pop(name) for name in late if name not in here}
        runs.restore(here, weights, run)

    def order(self, optimizer: Optimizer) -> list[str]:
        """The names of an optimizer's parameters, in its order; of those that are not the pair's, none."""
        names = {id(tensor): name for name, tensor in self.state.parameters.items()}
        return [names.get(id(p), "") for group in optimizer.param_groups for p in group["params"]]

    def join(self, optimizer: Optimizer, make: MakeOptimizer) -> None:
        """Put the new parameters where the maker puts them among all: in that group, or in one of their own."""
        new = set(map(id, self.new))
        for i, group in enumerate(make(self.parameters).param_groups):
            fresh = [p for p in group["params"] if id(p) in new]
            others = {id(p) for p in group["params"]} - new
            groups = optimizer.param_groups
            if i < len(groups) and others == {id(p) for p in groups[i]["params"]}:
                groups[i]["params"] += fresh
            elif fresh:
                optimizer.add_param_group({**group, "params": fresh})
        self.new.clear()
        if known := [name for name in self.order(optimizer) if name in self.moments]:
            packed, order = optimizer.state_dict(), self.order(optimizer)
            packed["state"] |= {order.index(name): self.moments.pop(name) for name in known}
            load_moments(optimizer, packed)

    def load(self, optimizer: Optimizer, saved: dict[str, Any], order: Sequence[str] | None) -> None:
        """Put a saved state into an optimizer; what is of parameters that it does not have yet waits for them."""
        own = self.order(optimizer)
        if order in (None, own):
            load_moments(optimizer, saved)
            return
        if unknown := set(order or ()) - set(own) - self.weights.keys():
            raise ValueError(f"it knows of parameters that are none: {min(unknown)[:50]}")
        self.moments = {name: saved["state"][i] for i, name in enumerate(order or ()) if i in saved["state"]}
        now = optimizer.state_dict()["param_groups"]
        groups = [{**then, "params": group["params"]} for then, group in zip(saved["param_groups"], now, strict=False)]
        state = {i: self.moments.pop(name) for i, name in enumerate(own) if name in self.moments}
        load_moments(optimizer, {"state": state, "param_groups": groups})

    def saved(self, optimizer: Optimizer) -> dict[str, Any]:
        """What a checkpoint holds besides tensors: what the optimizer knows, and how to reach all again."""
        packed, order = optimizer.state_dict(), self.order(optimizer)
        packed["state"] |= dict(enumerate(self.moments.values(), len(order)))
        late = [*self.state.tensors.keys() - self.first, *self.weights]
        return {"optimizer": packed, "order": [*order, *self.moments], "late": late, "examples": self.examples}
