r"""Posterior draws out of weighted particles, kept while the particles of one pass after another go by."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyrovae.engine.particles import Particles
from pyrovae.engine.probe import Look
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.sites import frames, latent


class Resampler:
    r"""Keeps ``num_draws`` posterior draws per datum: particle s with probability :math:`w_s / \sum_s w_s` each.

    A draw gives way to one of a new pass with the share that the pass has in the weights so far; so nothing is held but
    the draws. They have a generator of their own: what the guide draws does not depend on them.

    Rubin (1988), *Using the SIR algorithm to simulate posterior distributions*.
    """

    def __init__(self, num_draws: int, seed: int | None, seen: Look) -> None:
        self.num_draws, self.seed, self.nesting = num_draws, seed, seen.nesting
        self.layout = replace(seen.layout, num_particles=num_draws, particle_dim=-1 - seen.nesting)
        sites = latent(seen.model) if num_draws else {}
        self.event_dims = {name: site["fn"].event_dim for name, site in sites.items()}
        self.plates = {name: {dim for _, dim, _ in frames(site)} for name, site in sites.items()}
        self.generator: torch.Generator | None = None
        self.done: list[dict[str, Tensor]] = []
        self.draws: dict[str, Tensor] = {}
        self.log_sum: Tensor | None = None

    def values(self, run: Particles) -> list[Tensor]:
        """The model's latents of one pass, each ``[K, *[size or 1] * nesting, *event]``."""
        found, number = [], run.layout.num_particles
        for name, event_dim in self.event_dims.items():
            value = run.model[name]["value"]
            missing = [1] * (1 + self.nesting + event_dim - value.dim())
            if run.layout.folded:
                value = value.unflatten(-1 - event_dim, (number, -1)).movedim(-2 - event_dim, 0)
                found.append(value.reshape(number, *missing[1:], *value.shape[1:]))
            else:
                value = value.reshape(*missing, *value.shape)
                found.append(value.expand(number, *value.shape[1:]))
        return found

    def add(self, log_w: Tensor, values: list[Tensor]) -> None:
        """Let a pass in: its log-weights ``[K, *plates]``, and its :meth:`values`."""
        if not self.num_draws:
            return
        log_w = log_w.double()
        if self.generator is None:
            with isolated_rng():
                seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed + 1  # not the guide's noise
            self.generator = torch.Generator(log_w.device).manual_seed(seed)
        total = torch.logsumexp(log_w, 0)
        shares = (log_w - total).exp().nan_to_num(1.0)  # all alike where every weight is 0
        chosen = torch.multinomial(
            shares.reshape(len(shares), -1).T, self.num_draws, replacement=True, generator=self.generator
        )
        self.log_sum = total if self.log_sum is None else torch.logaddexp(self.log_sum, total)
        share = (total - self.log_sum).exp().nan_to_num(1.0).expand(self.num_draws, *total.shape)
        taken = torch.bernoulli(share, generator=self.generator) == 1
        index = chosen.T.reshape(share.shape)
        for (name, event_dim), value in zip(self.event_dims.items(), values, strict=True):
            at = self.layout.spread(index, event_dim).expand(self.num_draws, *value.shape[1:])
            fresh = value.gather(0, at)
            new = self.layout.spread(taken, event_dim)
            self.draws[name] = torch.where(new, fresh, self.draws.get(name, fresh))

    def finish(self) -> None:
        self.done.append(self.draws)
        self.draws, self.log_sum = {}, None

    def results(self) -> dict[str, Tensor]:
        """The draws of all batches, ``[num_draws, B, *other plates of the site, *event]``; no B for joint weights."""
        found, data = {}, self.layout.dims[-1:]
        for name, event_dim in self.event_dims.items():
            kept = sorted(self.plates[name].union(data))
            absent = tuple(dim - event_dim for dim in range(-self.nesting, 0) if dim not in kept)  # of size 1
            parts = [batch[name].squeeze(absent) for batch in self.done]
            if data:
                parts = [torch.cat([part.movedim(1 + kept.index(data[0]), 1) for part in parts], 1)]
            found[name] = parts[0]
        return found
