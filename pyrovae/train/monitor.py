"""What is seen of a pair: on the first data, checked against its sites; after each epoch, so that collapse shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pyro.infer
import torch
from torch import Tensor

from pyrovae import data as datasets
from pyrovae.data.feed import Feed, as_batch, keep_order, numbered
from pyrovae.engine.convert import first_way
from pyrovae.engine.devices import beside, home_of
from pyrovae.engine.kl import site_kl
from pyrovae.engine.observed import Observed
from pyrovae.engine.particles import Particles, combine
from pyrovae.engine.probe import Look, check_pair, look
from pyrovae.engine.programs import Batch, Program, evaluating, held_by, roots, rows, warn
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.runner import Runner
from pyrovae.engine.sites import frames, latent
from pyrovae.engine.unwrap import point_mass
from pyrovae.engine.whole import Whole
from pyrovae.evaluate.sharing import Sharing
from pyrovae.evaluate.units import DRAWS, mean_draws
from pyrovae.train.step import first_loss

MONITORED = 1000  # data on which units are watched, at most
FEW_DRAWS = 4  # at least, of sites whose mean has no closed form: their noise is subtracted


class Monitor:
    """Reconstruction, KL of every unit and active units of a pair, on a fixed batch of data, in eval mode.

    A pair's own ``metrics(*batch)``, a dict of numbers, where it has such, is logged with them.
    """

    def __init__(self, model: Program, guide: Program, seen: Look, feed: Feed) -> None:
        watched = None if feed.steps == 1 else min(MONITORED, max(100, (feed.size or 0) // 10))
        self.runner, self.modules, self.batch = Runner(model, guide), seen.modules, feed.first(watched)
        self.size, self.joint = feed.size or rows(self.batch), seen.joint
        self.draws = max(FEW_DRAWS, min(feed.steps or DRAWS, DRAWS))  # more of them would outlast a short epoch
        # What was seen of a pair holds for its batch; of another size it is looked at when it is first measured.
        partly = not seen.joint and seen.unscaled.uncommon_subsampled
        self.known, self.usable = not partly and rows(self.batch) == rows(feed.first()), True
        self.whole = Whole()
        with self.measuring():
            self.runner.meet(seen)

    def __call__(self) -> dict[str, object]:
        """What one run shows: :meth:`terms`, ``active_units`` by site, and the pair's own metrics.

        Plates inside a datum are taken whole.
        """
        with self.whole, self.measuring():
            if not self.known:
                self.known = True
                try:
                    self.look()
                except Exception as error:  # a pair that runs at its own batch size only; training may go on
                    self.usable = False
                    warn_unlogged(error)
            return self.watched() if self.usable else {}

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """How the pair is run here."""
        programs = self.runner.model, self.runner.guide
        with torch.no_grad(), isolated_rng(0), evaluating(*programs, *self.modules):
            yield

    def look(self) -> None:
        """Look at the pair on the data that are watched, once."""
        if self.joint:
            self.runner.look(self.batch, {})
        else:
            seen = self.whole.look(self.runner.model, self.runner.guide, self.batch, {})
            check_pair(seen)
            self.runner.meet(seen)

    def watched(self) -> dict[str, object]:
        """What one run shows."""
        particles = self.runner(self.batch, {}, scaled=False)
        found, first = self.terms(particles), particles.guide | particles.noise
        means = mean_draws(self.runner.guide, self.batch, first=first, draws=self.draws) if rows(self.batch) > 1 else {}
        variances = {name: average.mean.var(0) - average.noise.mean(0) for name, average in means.items()}
        found["active_units"] = {name: int((variance > 0.01).sum()) for name, variance in variances.items()}
        for module in roots(self.runner.model, self.runner.guide):
            if callable(own := getattr(module, "metrics", None)):
                found |= own(*self.batch)
        return found

    def terms(self, particles: Particles) -> dict[str, object]:
        """``reconstruction`` = E log p(x | z) and ``kl``, in nats per datum, and ``kl_per_unit`` by site."""
        # joint weights are totals: of the likelihood over this batch, of the KL over all data
        held, size = (rows(self.batch), self.size) if self.joint else (1, 1)
        kls = {
            name: site_kl(particles, name).flatten(0, -2).mean(0) / self.repeats(particles, name)
            for name in latent(particles.model)
            if point_mass(particles.guide[name]["fn"]) is None
        }
        if kls.keys() == latent(particles.model).keys():
            carried = particles.log_carried()
            totals = (
                each.sum().item() * (size if self.repeats(particles, name) > 1 else 1) for name, each in kls.items()
            )
            kl = sum(totals) - (0.0 if carried is None else carried.mean().item())
        else:  # point masses (autoguides, codes) have a KL only together with the sites that they transform
            kl = -combine(None, particles.log_prior(), particles.log_guide(), 1, 1).mean().item()
        found: dict[str, object] = {"kl_per_unit": {name: each.tolist() for name, each in kls.items()}, "kl": kl / size}
        likelihood = particles.log_likelihood()
        return found if likelihood is None else {"reconstruction": likelihood.mean().item() / held} | found

    def repeats(self, particles: Particles, name: str) -> int:
        """Over how many data the KL of a site is summed: joint weights have no axis for those of local latents."""
        held = rows(self.batch)
        return held if self.joint and any(size == held for _, _, size in frames(particles.model[name])) else 1


def warn_unlogged(error: Exception) -> None:
    """Say why nothing is logged of the units."""
    warn(f"KL and active units will not be logged: {' '.join(str(error).split())}")


class Validation:
    """The bound on held-out data, in nats per datum, in eval mode and on the same noise every time."""

    def __init__(self, model: Program, guide: Program, feed: Feed, objective: pyro.infer.ELBO) -> None:
        with evaluating(model, guide):
            seen = look_on(feed, model, guide)
        self.model, self.guide, self.modules, self.feed, self.objective = model, guide, seen.modules, feed, objective
        self.full_size, self.joint, self.sharing = seen.full_size, seen.joint, Sharing({})
        keep_order(feed, None if self.joint or self.sharing.ranks.alone else self.sharing.share)

    def __call__(self) -> float:
        total, count, team = 0.0, 0, self.sharing.ranks
        with torch.no_grad(), isolated_rng(0), evaluating(self.model, self.guide, *self.modules):
            feed, images = self.feed, self.feed.images
            batches: Iterable[Batch] = (
                feed.batches() if images is None else feed.watched(datasets.batches((images,), feed.batch_size))
            )
            if self.joint:  # all data share latents, and come as one batch
                batches = [tuple(map(torch.cat, zip(*batches, strict=True)))]
            for batch in batches:
                mine = self.sharing.mine(batch, feed.source.whole)
                number = getattr(self.objective, "total_particles", 1)
                with self.sharing.drawing(self.loss, mine, number, self.look):
                    loss = float(self.loss(mine))
                if self.sharing.parted or team.first:  # else each has the whole
                    total -= loss / (self.full_size or rows(mine)) * rows(mine)
                count += self.sharing.total
        return team.sum_(torch.tensor(total, dtype=torch.float64)).item() / count

    def look(self, batch: Batch) -> Look:
        """A look at the pair."""
        return look(self.model, self.guide, batch, validate=False)

    def loss(self, batch: Batch) -> Tensor | float:
        """The loss of a batch, summed over its data."""
        with beside(batch):
            return first_loss(self.objective.loss(self.model, self.guide, *batch))  # type: ignore[attr-defined]


def look_on(feed: Feed, model: Program, guide: Program, *, validate: bool = True) -> Look:
    """A look at a pair on the first of the data, all of which are to be checked against its observed sites."""
    batch = feed.first()
    if any(tensor.is_meta for tensor in held_by(guide, model)):
        raise ValueError("parameters on the device meta have no values: load some, or build the networks elsewhere")
    home = home_of(guide, model, args=batch)

    def looked(given: Batch) -> tuple[Batch, Look]:
        given = as_batch(given, home)
        return given, look(model, guide, given, validate=validate)

    if feed.observed is not None:  # looked at before, by another pair or with Pyro's checks
        return looked(batch)[1]
    with numbered(feed.images):
        taken, (batch, seen) = first_way(batch, looked, guide, model)
        feed.take(taken)
        feed.watch(Observed(model, guide, seen.model, batch))
    return seen
