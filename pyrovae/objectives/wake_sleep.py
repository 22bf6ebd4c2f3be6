r"""Reweighted wake-sleep: the guide learns by likelihood, not by a bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from pyro.distributions import Delta, Unit
from torch import Tensor
from torch.distributions import biject_to

from pyrovae.engine.fixed import refuse_live_point_mass
from pyrovae.engine.generate import Redraw, generate, ties
from pyrovae.engine.gradient import Needs, ParticleWeights, finite_weights
from pyrovae.engine.particles import Particles
from pyrovae.engine.probe import Look
from pyrovae.engine.programs import Batch, Program
from pyrovae.engine.scores import score_function
from pyrovae.engine.sites import Site, Sites, drawn, latent, observed, oversampling, proposed, quoted, record
from pyrovae.engine.unwrap import point_mass
from pyrovae.engine.weights import log_mean_exp
from pyrovae.errors import is_out_of_memory
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

    The mean over K dreams of the batch, one after the other; the data give only its shape, what follows them (labels)
    is kept, and so is what a subsample leaves out. The model gets no gradient. Reported is :math:`\log q(z \mid x)` of
    the dreams in nats, no bound on log p(x), and no function of log-weights: :meth:`bound` refuses. Train the model by
    :class:`RWS` in turn.

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
        factors and observations beside the data that depend on latents.

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
        tied = [name for name in (ties(seen.again) if len(kinds) > 1 else ()) if not isinstance(kinds[name], Delta)]
        if len(tied) > 1 or any(isinstance(kinds[name], Unit) for name in tied):
            raise ValueError(
                f"SleepPhi dreams what one site observes, but {quoted(tied)} depend on latents, and dreams do not "
                "follow factors, nor what stays observed: leave factors out, and observe the data at one site"
            )
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
        dreams = [self.dream_loss(model, guide, args, kwargs) for _ in range(self.num_particles)]
        return torch.stack(dreams).mean()

    def dream_loss(self, model: Program, guide: Program, args: Batch, kwargs: Mapping[str, object]) -> Tensor:
        """Minus log q(z | x) of one dream of the data, summed over them."""
        if not (args and isinstance(args[0], Tensor)):
            got = type(args[0]).__name__ if args else "none"
            raise ValueError(f"SleepPhi dreams the programs' first argument, a tensor, got {got}: pass the data first")
        with torch.no_grad():
            dreamt, data = generate(model, args, kwargs, redraw := Redraw(args[0]))
        values = {name: value for name, value in drawn(dreamt).items() if name != data["name"]}
        args = (written(args[0], data, dreamt, redraw.names[data["name"]]), *args[1:])
        try:
            run = proposed(record(guide, args, kwargs, values), dreamt)
        except (RuntimeError, ValueError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f'the guide fails on what the model dreams at site "{data["name"]}" ({" ".join(str(error).split())}): '
                "let it take all that the model may draw, in plates like the model's"
            ) from error
        if found := sources(run, dreamt):
            run = proposed(record(guide, args, kwargs, values | found), dreamt)
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


def sources(guide: Sites, model: Sites) -> dict[str, Tensor]:
    """What a guide's Deltas are computed from, by site, if the model has drawn their values, as autoguides do it.

    That is the unconstrained values, put together, of the Deltas that follow the site in the guide.
    """
    wanted, parts = latent(model), dict[str, list[Tensor]]()
    for name, site in latent(guide).items():
        is_delta = isinstance(point_mass(site["fn"]), Delta)
        if name not in wanted and not is_delta:
            parts[name] = []
        elif name in wanted and is_delta and parts:
            transform, value = biject_to(wanted[name]["fn"].support), wanted[name]["value"]
            parts[next(reversed(parts))].append(transform.inv(value).flatten())
    joined = {name: torch.cat(values) for name, values in parts.items() if values}
    shapes = {name: guide[name]["value"].shape for name in joined}
    return {name: u.reshape(shapes[name]) for name, u in joined.items() if u.numel() == shapes[name].numel()}


def written(x: Tensor, data: Site, dreamt: Sites, observed: Tensor) -> Tensor:
    """What was dreamt of x: all of it, or the rows that a plate took of it, in their places.

    :param observed: what the site observes where nothing is dreamt.
    """
    value = data["value"]
    for frame in data["cond_indep_stack"]:
        if frame.name in dreamt and oversampling(frame) != 1 and value.shape != x.shape:
            if frame.full_size != len(x) or frame.size != len(value):
                raise ValueError(
                    f'SleepPhi dreams whole data, but plate "{frame.name}" takes {frame.size} of {frame.full_size} '
                    "within a datum: pass the whole of them"
                )
            if value.shape[1:] == x.shape[1:]:
                return x.index_copy(0, dreamt[frame.name]["value"], value)
    if value.shape != x.shape and not (value.shape == observed.shape and is_reshaped(observed, x)):
        raise ValueError(
            f'SleepPhi dreams the programs\' first argument, {list(x.shape)}, but site "{data["name"]}" observes '
            f"{list(observed.shape)} and draws {list(value.shape)}: let it observe that argument, all of it"
        )
    return value.reshape(x.shape)


def is_reshaped(other: Tensor, x: Tensor) -> bool:
    """Whether a tensor is all of x, in the same order."""
    return other.numel() == x.numel() and torch.equal(other.reshape(x.shape), x)
