r"""Model/guide -> particles -> log-weights -> gradient.

Any pair of Pyro programs is run with :math:`K` particles in one vectorised outer plate. What comes back are the
parts of the log-weights

.. math:: \log w_{kb} = \log p(x_b, z_{kb}) - \log q(z_{kb} \mid x_b),

``[K, B]``, one row per particle and one column per datum. :func:`surrogate` turns four coefficients per particle
into a gradient for model and guide, without knowing whose parameter is whose.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from torch import Tensor

from pyrovae.arguments import positive_int
from pyrovae.engine.particles import Copies, Particles
from pyrovae.engine.probe import check_fold, nesting, probe
from pyrovae.engine.programs import Program, protected_buffers
from pyrovae.engine.randomness import replayed_rng, rng_state
from pyrovae.engine.sites import PARTICLE_PLATE, ParticlePlate, Record, Sites
from pyrovae.engine.unwrap import point_mass


def fold_arguments(args: tuple, kwargs: dict, num_particles: int) -> tuple[tuple, dict]:
    """Repeat every argument that has the data along its first axis, particles major."""
    size = next((a.shape[0] for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim() > 0), None)

    def repeat(a: Any) -> Any:
        if isinstance(a, Tensor) and a.dim() > 0 and a.shape[0] == size:
            return a.repeat(num_particles, *[1] * (a.dim() - 1))
        return a

    return tuple(map(repeat, args)), {k: repeat(v) for k, v in kwargs.items()}


@contextmanager
def _shape_hint(num_particles: int) -> Iterator[None]:
    """With one particle the pair ran; where it fails with several, its networks are the likely reason."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        error.add_note(
            f"with {num_particles} particles, networks see leading dimensions [K, B, ...]: "
            "let them take any, or pass fold_particles=True"
        )
        raise


def run(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    *,
    num_particles: int = 1,
    nesting: int = 0,
    fold: bool = False,
    copies: Copies = None,
    rerun: bool = False,
    scaled: bool = True,
) -> Particles:
    """Run guide, then model on its samples, with ``num_particles`` particles to the left of ``nesting`` plates.

    With ``copies`` the model runs on copies of the samples, "detached" or "live", kept in ``Particles.copies``.
    ``rerun`` keeps what :meth:`Particles.log_guide_fixed` needs. With ``fold`` the particles are folded into the batch
    instead of a plate. With ``scaled=False`` every scale is ignored.
    """
    fold, particle_dim = fold and num_particles > 1, None
    if fold:
        args, kwargs = fold_arguments(args, kwargs, num_particles)
    elif num_particles > 1:
        particle_dim = -1 - nesting

    def execute(program: Program, record: Record) -> Sites:
        with record:
            if particle_dim is None:
                program(*args, **kwargs)
            else:
                with _shape_hint(num_particles), ParticlePlate(PARTICLE_PLATE, num_particles, dim=particle_dim):
                    program(*args, **kwargs)
        return record.sites

    with pyro.validation_enabled(False):
        states: Any = rng_state() if rerun else None
        guide_sites = execute(guide, Record())
        values = {n: s["value"] for n, s in guide_sites.items() if not s["is_observed"]}
        copied = {n: v for n, v in values.items() if copies and getattr(v, "requires_grad", False)}
        copied = {n: v.view_as(v) if copies == "live" else v.detach().requires_grad_() for n, v in copied.items()}
        model_sites = execute(model, Record(values | copied))

    def rerun_guide() -> Sites:
        moving = (n for n in values if not isinstance(point_mass(guide_sites[n]["fn"]), Delta))
        fixed = {n: values[n].detach() if isinstance(values[n], Tensor) else values[n] for n in moving}
        with pyro.validation_enabled(False), replayed_rng(*states), protected_buffers():
            return execute(guide, Record(fixed, redraw=True))

    return Particles(guide_sites, model_sites, num_particles, particle_dim, fold, scaled, copied, rerun_guide)


def combine(
    log_likelihood: Tensor | None,
    log_prior: Tensor | None,
    log_guide: Tensor | None,
    kl_weight: Any,
    likelihood_weight: Any,
) -> Tensor:
    """likelihood_weight * log p(x | z) + kl_weight * (log p(z) - log q(z | x)), each part optional."""
    kl = None
    if not (isinstance(kl_weight, int | float) and kl_weight == 0):
        kl = log_prior if log_guide is None else -log_guide if log_prior is None else log_prior - log_guide
    weighted = [
        part if isinstance(weight, int | float) and weight == 1 else part * weight
        for part, weight in ((log_likelihood, likelihood_weight), (kl, kl_weight))
        if part is not None and not (isinstance(weight, int | float) and weight == 0)
    ]
    if not weighted:
        some = next(part for part in (log_likelihood, log_prior, log_guide) if part is not None)
        return torch.zeros_like(some)
    return weighted[0] if len(weighted) == 1 else weighted[0] + weighted[1]


def log_weights(
    model: Program, guide: Program, *args: Any, num_particles: int = 1, fold_particles: bool = False, **kwargs: Any
) -> Tensor:
    r"""The importance log-weights :math:`\log p(x_b, z_{kb}) - \log q(z_{kb} \mid x_b)`, ``[K, B]`` in nats.

    Scales (subsampling, ``poutine.scale``) are ignored, masked sites count as zero, and the train/eval mode is left as
    it is. A pair whose latents lie outside the data plate has joint weights, ``[K]``. The result carries gradients
    unless called under ``torch.no_grad()``.

    :param num_particles: K, the number of draws from the guide.
    :param fold_particles: fold the particles into the batch, for networks that take one batch dimension only.
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
    checked = probe(model, guide, args, kwargs)
    check_fold(checked, fold_particles)
    return measure(
        run(
            model,
            guide,
            args,
            kwargs,
            num_particles=positive_int("num_particles", num_particles),
            nesting=nesting(checked),
            fold=fold_particles,
            scaled=False,
        )
    )


def measure(particles: Particles, kl_weight: Any = 1.0, likelihood_weight: Any = 1.0) -> Tensor:
    """The log-weights of a run, ``[K, *plates]``."""
    parts = particles.log_likelihood(), particles.log_prior(), particles.log_guide()
    return combine(*parts, kl_weight, likelihood_weight)
