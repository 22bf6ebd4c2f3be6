"""Pyro's interface of an objective, for whatever is a function of one run with particles."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro.infer
import torch
from pyro.infer.elbo import ELBOModule
from pyro.infer.enum import get_importance_trace
from torch import Tensor, nn

from pyrovae.engine.fold import Fold
from pyrovae.engine.gradient import Needs
from pyrovae.engine.particles import Particles
from pyrovae.engine.probe import Look
from pyrovae.engine.programs import Program, roots
from pyrovae.engine.runner import Runner

UNDER_FUNC = {
    "transformed by a functorch": "finds derivatives inside of its loss, which torch.func cannot transform: call "
    "backward() on the loss, or take an objective whose model and guide follow one bound of the library's",
    "different inplace randomness": "draws by torch.distributions, in place, which vmap cannot do differently for each "
    'set of parameters: pass randomness="same", or train models side by side with pyrovae.fit_replicas',
}


@contextmanager
def refusals_of_func(objective: object) -> Iterator[None]:
    """Say in plain words what torch.func cannot transform."""
    try:
        yield
    except RuntimeError as error:
        for symptom, words in UNDER_FUNC.items():
            if symptom in str(error):
                raise ValueError(f"{objective!r} {words}") from error
        raise


class RunObjective(pyro.infer.ELBO):
    """A :class:`pyro.infer.ELBO` whose loss is a function of one run of the pair with ``total_particles`` particles."""

    gradient: str
    fold_particles: Fold
    #: Whether it takes the exact expectation of guide sites that are marked for enumeration.
    expects_marked: bool = False
    _known: tuple[tuple[object, ...], Runner] | None = None

    @property
    @abstractmethod
    def total_particles(self) -> int:
        """Particles of a run."""

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What a run must offer beyond log-weights."""

    @abstractmethod
    def particle_loss(self, particles: Particles) -> Tensor:
        """The loss of one run of the pair."""

    @abstractmethod
    def check(self, seen: Look) -> None:
        """Refuse a pair that this objective cannot train or measure."""

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the bound summed over data, 0-d, in nats; its ``backward()`` gives this objective's estimator."""
        needs = self.needs if torch.is_grad_enabled() else Needs()
        runner = self.runner(model, guide)
        with refusals_of_func(self):
            particles = runner(
                args, kwargs, self.total_particles, check=self.check, copies=needs.copies, rerun=needs.fixed
            )
            loss = self.particle_loss(particles)
        for copied in particles.copies.values():
            if copied.is_leaf and copied.requires_grad:
                copied.requires_grad_(False)  # its gradient is taken: it is no parameter for whoever looks for those
        return loss

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the bound summed over data, in nats."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss, its gradients added to the parameters' ``.grad``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def __call__(self, model: Program, guide: Program) -> ELBOModule:  # type: ignore[override]
        """A module that holds the pair (and the modules whose methods they are) and computes the loss."""
        return PairLoss(model, guide, self)

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        return get_importance_trace("flat", math.inf, model, guide, args, kwargs)

    # --- what is known of a pair ---------------------------------------------------------------------------------

    def runner(self, model: Program, guide: Program) -> Runner:
        """What runs a pair; it is checked at its first call, and where it shows another structure later."""
        pair = model, guide, self.gradient, self.fold_particles, self.vectorize_particles
        if self._known is None or self._known[0] != pair:
            self._known = pair, Runner(model, guide, fold=self.fold_particles, vectorize=self.vectorize_particles)
        return self._known[1]

    def meet(self, model: Program, guide: Program, seen: Look) -> None:
        """Check a pair by a look at it, so that it need not be looked at again."""
        self.runner(model, guide).meet(seen, self.check)


class PairLoss(ELBOModule):
    """The loss of a pair as a module; it holds the modules whose methods the programs are."""

    def __init__(self, model: Program, guide: Program, objective: RunObjective) -> None:
        super().__init__(model, guide, objective)  # type: ignore[arg-type]
        self.owners = nn.ModuleList(m for m in roots(model, guide) if m is not model and m is not guide)
