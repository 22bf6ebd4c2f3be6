"""The gradients of batches that several processes share, each of them running on rows of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import pyro.infer
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pyrovae.compile.checked import untouched
from pyrovae.compile.noise import CannotCompile
from pyrovae.compile.rows import FEW, Draw, Rows, learn
from pyrovae.data.feed import Feed, number_in
from pyrovae.engine.probe import Look, look
from pyrovae.engine.programs import Batch, cut, rows
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.sites import latent, quoted
from pyrovae.objectives.base import Objective
from pyrovae.parts.quantizer import VectorQuantizer
from pyrovae.ranks import ElsewhereError, Ranks
from pyrovae.train.compiled import Compiled
from pyrovae.train.step import Eager, Outcome

HEAD = 4  # numbers in front of a sum: the loss, the data left out, the processes that failed, those asked to end
SEED = 21  # of the runs that tell whether a loss is a sum over data
ALONE = "train it in one process"


class Shared:
    r"""The gradients of a batch from those of its rows, which processes take a part each of.

    .. math:: \nabla \frac1B \sum_{b=1}^B \ell_b = \sum_r \frac{B_r}B\; \nabla \frac1{B_r} \sum_{b \in r} \ell_b

    Losses, gradients and the sums of moving averages travel together in one flat tensor, once a step, between graph and
    optimizer. All processes then have the same numbers to the bit, judge, clip and move alike, and stay alike.

    :param inner: the gradients of a process's own rows.
    :param feed: of batches, whole or a process's own rows alone.
    :ivar asked: whether this process is asked to end, as one of many may be.
    """

    def __init__(self, inner: Eager | Compiled, eager: Eager, ranks: Ranks, feed: Feed) -> None:
        self.inner, self.eager, self.ranks, self.feed = inner, eager, ranks, feed
        self.totals = {rows(inner.example): rows(feed.first())}
        self.example, self.states, self.reached = inner.example, inner.states, inner.reached
        self.kind, self.compile_seconds = inner.kind, 0.0
        self.parameters = list(eager.parameters)
        self.asked: Callable[[], bool] = lambda: False
        self.draws: dict[int, list[Draw]] = {}
        self.modes: dict[tuple[int, int, int, int], Rows] = {}
        self.averages = [a for m in quantizers(eager) for a in m.averages()]
        self.sums: dict[tuple[torch.dtype, torch.device], Sums] = {}
        for tensor in (*self.parameters, *(average for average, _ in self.averages)):
            self.sums.setdefault((tensor.dtype, tensor.device), Sums()).members.append(tensor)
        self.head = self.sums[self.parameters[0].dtype, self.parameters[0].device]
        self.place: dict[int, Tensor] = {}
        for part in self.sums.values():
            self.place |= part.lay_out(HEAD + len(self.parameters))

    def static(self, objective: pyro.infer.ELBO) -> None:
        """Nothing: processes wait for each other at every step."""

    def look_again(self) -> None:
        """As the gradients of a process's own rows do."""
        self.inner.look_again()

    def __call__(self, objective: pyro.infer.ELBO, batch: Batch) -> Outcome:
        number, state = number_in(self.feed, batch), torch.get_rng_state()
        share = self.ranks.share(number)
        own, failed, outcome = share.stop - share.start, None, None
        before = [average.clone() for average, _ in self.averages]
        try:
            with self.sharing(objective, number, share if own else slice(0, 1)):
                # who has no rows runs on one that does not count, so that all draw alike
                mine = batch if self.feed.source.whole else cut(batch, share if own else slice(0, 1))
                graphs = self.totals.setdefault(rows(mine), number) == number  # which are of batches of one size
                outcome = (self.inner if graphs else self.eager)(objective, mine)
            self.check_reached()
        except Exception as error:
            failed = error
        self.kind, self.compile_seconds = self.inner.kind, self.inner.compile_seconds
        loss, left_out = self.add_up(outcome if own else None, own, number, before, failed is not None)
        if failed is not None or (loss.is_cpu and self.head.flat[2].item()):
            for (average, _), then in zip(self.averages, before, strict=True):
                average.copy_(then)
            torch.set_rng_state(state)  # the others may be elsewhere in their draws
            raise failed or ElsewhereError("another process failed at this step, and says why: all end with it")
        return Outcome(loss, left_out)

    @contextmanager
    def sharing(self, objective: pyro.infer.ELBO, total: int, own: slice) -> Iterator[None]:
        """Losses inside are of so many rows of a batch."""
        particles = getattr(objective, "total_particles", getattr(objective, "num_particles", 1))
        if particles not in self.draws:
            self.draws[particles] = check_sum(self.eager, objective, self.feed.first(), particles)
        known = particles, total, own.start, own.stop
        if known not in self.modes:
            self.modes[known] = Rows(self.draws[particles], total, own, particles)
        self.eager.sharing = partial(self.modes.__getitem__, known)
        try:
            yield
        finally:
            self.eager.sharing = nullcontext

    @property
    def any_asked(self) -> bool:
        """Whether any process was asked to end when the last step was added up."""
        return bool(self.head.flat[3])

    def check_reached(self) -> None:
        """Refuse what only some batches reach, and so only some processes."""
        if new := self.eager.parameters[len(self.parameters) :]:
            names = quoted(n for n, p in self.eager.state.parameters.items() if any(p is q for q in new))
            raise ValueError(f"a step reached {names} first, where not all processes may be: {ALONE}")

    def add_up(
        self, outcome: Outcome | None, own: int, number: int, before: Sequence[Tensor], failed: bool
    ) -> tuple[Tensor, Tensor]:
        """The sums over processes, put where optimizers find them; the loss, and how many data are left out."""
        grads = [None if outcome is None or failed else p.grad for p in self.parameters]
        if any(g is not None and g.is_sparse for g in grads):
            raise ValueError(f"an embedding has sparse gradients: build it with sparse=False, or {ALONE}")
        head, flags = self.head.flat[:HEAD], self.head.flat[HEAD : HEAD + len(grads)]
        for part in self.sums.values():
            part.flat.zero_()
        if found := [(self.place[id(p)], g) for p, g in zip(self.parameters, grads, strict=True) if g is not None]:
            views, given = map(list, zip(*found, strict=True))
            torch._foreach_copy_(views, given)
            torch._foreach_mul_(views, own / number)
        if outcome is not None and not failed:
            for (average, decay), then in zip(self.averages, before, strict=True):
                torch.sub(average, then, alpha=decay, out=self.place[id(average)])
            # where no datum of these rows has a bound, their loss is NaN, which it would not be among others
            head[0] = torch.where(outcome.left_out >= own, 0.0, outcome.losses) * (own / number)
            head[1] = outcome.left_out
            flags.copy_(torch.tensor([float(g is not None) for g in grads], dtype=flags.dtype), non_blocking=True)
        if failed:
            head[2] = 1.0
        if self.asked():
            head[3] = 1.0
        for part in self.sums.values():
            self.ranks.sum_(part.flat)
        for (average, decay), then in zip(self.averages, before, strict=True):
            torch.add(self.place[id(average)], then, alpha=decay, out=average)
        for module in quantizers(self.eager) if self.averages else ():
            module.settle()
        reached = flags.tolist() if any(g is None for g in grads) else [1.0] * len(grads)
        for parameter, flag in zip(self.parameters, reached, strict=True):
            parameter.grad = self.place[id(parameter)] if flag else None
        left_out = head[1].round().long()
        loss = torch.where(left_out >= number, torch.nan, head[0])
        return loss, left_out


class Sums:
    """Tensors of one kind side by side in a flat one, behind room for the numbers of a step."""

    def __init__(self) -> None:
        self.members: list[Tensor] = []
        self.flat = torch.empty(0)

    def lay_out(self, at: int) -> dict[int, Tensor]:
        """Make room for all behind so many numbers, each laid out as it is where it lives; the places, by tensor."""
        like, places = self.members[0], dict[int, Tensor]()
        self.flat = torch.zeros(at + sum(t.numel() for t in self.members), dtype=like.dtype, device=like.device)
        for tensor in self.members:
            part = self.flat[at : at + tensor.numel()]
            places[id(tensor)] = part.as_strided(tensor.shape, torch.empty_like(tensor).stride(), part.storage_offset())
            at += tensor.numel()
        return places


def quantizers(eager: Eager) -> list[VectorQuantizer]:
    """The modules whose moving averages can be added up over processes."""
    return [m for root in eager.state.modules for m in root.modules() if isinstance(m, VectorQuantizer)]


def check_shareable(seen: Look, objective: pyro.infer.ELBO, feed: Feed, ranks: Ranks) -> None:
    """Refuse by name what is known not to be a sum over data.

    :raises ValueError: saying what to do instead.
    """
    batch = feed.first()
    if getattr(sampler := getattr(feed.loader, "sampler", None), "num_replicas", 1) > 1:
        raise ValueError(
            f"a {type(sampler).__name__} gives each process data of its own, but all take parts of the same batches: "
            "pass the data set, or a DataLoader that is the same in all"
        )
    if not batch:
        raise ValueError(f"a program that holds its data cannot share them out: pass them as data, or {ALONE}")
    if (number := rows(batch)) < ranks.size:
        raise ValueError(
            f"a batch of {number} data is not enough for {ranks.size} processes: pass a batch_size of {ranks.size} or "
            "more, or start fewer"
        )
    if getattr(objective, "free_bits", 0.0):
        raise ValueError(
            f"free_bits compare the KL of the whole batch, which no process has: pass free_bits=0, or {ALONE}"
        )
    named = [(n, m) for root in seen.modules for n, m in root.named_modules()]
    for name, module in named:
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(
                f'"{name}" is a {type(module).__name__} in train mode, which normalises by the whole batch, and no '
                f"process has that: take nn.GroupNorm or nn.LayerNorm, put it in eval mode, or {ALONE}"
            )
        if isinstance(module, VectorQuantizer) and module.revive_below is not None and module.ema_decay is not None:
            raise ValueError(f'"{name}" revives codes by data of the whole batch: pass revive_below=None, or {ALONE}')
    if strays := seen.strays:
        raise ValueError(
            f"{quoted(strays)} are outside the data plate, and no sum over data (a batch factor, or a latent that all "
            f"share): {ALONE}"
        )
    if seen.joint:
        raise ValueError(
            f"the log-weights are joint over the data (latents {quoted(latent(seen.model))} without a plate around all "
            f"sites): {ALONE}"
        )


def check_sum(eager: Eager, objective: pyro.infer.ELBO, example: Batch, particles: int) -> list[Draw]:
    """What a loss draws, after a check that it and its gradient are sums over data: on few of them, whole and in parts.

    :raises ValueError: where they are not, or something else is moved that other data would move otherwise.
    """
    objective = copy.copy(objective)
    if isinstance(objective, Objective) and objective.weighs_kl:
        objective.kl_weight = 1.0  # where it is warmed up from 0 nothing of the KL would be seen
    many = min(FEW, rows(example))
    few, parts = cut(example, slice(0, many)), [slice(0, many - many // 2), slice(many - many // 2, many)]

    def value(batch: Batch) -> object:
        with trial(eager):
            run = eager.loss if hasattr(objective, "differentiable_loss") else eager
            return run(objective, batch)

    draws, again = learn(value, few)
    looks, _ = learn(lambda batch: look(eager.model, eager.guide, batch, validate=False), few)
    draws = list(dict.fromkeys([*draws, *looks]))  # as an objective looks again at a batch of one datum
    known = [m for q in quantizers(eager) for m in (q.codebook, *(a for a, _ in q.averages()))]

    def results(batch: Batch, own: slice) -> tuple[list[Tensor], dict[str, Tensor]]:
        with isolated_rng(SEED), trial(eager):
            eager.sharing = partial(Rows, draws, many, own, particles)
            try:
                outcome = eager(objective, batch)
            finally:
                eager.sharing = nullcontext
            found = [outcome.losses, *(torch.zeros_like(p) if p.grad is None else p.grad for p in eager.parameters)]
            moved = {n: t.detach().clone() for n, t in eager.state.tensors.items() if not t.requires_grad}
            kept = {n: t for n, t in moved.items() if not any(eager.state.tensors[n] is m for m in known)}
            return [t.detach().double() * rows(batch) for t in found], kept

    whole, moved = results(few, slice(0, many))
    each = [results(cut(few, own), own) for own in parts]
    for _, other in each:
        for name, tensor in moved.items():
            if not torch.equal(tensor, other[name]):
                raise ValueError(f'"{name}" is moved by the data of a batch, which no process has whole: {ALONE}')
    summed = [a + b for (a, b) in zip(*(own for own, _ in each), strict=True)]
    scale = max(1e-3 * float(torch.stack([t.norm() for t in whole[1:]]).norm()), 1e-12)
    for a, b in zip(whole, summed, strict=True) if again else ():
        if bool(a.isfinite().all()) and float((a - b).norm()) > 3e-3 * max(float(a.norm()), scale):
            raise ValueError(
                "the loss of a batch is not the sum of the losses of its data (on rows of it, with their noise, loss "
                f"or gradient differ by {float((a - b).norm()):.3g} of {float(a.norm()):.3g}): processes would train "
                f"something else; {ALONE}"
            )
    return draws


@contextmanager
def trial(eager: Eager) -> Iterator[None]:
    """Leave the pair as it is, but for what it reaches."""
    grads = [p.grad for p in eager.parameters]
    try:
        with untouched(eager.state):
            yield
    except CannotCompile as error:  # a buffer that is another tensor after each step
        raise ValueError(f"{error}, or {ALONE}") from error
    finally:
        for parameter, grad in zip(eager.parameters, grads, strict=False):
            parameter.grad = grad
