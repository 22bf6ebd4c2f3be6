"""A pair and what is known of it, so that it runs with particles however its plates come to lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyrovae.arguments import positive_int
from pyrovae.engine.auxiliary import auxiliary_of
from pyrovae.engine.fold import Fold, check_fold
from pyrovae.engine.particles import Particles, measure
from pyrovae.engine.probe import Look, check_pair, checked_look, unlike, warn_of_strays
from pyrovae.engine.programs import Batch, Program, protected_buffers, roots, warn
from pyrovae.engine.randomness import isolated_rng, restore_rng, rng_snapshot
from pyrovae.engine.run import Copies, run
from pyrovae.engine.separate import Deeper
from pyrovae.engine.sites import Sites, record
from pyrovae.errors import is_out_of_memory

Check = Callable[[Look], None]


class Runner:
    """Runs a pair, and looks at it and checks it whenever a run has another structure than those before.

    :param fold: whether particles are folded into the batch.
    :param vectorize: whether they run together; where that fails, they run one after the other, after a warning.
    """

    def __init__(self, model: Program, guide: Program, *, fold: Fold = False, vectorize: bool = True) -> None:
        self.model, self.guide, self.fold, self.separate = model, guide, fold, not vectorize
        if fold is not False and self.separate:
            raise ValueError("fold_particles folds particles that run together: drop it, or vectorize_particles=False")
        self.proven = False  # that particles can run together
        self.known: dict[object, set[tuple[object, ...]]] = {}
        self.nesting, self.noise, self.sums, self.marked = 0, frozenset[str](), False, False
        self.sizes: set[int] = set()  # of plates, and of what is summed out
        self.dreams: dict[str, bool] = {}  # the observed sites, and whether dreams of the data must draw them
        self.dreams_whole: bool | None = None  # whether one site dreams all of an argument; None before the first

    @property
    def structures(self) -> set[tuple[object, ...]]:
        """Those that were checked as things are: programs may differ between train and eval mode."""
        modes = tuple(module.training for module in roots(self.model, self.guide))
        return self.known.setdefault((modes, torch.is_grad_enabled()), set())

    def look(self, args: Batch, kwargs: Mapping[str, object], check: Check | None = None) -> Look:
        """A look at the pair, checked, that later runs rely on."""
        seen = checked_look(self.model, self.guide, args, kwargs)
        if not any(seen.unscaled.structure in structures for structures in self.known.values()):
            warn_of_strays(seen)
        self.meet(seen, check)
        return seen

    def meet(self, seen: Look, check: Check | None = None) -> None:
        """Rely on a look that was taken already."""
        check_fold(seen, self.fold)
        if check is not None:
            check(seen)
        self.structures.add(seen.unscaled.structure)
        self.nesting, self.noise = max(self.nesting, seen.nesting), self.noise | seen.noise
        self.sums, self.marked = self.sums or seen.sums, self.marked or bool(seen.marked)
        self.sizes |= seen.sizes

    def __call__(
        self,
        args: Batch,
        kwargs: Mapping[str, object],
        num_particles: int = 1,
        *,
        check: Check | None = None,
        copies: Copies = None,
        rerun: bool = False,
        scaled: bool = True,
    ) -> Particles:
        """A run with particles; see :func:`pyrovae.engine.run.run`. ``check`` may refuse what was looked at."""
        known = self.structures
        if not known:
            self.look(args, kwargs, check)
        if 1 < num_particles in self.sizes and not (self.proven or self.separate or self.fold is not False):
            other = unlike(num_particles, self.sizes)
            with isolated_rng(), protected_buffers(self.model, self.guide):
                self(args, kwargs, other, check=check, scaled=scaled)
        start = None if self.proven or num_particles == 1 else rng_snapshot()
        while True:
            assumed = self.nesting, self.noise, self.sums
            try:
                found = run(
                    self.model, self.guide, args, kwargs, num_particles=num_particles, nesting=self.nesting,
                    fold=self.fold, copies=copies, rerun=rerun, scaled=scaled, noise=self.noise, separate=self.separate,
                    sums=self.sums,
                )  # fmt: skip
                if num_particles > 1 and not (self.proven or found.runs):
                    found.check_dims()
            except Deeper as deeper:
                self.nesting = deeper.nesting
                continue
            except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
                if num_particles == 1 or is_out_of_memory(error) or "transformed by a functorch" in str(error):
                    raise
                if not (self.changed(args, kwargs, check) or self.gives_way(error)):
                    raise
                if start is not None:
                    restore_rng(start)  # the next attempt has the draws that any later run has
                continue
            self.proven = self.proven or num_particles > 1
            if found.runs:
                for sites in found.runs:
                    self.meet_run(args, kwargs, sites, check)
            elif found.structure not in known:
                self.look(args, kwargs, check)
                known.add(found.structure)
            if assumed == (self.nesting, self.noise, self.sums):
                return found

    def changed(self, args: Batch, kwargs: Mapping[str, object], check: Check | None) -> bool:
        """Whether another look shows another structure than those that are known."""
        known = self.structures
        number = len(known)  # a plate may have come to lie where the particles are
        self.look(args, kwargs, check)
        return len(known) > number

    def gives_way(self, error: Exception) -> bool:
        """Let particles run one after the other from now on, where they have never run together."""
        if self.separate or self.proven or self.fold is not False:
            return False
        self.separate = True
        warn(
            "particles run one after the other, because together they fail "
            f"({type(error).__name__}: {' '.join(str(error).split())}): vectorize_particles=False asks for it without "
            "this warning; where only networks are at fault, which see leading dimensions [K, B, ...], "
            "fold_particles=True is faster"
        )
        return True

    def meet_run(
        self, args: Batch, kwargs: Mapping[str, object], sites: tuple[Sites, ...], check: Check | None
    ) -> None:
        """Check one of several runs that may differ, as control flow makes them."""
        guide, model = sites
        if Particles.of(guide, model, noise=self.noise).structure not in self.structures:
            auxiliary = auxiliary_of(self.guide, args, kwargs, guide, model)
            again = partial(record, self.model, args, kwargs)
            seen = Look(guide, model, roots(self.model, self.guide), [], {}, auxiliary, again)
            check_pair(seen)
            self.meet(seen, check)


def log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 1,
    fold_particles: Fold = False,
    vectorize_particles: bool = True,
    **kwargs: Any,
) -> Tensor:
    r"""The importance log-weights :math:`\log p(x_b, z_{kb}) - \log q(z_{kb} \mid x_b)`, ``[K, B]`` in nats.

    Scales (subsampling, ``poutine.scale``) are ignored, masked sites count as zero, and the train/eval mode is left as
    it is. A pair whose latents lie outside the data plate has joint weights, ``[K]``. The result carries gradients
    unless called under ``torch.no_grad()``.

    :param num_particles: K, the number of draws from the guide.
    :param fold_particles: fold the particles into the batch, for networks that take one batch dimension only; True, or
        the positions and names of the arguments that have a row for each datum.
    :param vectorize_particles: False for particles that run one after the other, as they do (after a warning) where
        together they fail: Python's control flow on a latent, networks with random weights.
    :raises ValueError: if the guide does not match the model, naming the site.

    >>> import pyro, torch, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
    >>> log_w = log_weights(model, guide, torch.zeros(3), num_particles=4)
    >>> log_w.shape, bool(log_w.std() < 1e-6)  # the guide is the posterior: every weight is log p(x)
    (torch.Size([4, 3]), True)
    """
    runner = Runner(model, guide, fold=fold_particles, vectorize=vectorize_particles)
    return measure(runner(args, kwargs, positive_int("num_particles", num_particles), scaled=False))
