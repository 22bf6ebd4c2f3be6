r"""Where the bound is lost: the guide's gap, its split by refinement per datum, and the signal of a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae.arguments import positive_int
from pyrovae.engine.probe import checked_look
from pyrovae.engine.programs import Program, graph_leaves
from pyrovae.engine.runner import log_weights
from pyrovae.engine.sites import Sites, counted, latent, log_prob, proposed, record
from pyrovae.engine.weights import log_mean_exp
from pyrovae.engine.whole import refuse_part
from pyrovae.evaluate.measuring import Batches, RunningMean, measuring
from pyrovae.evaluate.proposals import refine
from pyrovae.objectives.base import Objective


class PosteriorGap(NamedTuple):
    r"""What the guide costs, in nats per datum (in all, for joint weights).

    ``iwae`` is :math:`L_K`, ``log_p`` is :math:`\log \hat p`, ``gap`` their difference, the lectures'
    :math:`-\mathrm{KL}(Q \| P)`; where refinement was asked for, ``elbo`` and ``refined_elbo`` split log p - ELBO into
    ``amortisation`` = refined ELBO - ELBO, which the encoder loses, and ``approximation`` = log p - refined ELBO, which
    the family of the guide loses.
    """

    iwae: float
    log_p: float
    num_particles: int
    num_samples: int
    elbo: float
    refined_elbo: float | None = None

    @property
    def gap(self) -> float:
        return self.iwae - self.log_p

    @property
    def amortisation(self) -> float | None:
        return None if self.refined_elbo is None else self.refined_elbo - self.elbo

    @property
    def approximation(self) -> float | None:
        return None if self.refined_elbo is None else self.log_p - self.refined_elbo


def posterior_gap(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 64,
    num_samples: int = 5000,
    refine_steps: int = 0,
    batch_size: int | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> PosteriorGap:
    r"""The distance of the guide from the posterior: IWAE-64, log p-hat, and -KL(Q||P) as Rainforth et al. report it.

    .. math:: \Delta = L_{64} - \log \hat p, \qquad L_{64} = \mathbb E \log \tfrac1{64} \textstyle\sum_k w_k,
              \quad \log \hat p = L_{5000}

    All come from one set of draws: :math:`L_{64}` and the ELBO are means over its groups. With ``refine_steps`` the
    guide is refined for each datum (:func:`refine`), and its gap split in two (Cremer et al.).

    :param args: data as :func:`pyrovae.log_likelihood` takes them.
    :param num_particles: K of the first bound.
    :param num_samples: of log p-hat.
    :param refine_steps: of gradient, per datum; 0 for no split.
    :param batch_size: data at a time; None takes 100, or all together for a pair whose weights are joint.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
    >>> abs(posterior_gap(model, guide, torch.randn(10), num_samples=640).gap) < 1e-5  # the guide is the posterior
    True

    Rainforth et al. (2018), *Tighter variational bounds are not necessarily better*; Cremer, Li and Duvenaud (2018),
    *Inference suboptimality in variational autoencoders*.
    """
    num_particles = positive_int("num_particles", num_particles)
    num_samples = positive_int("num_samples", num_samples, minimum=num_particles)
    sizes = [min(num_particles, num_samples - begun) for begun in range(0, num_samples, num_particles)]
    sums, number = torch.zeros(4, dtype=torch.float64), 0
    data = Batches(model, guide, args, kwargs, batch_size, default=100, seed=seed)
    with data:
        for batch in data:
            refuse_part(data.seen)
            groups = [log_weights(model, guide, *batch, num_particles=k, **kwargs).double() for k in sizes]
            bounds = torch.stack([log_mean_exp(group) for group in groups if len(group) == num_particles])
            every = torch.cat(groups)  # with what is left over, which counts towards log p-hat alone
            better = torch.zeros_like(every[0])
            if refine_steps:
                refined = refine(model, guide, *batch, steps=refine_steps, **kwargs)
                better = log_weights(model, refined, *batch, num_particles=256, **kwargs).mean(0)
            values = bounds.mean(0), log_mean_exp(every), every.mean(0), better
            sums += torch.stack([v.double().sum().cpu() for v in values])
            number += every[0].numel()
    iwae, log_p, elbo, refined_elbo = (sums / number).tolist()
    return PosteriorGap(iwae, log_p, num_particles, num_samples, elbo, refined_elbo if refine_steps else None)


class GradientSNR(NamedTuple):
    """Signal-to-noise ratios of a gradient: root mean square over all elements of a program's parameters."""

    model: float
    guide: float


def gradient_snr(
    objective: Objective,
    model: Program,
    guide: Program,
    *args: Any,
    repetitions: int = 200,
    seed: int = 0,
    **kwargs: Any,
) -> GradientSNR:
    r"""The signal-to-noise ratio of an objective's gradient, for the model's and for the guide's parameters.

    .. math:: \mathrm{SNR}^2 = \operatorname{mean}_i \frac{(\mathbb E\, \hat g_i)^2}{\operatorname{var} \hat g_i}

    over the noise of the particles, the batch held fixed; the square of each mean is estimated without the bias that
    its own noise adds. Tighter bounds are no better if the guide's ratio falls: with K particles it falls as
    :math:`K^{-1/2}` for IWAE, while the model's rises as :math:`K^{1/2}`, and so does the guide's with
    ``gradient="dreg"``.

    :param repetitions: independent gradients, R; ratios below :math:`R^{-1/2}` drown in noise.
    :return: NaN for a program without parameters, 0 where no signal is left.

    >>> import pyro, pyro.distributions as dist, pyrovae as pv
    >>> m = torch.tensor(0.2, requires_grad=True)
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(m * x, 0.8))
    >>> x = torch.ones(1)
    >>> few, many = (gradient_snr(pv.IWAE(k), model, guide, x, repetitions=500).guide for k in (1, 64))
    >>> few > many
    True

    Rainforth et al. (2018), *Tighter variational bounds are not necessarily better*.
    """
    repetitions = positive_int("repetitions", repetitions, minimum=2)
    with measuring(model, guide, seed=seed), torch.enable_grad():
        checked_look(model, guide, args, kwargs)
        drawn = record(guide, args, kwargs)
        values = {name: site["value"] for name, site in latent(drawn).items()}
        fixed = {name: value.detach() if isinstance(value, Tensor) else value for name, value in values.items()}
        joint = record(model, args, kwargs, fixed)
        of_guide = leaves(proposed(drawn, joint), values.values(), in_guide=True)
        known = {id(p) for p in of_guide}
        of_model = [p for p in leaves(joint) if id(p) not in known]
        parameters = [*of_model, *of_guide]
        if not parameters:
            raise ValueError("the pair has no parameters: there is no gradient to measure")
        means = [RunningMean() for _ in parameters]
        for _ in range(repetitions):
            loss = objective.differentiable_loss(model, guide, *args, **kwargs)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            for mean, gradient in zip(means, gradients, strict=True):
                mean.add(gradient)
    number = len(of_model)
    return GradientSNR(root_mean_square_snr(means[:number]), root_mean_square_snr(means[number:]))


def root_mean_square_snr(means: list[RunningMean]) -> float:
    """The root of the mean squared ratio over all elements that are random; NaN where there is none."""
    ratios = ((m.variance, (m.mean.square() - m.noise) / m.variance) for m in means)
    parts = [torch.where(variance > 0, ratio, math.nan).flatten() for variance, ratio in ratios]
    return torch.cat(parts).nanmean().clamp(min=0).sqrt().item() if parts else math.nan


def leaves(sites: Sites, draws: Iterable[Tensor] = (), *, in_guide: bool = False) -> list[Tensor]:
    """The parameters that the densities of a run, and these of its draws, depend on."""
    terms = [*(log_prob(s, in_guide=in_guide).sum() for s in counted(sites)), *(draw.sum() for draw in draws)]
    live = [t for t in terms if t.requires_grad]
    return graph_leaves(torch.stack(live).sum()) if live else []
