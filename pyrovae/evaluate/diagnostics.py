r"""Is the latent space in use? Active units of any guide."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta
from torch import Tensor

from pyrovae import data as datasets
from pyrovae.arguments import in_range, positive_int
from pyrovae.programs import Program, device_of, evaluating, isolated_rng
from pyrovae.sites import Record, Site, frames, latent, point_mass

_DRAWS = 64  # where a site's mean is not known in closed form
_SEED = 52_016  # not one from which data are drawn as well, whose noise the draws would then repeat


class ActiveUnits(NamedTuple):
    """Variance over data of a site's posterior mean, shaped like its event, and how many exceed the threshold."""

    variances: Tensor
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs here


def active_units(
    guide: Program, data: Any, threshold: float = 0.01, *, samples: int = 1, batch_size: int = 500
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

    :param data: a tensor, Dataset, DataLoader or tuple of tensors, as the guide takes them.
    :param threshold: on the variance, in squared units of the latent.
    :param samples: draws of the parents to average over.
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
    source = datasets.as_dataset(data)
    device = device_of(guide)
    means: dict[str, list[Tensor]] = {}
    noise: dict[str, Any] = {}
    size = 0
    with torch.no_grad(), isolated_rng(_SEED), evaluating(guide):
        for batch in datasets.batches((source,), batch_size, device=device):
            size += len(batch[0])
            for name, average in _averages(guide, batch, samples).items():
                means.setdefault(name, []).append(average.mean)
                noise[name] = noise.get(name, 0.0) + average.noise().sum(0)
    if size < 2:
        raise datasets.DataError(f"a variance over data needs two of them at least, got {size}: pass more")
    variances = {name: torch.cat(parts).var(0) - noise[name] / size for name, parts in means.items()}
    return {name: ActiveUnits(v, int((v > threshold).sum())) for name, v in variances.items()}


def mean_variances(guide: Program, batch: tuple[Any, ...]) -> dict[str, Tensor]:
    """Of one batch what :func:`active_units` finds: by site, the variance over data of the posterior means."""
    averages = _averages(guide, batch, 1)
    return {name: average.mean.var(0) - average.noise().mean(0) for name, average in averages.items()}


def posterior_means(guide: Program, batch: tuple[Any, ...]) -> dict[str, Tensor]:
    """The mean of each latent site over the guide, ``[B, *other plates, *event]``; see :func:`active_units`."""
    return {name: average.mean for name, average in _averages(guide, batch, 1).items()}


class _Average:
    """A running mean over draws, in float64, and the variance that their scatter leaves in it (Welford 1962)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0

    def add(self, value: Tensor) -> None:
        value = value.double()
        self.count += 1
        step = value - self.mean
        self.mean = self.mean + step / self.count
        self.squares = self.squares + step * (value - self.mean)

    def noise(self) -> Tensor:
        return self.squares / max(self.count - 1, 1) / self.count


def _averages(guide: Program, batch: tuple[Any, ...], samples: int) -> dict[str, _Average]:
    """For each latent site the average of its means over ``samples`` draws, data first."""
    sites = _record(guide, batch)
    auxiliary = any(site["infer"].get("is_auxiliary") for site in sites.values())
    names = [name for name, site in sites.items() if _per_datum(site)]
    unknown = [name for name in names if _closed_form_mean(sites[name], auxiliary) is None]
    averages = {name: _Average() for name in names}
    for draw in range(max(samples, _DRAWS) if unknown else samples):
        sites = _record(guide, batch) if draw else sites
        for name in names if draw < samples else unknown:
            site = sites[name]
            value = site["value"] if name in unknown else site["fn"].mean
            averages[name].add(value.movedim(-1 - len(site["fn"].event_shape), 0))
    return averages


def _record(guide: Program, batch: tuple[Any, ...]) -> dict[str, Site]:
    with Record() as record:
        guide(*batch)
    return latent(record.sites)


def _per_datum(site: Site) -> bool:
    return not site["infer"].get("is_auxiliary") and any(dim == -1 for _, dim, _ in frames(site))


def _closed_form_mean(site: Site, auxiliary: bool) -> Tensor | None:
    if auxiliary and isinstance(point_mass(site["fn"]), Delta):
        return None
    try:
        mean = site["fn"].mean
    except (NotImplementedError, AttributeError):
        return None
    return mean if torch.isfinite(mean).all() else None
