"""Contrastive divergence: chains that stand for the distribution of a machine of bits, and training by them."""

from __future__ import annotations

import time

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pyrovae.arguments import in_range, pick_device, positive_int
from pyrovae.compile.checked import Checked, wanted
from pyrovae.compile.inductor import has_compiler
from pyrovae.data.feed import Feed, numbered
from pyrovae.engine.guard import Guard, last_good
from pyrovae.engine.observed import Observed
from pyrovae.engine.programs import nothing
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.sites import record
from pyrovae.engine.updates import Update
from pyrovae.errors import NumericalError
from pyrovae.models.base import Pair
from pyrovae.models.partition import Energy, bits
from pyrovae.progress import ProgressBar
from pyrovae.schedules import Schedule, make_schedule

PROBE = 1000  # data on which an epoch's metrics are measured
LAUNCHES = 1e-3  # seconds that compiling saves per step on CUDA, at least


class ContrastiveDivergence(Pair):
    """A layer of visible and a layer of hidden bits, trained by contrastive divergence; see :class:`RBM`.

    :ivar chains: states of the persistent chains, ``[C, num_visible]``.
    """

    num_visible: int
    weight: nn.Parameter
    visible_bias: nn.Parameter
    hidden_bias: nn.Parameter
    base_visible: Tensor
    base_hidden: Tensor
    chains: Tensor

    @property
    def energy(self) -> Energy:
        """E(v, h) of flat v."""
        return Energy(self.weight, self.visible_bias, self.hidden_bias)

    def flat(self, v: Tensor) -> Tensor:
        """``[..., *input_shape]`` as ``[..., num_visible]``, in the dtype of the weights."""
        return v.flatten(-len(self.input_shape)).to(self.weight.dtype)

    @torch.no_grad()
    def gibbs(self, v: Tensor, steps: int = 1) -> Tensor:
        """Draw h given v and v given h, ``steps`` times over: ``[..., *input_shape]`` to the same."""
        v = self.flat(v)
        for _ in range(positive_int("steps", steps)):
            v = bits(self.energy.visible_logits(bits(self.energy.hidden_logits(v).sigmoid())).sigmoid())
        return v.unflatten(-1, self.input_shape)

    def contrastive_divergence(self, v: Tensor, start: Tensor | None = None, steps: int = 1) -> tuple[Tensor, Tensor]:
        r"""A scalar whose gradient is that of CD-k, and the chains' new states ``[C, *input_shape]``.

        .. math:: \frac{1}{B} \sum_b F(v_b) - \frac{1}{C} \sum_i F(\tilde v_i)

        with :math:`\tilde v` the chains after k Gibbs steps, taken as constants. At the model's own distribution they
        make the gradient that of the mean -log p(v); after few steps it is biased, and no function's gradient. The
        value is not a bound on anything.

        :param v: data ``[B, *input_shape]``.
        :param start: where the chains start; None starts them at the data (CD-k), the states returned last make it
            persistent.
        :param steps: k.
        """
        states, energy = self.gibbs(v if start is None else start, steps), self.energy
        return energy.free(self.flat(v)).mean() - energy.free(self.flat(states)).mean(), states

    def fit(
        self,
        data: object,
        *,
        epochs: int = 50,
        batch_size: int = 100,
        lr: float = 0.01,
        schedule: str | Schedule = "cosine",
        cd_steps: int = 1,
        persistent: bool = False,
        chains: int | None = None,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        validation: object = None,
        device: str | torch.device = "auto",
        seed: int = 0,
        progress: bool | None = None,
    ) -> list[dict[str, float]]:
        r"""Train by contrastive divergence: gradient descent with momentum along :meth:`contrastive_divergence`.

        What is followed is no bound, and nothing in the history is one: *pseudo_log_likelihood* (of one pixel given
        all others, times their number; estimated on one pixel of each datum), *reconstruction_error* (squared, summed
        over pixels), and with ``validation`` *free_energy_gap*, the mean F of the validation data less that of as many
        training data, which grows as the machine overfits. Measure :meth:`log_prob`.

        :param data: as :func:`pyrovae.fit` takes them, zeros and ones (or binarised dynamically); labels are left out.
        :param epochs: passes over the data.
        :param batch_size: data per step.
        :param lr: learning rate; with momentum m, steps are up to 1 / (1 - m) times as long.
        :param schedule: "constant", "cosine", "linear", "iwae", or a function of progress in [0, 1) that gives the
            factor of lr.
        :param cd_steps: k, Gibbs steps per gradient.
        :param persistent: let the chains go on from step to step (persistent contrastive divergence), and on from
            where the last fit left them.
        :param chains: number of persistent chains, by default ``batch_size``.
        :param momentum: of the gradient, in [0, 1).
        :param weight_decay: pull of the weights to 0, per unit of lr.
        :param validation: data for the free-energy gap.
        :param device: "auto" (CUDA where there is one), "cpu", "cuda", ...; the machine stays there.
        :param seed: of the chains, the order of the data and their binarisation; the global generator is left as found.
        :param progress: show a progress bar; None shows it on terminals only.
        :return: one row per epoch.
        :raises DataError: for data other than zeros and ones.
        :raises ValueError: for arguments out of range.
        :raises NumericalError: where a gradient is not finite, or a parameter no longer; those before it are kept.

        Hinton, *Training products of experts by minimizing contrastive divergence*, 2002; Tieleman, *Training
        restricted Boltzmann machines using approximations to the likelihood gradient*, 2008.
        """
        epochs, cd_steps = positive_int("epochs", epochs), positive_int("cd_steps", cd_steps)
        batch_size = positive_int("batch_size", batch_size)
        if chains is not None and not persistent:
            raise ValueError(f"chains={chains} are those of persistent=True: pass that, or leave chains out")
        number = batch_size if chains is None else positive_int("chains", chains)
        rate, factor = in_range("lr", lr, 0.0), make_schedule(schedule)
        decay = in_range("weight_decay", weight_decay, 0.0)
        momentum = in_range("momentum", momentum, 0.0, 0.999)
        optimizer = torch.optim.SGD([self.weight], momentum=momentum, weight_decay=decay)
        optimizer.add_param_group({"params": [self.visible_bias, self.hidden_bias], "weight_decay": 0.0})
        place, history = pick_device(device), []
        with isolated_rng(seed), ProgressBar("RBM", epochs, progress) as bar:
            feed = self.feed(data, batch_size, place)
            probes = [feed.first(PROBE)[0]]
            if validation is not None:
                probes.append(self.feed(validation, batch_size, place).first(PROBE)[0])
            self.to(place)
            total, number_of_data = 0.0, 0
            for v, *_ in feed:
                total, number_of_data = total + v.flatten(1).sum(0, dtype=torch.float64), number_of_data + len(v)
            self.base_visible.copy_(clipped_logit(torch.as_tensor(total / number_of_data)))
            if persistent and len(self.chains) != number:
                self.chains = bits(self.base_visible.sigmoid().expand(number, -1))
            step = compiled(self, cd_steps, epochs * (feed.steps or 0), place)
            for epoch in range(epochs):
                began, now = time.perf_counter(), rate * factor(epoch / epochs)
                for group in optimizer.param_groups:
                    group["lr"] = now
                run_epoch(self, feed, optimizer, step, persistent)
                row = {"epoch": epoch + 1, "seconds": time.perf_counter() - began, "learning_rate": now}
                history.append(row | epoch_metrics(self, *probes))
                bar.update(epoch + 1, f"pseudo log p {history[-1]['pseudo_log_likelihood']:.1f}")
            with torch.no_grad():
                self.base_hidden.copy_(clipped_logit(self.encode(probes[0]).mean(0)))
        return history

    train_on = fit

    def feed(self, data: object, batch_size: int, device: torch.device) -> Feed:
        """Data in batches, after checks."""
        feed = Feed(data, batch_size, device)
        batch = feed.first()
        with numbered(feed.images):
            self.check(batch[0])
            feed.watch(Observed(observe_bits, nothing, record(observe_bits, batch, {}), batch))
        return feed


def run_epoch(
    machine: ContrastiveDivergence, feed: Feed, optimizer: torch.optim.Optimizer, step: Checked, persistent: bool
) -> None:
    """One pass over the data; a step without finite gradients is not taken, nor are those after it."""
    guard, parameters = Guard([[]], machine.weight.device, lasting=True), dict(machine.named_parameters())
    update = Update(optimizer)
    with last_good(parameters):
        for v, *_ in feed:
            start = machine.chains.unflatten(-1, machine.input_shape) if persistent else None
            scalar, *gradients, states = step(v, start)
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter.grad = gradient
            guard.judge(scalar, [gradients])
            guard.move(0, update)
            if persistent:
                machine.chains = torch.where(guard.withheld > 0, machine.chains, states.flatten(1))
        if guard.withheld.item():
            raise NumericalError("a gradient of the RBM is not finite: lower lr; the RBM has its last good weights")


def observe_bits(x: Tensor, *_: object) -> None:
    """The program that observes bits, and says no more of them."""
    pyro.sample("x", dist.Bernoulli(logits=torch.zeros_like(x)).to_event(), obs=x)


@torch.no_grad()
def epoch_metrics(machine: ContrastiveDivergence, v: Tensor, held_out: Tensor | None = None) -> dict[str, float]:
    """What :meth:`ContrastiveDivergence.fit` notes of some data, and of validation data, after an epoch."""
    flat, free = machine.flat(v), machine.energy.free
    pixel = torch.randint(machine.num_visible, (len(flat), 1), device=flat.device)
    odds = free(flat.scatter(1, pixel, 1 - flat.gather(1, pixel))) - free(flat)
    found = {
        "pseudo_log_likelihood": machine.num_visible * logsigmoid(odds).mean().item(),
        "reconstruction_error": (machine.reconstruct(v) - v).square().flatten(1).sum(-1).mean().item(),
    }
    if held_out is not None:
        found["free_energy_gap"] = (free(machine.flat(held_out)).mean() - free(flat[: len(held_out)]).mean()).item()
    return found


def compiled(machine: ContrastiveDivergence, k: int, steps: int, device: torch.device) -> Checked:
    """The CD-k scalar, its gradient in every parameter, and the chains, of a batch and where the chains start."""
    parameters = list(machine.parameters())

    def followed(v: Tensor, start: Tensor | None) -> list[Tensor]:
        scalar, states = machine.contrastive_divergence(v, start, k)
        return [scalar.detach(), *torch.autograd.grad(scalar, parameters), states]

    return Checked(followed, parameters, wanted=worthwhile(steps, device))


def worthwhile(steps: int, device: torch.device) -> bool:
    """Whether compiling promises a shorter training: on CUDA, where a step is many launches of little work each."""
    return device.type == "cuda" and wanted("auto", LAUNCHES * steps) and has_compiler(device)


def clipped_logit(mean: Tensor) -> Tensor:
    """The logit of a mean, clipped to [.001, .999]."""
    return mean.clamp(0.001, 0.999).logit()
