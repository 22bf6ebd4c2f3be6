"""What cannot be trained as it is, in plain words and before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from pyrovae.compile.checked import tensors
from pyrovae.data.feed import Feed
from pyrovae.engine.probe import Look, look, warn_of_strays
from pyrovae.engine.programs import Batch, Program, cut, held_by, protected_buffers, rows, warn
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.sites import counted
from pyrovae.memory import bytes_at_peak, free_memory, require_memory
from pyrovae.train.plan import Plan
from pyrovae.train.step import Eager

LARGE = 4000  # bytes of a step for each byte of its data and particle; dense networks take some ten


@contextmanager
def lone_datum_advice(of: str = "") -> Iterator[None]:
    """Say in plain words that BatchNorm cannot be trained on one datum, whose variance would be 0."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel when training"):
            raise
        raise ValueError(
            f"a batch has one datum{of}, on which BatchNorm cannot be trained: pass another batch_size, a DataLoader "
            "with drop_last=True, or networks without BatchNorm"
        ) from error


def check_last_batch(model: Program, guide: Program, seen: Look, feed: Feed) -> None:
    """Try the last batch of an epoch, if that is one datum, and something normalises batches."""
    children = (child for module in seen.modules for child in module.modules())
    if feed.last == 1 and any(isinstance(child, _BatchNorm) and child.training for child in children):
        with lone_datum_advice(f" (the last of {feed.size})"):
            look(model, guide, cut(feed.first(), slice(1)), validate=False)


def warn_of_data(seen: Look, feed: Feed) -> None:
    """Say where data do not count, or where each batch counts as all of them."""
    if not any(site["is_observed"] for site in counted(seen.model)):
        warn(
            "the model observes nothing, so that the data do not count: pass obs= to one of its pyro.sample, or the "
            "model before the guide"
        )
    stacks = [site["cond_indep_stack"] for site in (*counted(seen.guide), *counted(seen.model))]
    names = [{frame.name for frame in stack} for stack in stacks]  # of sequential plates too
    subsampled = any(f.full_size and f.full_size > f.size for stack in stacks for f in stack)
    apart = seen.joint and any(names) and not set.intersection(*names)
    warn_of_strays(seen)
    if feed.steps != 1 and apart and not (seen.strays or subsampled):
        warn(
            "latents outside the data plate are shared by all data, but each batch will count as all of them: pass "
            'batch_size=len(data), or give the plate its full size, pyro.plate("data", N, subsample_size=...)'
        )


def derivable() -> AbstractContextManager[object]:
    """Derivatives are taken inside, also below ``torch.no_grad()`` and ``torch.inference_mode()``."""
    return torch.inference_mode(False)


def check_derivable(*programs: Program) -> None:
    """Refuse programs whose weights no step may change."""
    if any(not is_lazy(tensor) and tensor.is_inference() for tensor in held_by(*programs)):
        raise ValueError(
            "the pair was made under torch.inference_mode(), whose tensors are never trained: build or load the pair "
            "outside it"
        )


def check_memory(eager: Eager, plan: Plan, batch: Batch) -> None:
    """Refuse steps that the machine's memory does not hold, before the first one.

    Steps on less than what :data:`LARGE` times as much memory would hold are let pass without a look.
    """
    objective, number = plan.at(0), rows(batch)
    most, now = max(plan.particles or (1,)), plan.particles[0] if plan.particles else 1
    particles = getattr(objective, "total_particles", 1) * most // now
    given = sum(a.nbytes for a in tensors(batch))
    if not eager.parameters[0].is_cpu or given * particles * LARGE < free_memory():
        return

    def step(n: int) -> object:
        losses = eager.loss(objective, cut(batch, slice(n))).losses
        return torch.autograd.grad(losses, eager.parameters, allow_unused=True)

    needed = 2.0 * sum(p.nbytes for p in eager.parameters)  # Adam's moments
    with suppress(Exception), isolated_rng(), protected_buffers(eager.model, eager.guide):  # the first step says why
        needed += bytes_at_peak(step, number * most // now)
    what = f"the values of a training step of {number:,} data with {particles:,} particles"
    require_memory(needed, what, "lower batch_size or the number of particles")
