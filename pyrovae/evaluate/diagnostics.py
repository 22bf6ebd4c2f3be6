r"""Is the latent space in use? Active units of any guide."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta
from torch import Tensor

from pyrovae import data as datasets
from pyrovae.arguments import in_range
from pyrovae.programs import Program, evaluating, isolated_rng, roots
from pyrovae.sites import Record, Site, frames, latent, point_mass

_DRAWS = 64  # where a site's mean is not known in closed form


class ActiveUnits(NamedTuple):
    """Variance over data of a site's posterior mean, shaped like its event, and how many exceed the threshold."""

    variances: Tensor
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs here


def active_units(
    guide: Program, data: Any, threshold: float = 0.01, *, batch_size: int = 500
) -> dict[str, ActiveUnits]:
    r"""Units of each latent site whose posterior mean varies over the data.

    .. math:: A_u = \operatorname{Var}_x \big( \mathbb E_{q(z \mid x)}[z_u] \big) > 0.01

    The mean is the site's own given its parents at one draw (for a second layer: its mean at one sampled first layer);
    where a distribution has no closed-form mean, or is a Delta that transforms another draw, the mean of 64 draws.

    :param data: a tensor, Dataset, DataLoader or tuple of tensors, as the guide takes them.
    :param threshold: on the variance, in squared units of the latent.
    :return: ``{site: (variances, count)}`` for every site of the guide that lies in a data plate, auxiliary ones aside.

    >>> import pyro, pyro.distributions as dist
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(torch.stack([x, 0 * x], -1), 1.0).to_event(1))
    >>> active_units(guide, torch.linspace(-1, 1, 100))["z"].count
    1

    Burda, Grosse, Salakhutdinov (2016), *Importance weighted autoencoders*, section 5.2.
    """
    threshold = in_range("threshold", threshold, 0.0)
    source = datasets.as_dataset(data)
    device = next((p.device for module in roots(guide) for p in module.parameters()), None)
    means: dict[str, list[Tensor]] = {}
    size = 0
    with torch.no_grad(), isolated_rng(0), evaluating(guide):
        for batch in datasets.batches((source,), batch_size, device=device):
            size += len(batch[0])
            for name, mean in posterior_means(guide, batch).items():
                means.setdefault(name, []).append(mean.double())
    if size < 2:
        raise datasets.DataError(f"a variance over data needs two of them at least, got {size}: pass more")
    variances = {name: torch.cat(parts).var(0) for name, parts in means.items()}
    return {name: ActiveUnits(v, int((v > threshold).sum())) for name, v in variances.items()}


def posterior_means(guide: Program, batch: tuple[Any, ...]) -> dict[str, Tensor]:
    """The mean of each latent site over the guide, ``[B, *other plates, *event]``; see :func:`active_units`."""
    sites = _record(guide, batch)
    auxiliary = any(site["infer"].get("is_auxiliary") for site in sites.values())
    means = {name: _closed_form_mean(site, auxiliary) for name, site in sites.items() if _per_datum(site)}
    unknown = [name for name, mean in means.items() if mean is None]
    if unknown:
        draws = [sites, *(_record(guide, batch) for _ in range(_DRAWS - 1))]
        means |= {name: torch.stack([d[name]["value"].double() for d in draws]).mean(0) for name in unknown}
    return {name: mean.movedim(-1 - len(sites[name]["fn"].event_shape), 0) for name, mean in means.items()}  # type: ignore[union-attr]


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
