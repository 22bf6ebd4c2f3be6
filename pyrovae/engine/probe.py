"""One look at a pair: what it draws, what it reaches, and whether guide and model go together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.util import check_site_shape
from torch import Tensor, nn

from pyrovae.engine.particles import Particles
from pyrovae.engine.programs import Batch, Program, graph_leaves, protected_buffers, reached_modules
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.sites import Sites, counts, latent, log_prob, oversampling, quoted, record_pair

_ANY: Any = math.inf


def probe(model: Program, guide: Program, args: tuple, kwargs: dict) -> Particles:
    """Run the pair once with one particle, checked by Pyro and by us, leaving no trace in generators and buffers."""
    with torch.no_grad(), isolated_rng(), protected_buffers():
        particles = Particles(*record_pair(model, guide, args, kwargs), 1, None, False, True, {}, dict)
        _check_match(particles)
        _check_shapes(particles)
    return particles


def nesting(particles: Particles) -> int:
    """The number of dimensions that the programs' own plates take."""
    sites = (s for run in (particles.guide, particles.model) for s in run.values())
    return max((-f.dim for s in sites for f in s["cond_indep_stack"] if f.dim is not None), default=0)


def _check_match(particles: Particles) -> None:
    """Every latent site of the model must be drawn by the guide, and the other way round."""
    drawn, wanted = latent(particles.guide), latent(particles.model)
    if not any(counts(s) for s in particles.model.values()):
        raise ValueError("the model has no sample site: it must observe something; add pyro.sample(..., obs=x)")
    for name in wanted:
        if name not in drawn:
            raise ValueError(
                f'model site "{name}" is neither observed nor drawn by the guide, which draws {quoted(drawn)}: '
                "sample it in the guide, or pass obs="
            )
    for name, site in drawn.items():
        if name not in wanted and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f'guide site "{name}" is not a latent site of the model, which has {quoted(wanted)}: '
                'rename it, or mark it infer={"is_auxiliary": True}'
            )


def _check_shapes(particles: Particles) -> None:
    for role, sites in (("guide", particles.guide), ("model", particles.model)):
        for name, site in sites.items():
            if not counts(site):
                continue
            try:
                scored: Any = {**site, "log_prob": log_prob(site, in_guide=role == "guide")}
                check_site_shape(scored, max_plate_nesting=_ANY)
            except ValueError as error:
                raise ValueError(f'{role} site "{name}": ' + " ".join(str(error).split())) from error


def check_fold(particles: Particles, fold: bool) -> None:
    """Refuse to fold the particles of a pair that has joint weights, or a plate with a subsample of its own."""
    if not fold:
        return
    if particles.common_dims != [-1]:
        raise ValueError(
            "fold_particles=True needs one data plate at dim -1 around every site, "
            f"found plates {quoted(name for name, _, _ in particles.plates)} shared by all: pass fold_particles=False"
        )
    stack = [f for site in particles.counted for f in site["cond_indep_stack"]]
    subsampled = sorted({f.name for f in stack if oversampling(f) != 1.0})
    if subsampled:
        raise ValueError(
            f"fold_particles=True cannot repeat a subsampled plate, found {quoted(subsampled)}: "
            "drop the subsample, or pass fold_particles=False"
        )


@dataclass
class Reach:
    """What a pair of programs reaches: its modules, its parameters, and tensors that belong to no module, by name."""

    modules: list[nn.Module]
    parameters: dict[str, Tensor]
    loose: dict[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold, as it is now: a module may have put other tensors in its buffers' place."""
        return _module_state(self.modules) | self.loose

    def to(self, device: torch.device) -> None:
        """Move everything, in place."""
        for module in self.modules:
            module.to(device)
        for tensor in self.loose.values():
            tensor.data = tensor.data.to(device)


def reach(model: Program, guide: Program, log_prob: Callable[[], Tensor]) -> Reach:
    """Find the parameters of a pair, wherever they live, while ``log_prob`` runs it once.

    In this order, each tensor once: those of the modules that the programs are, belong to or call; those of Pyro's
    parameter store; leaves that the programs close over.
    """
    with protected_buffers(), reached_modules(model, guide) as found, poutine.trace(param_only=True) as store:
        leaves = graph_leaves(log_prob())
    below = {child for module in found for child in module.modules() if child is not module}
    modules = [module for module in found if module not in below]
    tensors = _module_state(modules)
    known = {id(tensor) for tensor in tensors.values()}
    loose = {}
    stored = {f"param.{name}": site["value"].unconstrained() for name, site in store.trace.nodes.items()}  # type: ignore[union-attr]
    for name, tensor in (stored | {f"leaf.{i}": leaf for i, leaf in enumerate(leaves)}).items():
        if id(tensor) not in known:
            known.add(id(tensor))
            loose[name] = tensor
    tensors |= loose
    unique = {id(tensor): name for name, tensor in reversed(tensors.items()) if tensor.requires_grad}
    parameters = {name: tensors[name] for name in reversed(unique.values())}
    return Reach(modules, parameters, loose)


def _module_state(modules: list[nn.Module]) -> dict[str, Tensor]:
    prefixes = [""] if len(modules) == 1 else [f"{i}." for i in range(len(modules))]
    return {
        prefix + name: tensor
        for prefix, module in zip(prefixes, modules, strict=True)
        for name, tensor in module.state_dict(keep_vars=True).items()
    }


def find_parameters(
    model: Program, guide: Program, batch: Batch, check: Callable[[Sites], None] = lambda joint: None
) -> Reach:
    """What a pair reaches when it runs on ``batch``; ``check`` sees the model's sites."""

    def log_joint() -> Tensor:
        drawn, joint = record_pair(model, guide, batch, {})
        check(joint)
        terms = [log_prob(s, in_guide=run is drawn) for run in (drawn, joint) for s in run.values() if counts(s)]
        return torch.stack([term.sum() for term in terms]).sum() if terms else torch.zeros(())

    with isolated_rng(), pyro.validation_enabled(False), torch.enable_grad():
        pair = reach(model, guide, log_joint)
    if not pair.parameters:
        raise ValueError("the pair has no parameters to train: use modules, pyro.param or tensors that require grad")
    return pair


def full_size(model: Program, guide: Program, batch: Batch) -> int | None:
    """The full size of the rightmost plate around the observed sites if it is subsampled, else None."""
    with torch.no_grad(), isolated_rng(), protected_buffers(), pyro.validation_enabled(False):
        _, joint = record_pair(model, guide, batch, {})
    observed = [s for s in joint.values() if counts(s) and s["is_observed"]]
    plates = {f.name: f for s in observed for f in s["cond_indep_stack"] if f.dim in (-1, None)}
    return next((f.full_size for f in plates.values() if f.full_size and f.full_size > f.size), None)
