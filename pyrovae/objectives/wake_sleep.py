r"""Reweighted wake-sleep: the guide learns by likelihood, not by a bound."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from pyrovae.engine.fold import fold_arguments
from pyrovae.engine.generate import Redraw, generate
from pyrovae.engine.gradient import Needs, ParticleWeights, finite_weights
from pyrovae.engine.particles import Particles
from pyrovae.engine.programs import Program
from pyrovae.engine.sites import latent, proposed, record
from pyrovae.engine.weights import log_mean_exp
from pyrovae.objectives.base import Objective, Options


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
        return Needs(copies="detached", path=self.gradient == "dreg", fixed=True, reinforce=False)

    def weights(self, log_w: Tensor) -> ParticleWeights:
        """As in the equations; ``reinforce`` is 0."""
        wn = log_w.detach().softmax(0)
        zero = torch.zeros_like(wn)
        path, score = (wn - wn.square(), zero) if self.gradient == "dreg" else (zero, wn)
        return finite_weights(ParticleWeights(wn, path, score, zero), self.bound(log_w.detach()))


class SleepPhi(Objective):
    r"""The sleep phase: the guide learns to invert the model on data that the model dreams.

    .. math:: \phi:\; \nabla_\phi\, \mathbb E_{p(x, z)} \log q(z \mid x)

    One dream per datum and particle; the data give only the shape of a batch, and what follows them (labels) is kept.
    The model gets no gradient. Reported is :math:`\log q(z \mid x)` of the dreams in nats, no bound on log p(x), and no
    function of log-weights: :meth:`bound` refuses. Train the model by :class:`RWS` in turn.

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

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Minus log q(z | x) of one dream per datum, summed over data, mean over particles."""
        runner = self.runner(model, guide)
        if not runner.structures:
            runner.look(args, kwargs, self.check)
        if self.num_particles > 1:
            args, kwargs = fold_arguments(args, kwargs, self.num_particles)
        with torch.no_grad():
            dreamt, data = generate(model, args, kwargs, Redraw(args[0]))
        values = {name: site["value"] for name, site in latent(dreamt).items() if site is not data}
        sites = proposed(record(guide, (data["value"], *args[1:]), kwargs, values), dreamt)
        particles = Particles.of(sites, {}, noise=runner.noise, scaled=True)
        log_q = particles.log_guide()
        if log_q is None:
            raise ValueError("SleepPhi trains a guide, but this one draws nothing: take another objective")
        return -(log_q * particles.scale).sum() / self.num_particles
