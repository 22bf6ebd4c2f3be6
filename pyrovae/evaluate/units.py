r"""What each latent unit carries: active units of any guide, KL, mutual information with the data."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta
from torch import Tensor

from pyrovae import data as datasets
from pyrovae.arguments import in_range, positive_int
from pyrovae.compile.checked import tensors
from pyrovae.engine.convert import exactly
from pyrovae.engine.kl import kl_in_place, sides
from pyrovae.engine.programs import Batch, Program, cut, rows
from pyrovae.engine.runner import Runner
from pyrovae.engine.sites import Sites, frames, latent, masked, record
from pyrovae.engine.support import first_outside
from pyrovae.engine.unwrap import finite_mean, point_mass
from pyrovae.errors import NumericalError
from pyrovae.evaluate.measuring import Batches, RunningMean, measuring
from pyrovae.evaluate.sharing import shared_rows

DRAWS = 64  # where a site's mean is not known in closed form
SEED = 52_016  # not one from which data are drawn as well, whose noise the draws would then repeat
CELLS = 2**24  # densities held at a time


class ActiveUnits(NamedTuple):
    """Variance over data of a site's posterior mean, shaped like its event, and how many exceed the threshold."""

    variances: Tensor
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs here


def active_units(
    guide: Program, data: Any, threshold: float = 0.01, *, samples: int = 1, batch_size: int | None = None
) -> dict[str, ActiveUnits]:
    r"""Units of each latent site whose posterior mean varies over the data.

    .. math:: A_u = \operatorname{Var}_x \big( \mathbb E_{q(z \mid x)}[z_u] \big) > 0.01

    The mean is the site's own given its parents, at ``samples`` draws of them. For a second layer there are two
    definitions in use, and they differ by what the draw of the first one adds:

    .. math:: \text{samples} = 1: \; \operatorname{Var} \big( \mathbb E[z_{2u} \mid z_1] \big),
              \; z_1 \sim q(z_1 \mid x); \qquad \text{samples} \to \infty: \;
              \operatorname{Var}_x \big( \mathbb E_{q(z_1 \mid x)} \mathbb E[z_{2u} \mid z_1] \big)

    The first is what the IWAE paper's code does, the second what the paper says. With several draws the variance that
    is left in their average is subtracted, so that any number is right in the mean; more make it less noisy. Where a
    distribution has no closed-form mean, or is a Delta that transforms another draw, draws of the site stand in for it,
    at least 64.

    :param data: a tensor, Dataset, DataLoader or tuple, as the guide takes them; what is not as long as the first
        tensor of a tuple is passed as it is.
    :param threshold: on the variance, in squared units of the latent.
    :param samples: draws of the parents to average over.
    :param batch_size: data at a time; None takes 500, or all together where the guide has latents that data share.
    :return: ``{site: (variances, count)}`` for every site of the guide that lies in a data plate, auxiliary ones aside.

    >>> import pyro, pyro.distributions as dist
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(torch.stack([x, 0 * x], -1), 1.0).to_event(1))
    ...         pyro.sample("top", dist.Normal(h, 1.0).to_event(1))
    >>> x = torch.linspace(-1, 1, 100)
    >>> [active_units(guide, x, threshold=0.2, samples=s)["top"].count for s in (1, 100)]
    [2, 1]

    Burda, Grosse, Salakhutdinov (2016), *Importance weighted autoencoders*, section 5.2.
    """
    threshold, samples = in_range("threshold", threshold, 0.0), positive_int("samples", samples)
    lengths = {len(a) for a in data if isinstance(a, Tensor) and a.dim()} if isinstance(data, tuple) else set()
    args = data if len(lengths) > 1 else (datasets.as_dataset(exactly(data), raw=True),)
    batches = Batches(guide, None, args, {}, batch_size, default=500)
    means: dict[str, list[Tensor]] = {}
    noise: dict[str, Tensor] = {}
    size = 0
    with measuring(guide, seed=SEED), batches:
        for batch in batches:
            for name, average in mean_draws(guide, batch, samples).items():
                bad = first_outside(average.mean)
                if bad is not None:
                    fine = all(a.isfinite().all() for a in tensors(cut(batch, [bad[0]])))
                    raise (NumericalError if fine else datasets.DataError)(
                        f'the posterior mean of site "{name}" at data[{size + bad[0]}] is {average.mean[bad]:g}: data '
                        "and parameters must be finite; drop or replace such data"
                    )
                means.setdefault(name, []).append(average.mean)
                noise[name] = noise.get(name, 0.0) + average.noise.sum(0)
            size += rows(batch)
    if size < 2:
        raise datasets.DataError(f"a variance over data needs two of them at least, got {size}: pass more")
    variances = {name: torch.cat(parts).var(0) - noise[name] / size for name, parts in means.items()}
    return {name: ActiveUnits(v, int((v > threshold).sum())) for name, v in variances.items()}


def mean_draws(
    guide: Program, batch: Batch, samples: int = 1, *, first: Sites | None = None, draws: int = DRAWS
) -> dict[str, RunningMean]:
    """By latent site the average of its means over draws, ``[B, *other plates, *event]``; see :func:`active_units`.

    :param first: the sites of a run of the guide that was made already.
    :param draws: of sites whose mean has no closed form.
    """
    sites = latent(record(guide, batch, {}) if first is None else first)
    auxiliary = {name for name, site in sites.items() if site["infer"].get("is_auxiliary")}
    data = -1, rows(batch)  # dim and size of the plate of data
    names = [n for n in sites if n not in auxiliary and any(plate[1:] == data for plate in frames(sites[n]))]
    # the mean of a Delta that transforms another draw is not the site's own
    moved = [name for name in names if auxiliary and isinstance(point_mass(sites[name]["fn"]), Delta)]
    unknown = [name for name in names if name in moved or finite_mean(sites[name]["fn"]) is None]
    averages = {name: RunningMean() for name in names}
    for draw in range(max(samples, draws) if unknown else samples):
        sites = latent(record(guide, batch, {})) if draw else sites
        for name in names if draw < samples else unknown:
            value, fn = sites[name]["value"], sites[name]["fn"]
            averages[name].add((value if name in unknown else fn.mean).movedim(-1 - len(fn.event_shape), 0))
    return averages


class Information(NamedTuple):
    """Of one latent site, nats per unit (one entry where the units are not independent), each ``[units]``.

    ``mutual_information`` is at most log N of the N data it was measured on. ``aggregate_kl`` compares the aggregate
    posterior with the prior; of a site whose prior depends on other latents it says nothing.
    """

    kl: Tensor
    mutual_information: Tensor
    aggregate_kl: Tensor


def information(
    model: Program, guide: Program, *args: Any, num_data: int = 1000, seed: int = 0, **kwargs: Any
) -> dict[str, Information]:
    r"""Split the KL of every latent unit into what it knows of the data and how far its prior is off.

    .. math:: \underbrace{\mathbb E_x \mathrm{KL}(q(z_u \mid x) \| p(z_u))}_{\text{kl}}
              = \underbrace{I_q(x; z_u)}_{\text{mutual\_information}}
              + \underbrace{\mathrm{KL}(q(z_u) \| p(z_u))}_{\text{aggregate\_kl}}, \qquad
              q(z_u) = \tfrac1N \textstyle\sum_n q(z_u \mid x_n)

    A collapsed unit has neither; a unit with a KL but no information is a bad prior. The aggregate posterior is the
    mixture over the first ``num_data`` data, at one draw each, so that an estimate of the information has a standard
    error of about :math:`N^{-1/2}` nats.

    :param args: data as :func:`pyrovae.log_likelihood` takes them.
    :param num_data: N, how many of the data to use; no fewer than there are of data that share latents.
    :return: ``{site: Information}`` for every latent site in a data plate.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...         pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(torch.stack([0.9 * x, 0 * x + 1], -1), 0.3).to_event(1))
    >>> found = information(model, guide, torch.randn(500))["z"]
    >>> (found.mutual_information > 0.5).tolist()  # the second unit knows nothing, whatever its KL
    [True, False]

    Hoffman and Johnson (2016), *ELBO surgery: yet another way to carve up the variational evidence lower bound*.
    """
    num_data = positive_int("num_data", num_data, minimum=2)
    with Batches(model, guide, args, kwargs, num_data, seed=seed) as data:
        batch = next(iter(data))
        number = rows(batch, kwargs)
        if number < 2:
            raise datasets.DataError("information over data needs two of them at least: pass more")
        particles = Runner(model, guide)(batch, kwargs, scaled=False)
        found = {}
        for name in latent(particles.model):
            site = particles.guide[name]
            if site["fn"].batch_shape != (number,):
                continue  # shared by the data, or in further plates
            if point_mass(site["fn"]) is not None:
                raise ValueError(
                    f'information needs a density at each datum, but guide site "{name}" is a point mass, of which '
                    "any draw says all: take a guide that draws the site itself"
                )
            fn, mask, _ = sides(particles, name)[0]
            kl, value = kl_in_place(particles, name).double().mean(0), site["value"]
            own = fn.log_prob(value)
            counted = torch.as_tensor(mask, device=own.device).expand_as(own)
            share = (counted / counted.sum(0)).log()  # of each datum in the aggregate

            def mixture(some: slice, fn: Any = fn, value: Tensor = value, share: Tensor = share) -> Tensor:
                # every draw against every datum's density, the draws with an axis of their own in front
                parts = value[some].split(max(1, CELLS // share.numel()))
                return torch.cat([torch.logsumexp(fn.log_prob(part.unsqueeze(1)) + share, 1) for part in parts])

            mixed = shared_rows(number, mixture)
            info = masked(own - mixed, counted).double().mean(0).reshape(-1)
            found[name] = Information(kl, info, kl - info)
    return found
