r"""Reweighted wake-sleep: the guide learns by likelihood, not by a bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from pyro.distributions import Delta, Unit
from torch import Tensor

from pyrovae.engine.fixed import refuse_live_point_mass
from pyrovae.engine.generate import ties
from pyrovae.engine.gradient import Needs, ParticleWeights, finite_weights
from pyrovae.engine.particles import Particles
from pyrovae.engine.probe import Look
from pyrovae.engine.programs import Batch, Program
from pyrovae.engine.runner import Runner
from pyrovae.engine.scores import score_function
from pyrovae.engine.sites import drawn, latent, observed, proposed, quoted, record
from pyrovae.engine.unwrap import point_mass
from pyrovae.engine.weights import log_mean_exp
from pyrovae.errors import is_out_of_memory
from pyrovae.objectives.base import Objective, Options
from pyrovae.objectives.dreams import dreamt_data, sources


class RWS(Objective):
    r"""Reweighted wake-sleep, wake phase for both programs.

    .. math:: \theta:\; \sum_k \tilde w_k \nabla_\theta \log p(x, z_k), \qquad
              \phi:\; \sum_k \tilde w_k \nabla_\phi \log q(z_k \mid x), \qquad
              \tilde w = \mathrm{softmax}_k \log w

    The model follows IWAE's bound, which is what is reported. The guide descends
    :math:`\mathrm{KL}(p(z \mid x) \| q)`, estimated with self-normalised weights: biased for finite K, consistent, and
    without high-variance score-function terms, so that it suits discrete latents. ``gradient="dreg"`` gives the same
    gradient in the mean through reparameterised samples: path :math:`\tilde w - \tilde w^2`.

    >>> RWS(num_particles=2).weights(torch.zeros(2, 1)).score.squeeze()
    tensor([0.5000, 0.5000])

    :raises ValueError: with gradient="stl", or a kl_weight other than 1.

    Bornschein and Bengio (2015), *Reweighted wake-sleep*; Le et al. (2019), *Revisiting reweighted wake-sleep*; Tucker
    et al. (2018), *Doubly reparameterized gradient estimators*.
    """

    weighs_kl = False

    def __init__(self, num_particles: int = 5, **options: Unpack[Options]) -> None:
        super().__init__(num_particles, **options)
        if self.gradient == "stl":
            raise ValueError('RWS has no gradient="stl", its guide follows no bound: pass gradient="total" or "dreg"')

    def bound(self, log_w: Tensor) -> Tensor:
        return log_mean_exp(log_w)

    @property
    def needs(self) -> Needs:
        """The guide follows its score alone, or its samples alone; no site is scored besides."""
        return Needs(copies="live" if self.gradient == "dreg" else "fixed", fixed=True, reinforce=False)

    def weights(self, log_w: Tensor) -> ParticleWeights:
        """As in the equations; ``reinforce`` is 0."""
        wn = log_w.detach().softmax(0)
        zero = torch.zeros_like(wn)
        path, score = (wn - wn.square(), zero) if self.gradient == "dreg" else (zero, wn)
        return finite_weights(ParticleWeights(wn, path, score, zero), self.bound(log_w.detach()))


class SleepPhi(Objective):
    r"""The sleep phase: the guide learns to invert the model on data that the model dreams.

    .. math:: \phi:\; \nabla_\phi\, \mathbb E_{p(x, z)} \log q(z \mid x)

    The mean over K dreams of the batch, one after the other. A dream draws all that observes the first argument, or
    parts of it, and whatever else is observed and depends on latents, each in the argument that it observes: what the
    guide reads of data beside these (a series turned around) it should compute itself. Labels that no latent leads to
    are kept, and so is what a mask or a subsample leaves out. The model gets no gradient. Reported is
    :math:`\log q(z \mid x)` of the dreams in nats, no bound on log p(x), and no function of log-weights:
    :meth:`bound` refuses. Train the model by :class:`RWS` in turn.

    Of a guide that draws noise u besides, it is :math:`\mathbb E_u \log q(z \mid x, u)`, which is below. Of an
    autoguide's Deltas, the unconstrained values of the dream are found, and their density.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)) * x, 1.0))
    >>> SleepPhi().loss_and_grads(model, guide, torch.zeros(100)) > 0
    True

    :raises ValueError: for Deltas of the guide that are no autoguide's, for parts of a datum that are subsampled, for
        factors that depend on latents, and for sites that do so and observe what the program computes or holds.

    Hinton et al. (1995), *The wake-sleep algorithm for unsupervised neural networks*.
    """

    weighs_kl = False

    def __init__(self, num_particles: int = 1) -> None:  # dreams per datum
        super().__init__(num_particles)

    def bound(self, log_w: Tensor) -> Tensor:
        raise ValueError("SleepPhi is no function of log-weights, it has no bound: take RWS or IWAE to report one")

    @property
    def linear(self) -> bool:
        return True

    def check(self, seen: Look) -> None:
        """As of any objective; what a guide's Deltas are computed from must follow from their values."""
        super().check(seen)
        kinds = {name: point_mass(site["fn"]) for name, site in observed(seen.model).items()}
        tied = [name for name in (ties(seen.again) if len(kinds) > 1 else kinds) if not isinstance(kinds[name], Delta)]
        if units := [name for name in tied if isinstance(kinds[name], Unit)]:
            raise ValueError(
                f"SleepPhi dreams what is observed, but factors {quoted(units)} depend on latents, and dreams do not "
                "follow factors: leave them out"
            )
        if self._known is not None:
            self._known[1].dreams.update({name: name in tied for name in kinds})
        for name, value in sources(seen.guide, seen.model).items():
            if not torch.allclose(value, seen.guide[name]["value"], rtol=1e-3, atol=1e-3):
                raise ValueError(
                    f'SleepPhi needs log q at a dream, but guide site "{name}", from which Deltas are computed, is not '
                    "their unconstrained values put together: take AutoNormal or a guide like AutoMultivariateNormal"
                )

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Minus log q(z | x) of one dream per datum, summed over data, mean over particles."""
        runner = self.runner(model, guide)
        if not runner.structures:
            runner.look(args, kwargs, self.check)
        return torch.stack([self.dream_loss(runner, args, kwargs) for _ in range(self.num_particles)]).mean()

    def dream_loss(self, runner: Runner, args: Batch, kwargs: Mapping[str, object]) -> Tensor:
        """Minus log q(z | x) of one dream of the data, summed over them."""
        dream = dreamt_data(runner, args, kwargs)
        if not observed(dream.sites).keys() | dream.drawn <= runner.dreams.keys():  # a longer series, say
            runner.look(args, kwargs, self.check)
            dream = dreamt_data(runner, args, kwargs)
        values = {name: value for name, value in drawn(dream.sites).items() if name not in dream.drawn}
        try:
            run = proposed(record(runner.guide, dream.args, dream.kwargs, values), dream.sites)
        except (RuntimeError, ValueError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"the guide fails on what the model dreams at {quoted(dream.drawn)} ({' '.join(str(error).split())}): "
                "let it take all that the model may draw, in plates like the model's"
            ) from error
        if found := sources(run, dream.sites):
            run = proposed(record(runner.guide, dream.args, dream.kwargs, values | found), dream.sites)
        noise = latent(run).keys() - values.keys() - found.keys()
        particles = Particles.of(run, {}, noise=noise, scaled=True)
        for site in particles.guide.values():
            refuse_live_point_mass(site)
        log_q = particles.log_guide()
        if log_q is None:
            raise ValueError("SleepPhi trains a guide, but this one draws nothing: take another objective")
        loss = -(log_q * particles.scale).sum()
        scores = {name: score_function(site) for name, site in particles.noise.items()}
        score = particles.total("guide", {name: each for name, each in scores.items() if each is not None})
        if score is None:
            return loss
        carried = -(log_q.detach() * particles.scale * score).sum()
        return loss + carried - carried.detach()
