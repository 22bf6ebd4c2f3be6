"""A Pyro model as a generator: sites drawn anew, observed, tempered."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.provenance import get_provenance
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.engine.auxiliary import Origins
from pyrovae.engine.devices import beside
from pyrovae.engine.places import Places, storage
from pyrovae.engine.programs import Batch, Program, protected_buffers
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.sites import (
    Record,
    Site,
    Sites,
    counts,
    latent,
    log_prob,
    observed,
    quoted,
    record,
    refuse_untraced,
)
from pyrovae.engine.unwrap import finite_mean, point_mass


def program_of(model: Any) -> Program:
    """The model of a pair; any other program is the model itself."""
    return model.model if callable(getattr(model, "model", None)) and hasattr(model, "guide") else model


class Redraw(Messenger):
    """Draw, instead of observing, the sites named and every site whose observation is ``x`` or a view of it.

    Latents are drawn at the temperature given.

    :ivar names: the sites that drew, with what each would have observed.
    """

    def __init__(
        self, x: Tensor, site: str | None = None, temperature: float = 1.0, others: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.x, self.site, self.temperature, self.others = x, site, temperature, others
        self.names: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self.names = {}
        return super().__enter__()

    @property
    def whole(self) -> bool:
        """Whether several sites have drawn each row of x, or parts of it."""
        return False

    def is_view(self, value: object) -> bool:
        """Whether an observation is x, or shares its memory."""
        return isinstance(value, Tensor) and storage(value) == storage(self.x)

    def _pyro_sample(self, msg: Site) -> None:  # type: ignore[override]
        named = msg["name"] == self.site or msg["name"] in self.others
        if msg["is_observed"] and (named or self.is_view(msg["value"])):
            self.names[msg["name"]] = msg["value"]
            msg["is_observed"], msg["value"] = False, None
        elif self.temperature != 1 and msg["value"] is None and counts(msg):
            msg["fn"] = tempered(msg["fn"], self.temperature, msg["name"])


class Written(Redraw):
    """Writes what is drawn where the site would observe it in ``x``, so that all that reads x later reads the draws.

    What a mask leaves out stays as it is.

    :param also: other tensors that sites observe.
    :ivar places: what each site observes of x or of these, by its name, with its distribution and its mask.
    """

    def __init__(
        self,
        x: Tensor,
        site: str | None = None,
        temperature: float = 1.0,
        others: Collection[str] = (),
        also: Iterable[Tensor] = (),
    ) -> None:
        super().__init__(x, site, temperature, others)
        self.within, self.places = Places((*also, x)), dict[str, tuple[Tensor, Any, Any]]()

    def __enter__(self) -> Self:
        self.places = {}
        self.within.__enter__()
        return super().__enter__()

    def is_view(self, value: object) -> bool:
        return self.within.root(value) is self.x

    def _pyro_post_sample(self, msg: Site) -> None:  # type: ignore[override]
        place = self.names.get(msg["name"])
        if not isinstance(place, Tensor) or self.within.root(place) is None:
            return
        if place.shape != msg["value"].shape or 0 in place.stride():
            return  # nothing of which x is made
        self.places[msg["name"]] = place, msg["fn"], msg["mask"]
        self.within.write(place, self.unmasked(msg["name"], msg["value"]))

    def unmasked(self, name: str, value: Tensor) -> Tensor:
        """A value for a place; where a mask leaves it out, what stands there."""
        place, fn, mask = self.places[name]
        if mask is None:
            return value
        return torch.where(torch.as_tensor(mask, device=place.device)[(..., *[None] * fn.event_dim)], value, place)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.within.__exit__(*error)

    @property
    def whole(self) -> bool:
        if len(self.places) < 2 or all(place.dim() and len(place) == len(self.x) for place, *_ in self.places.values()):
            return len(self.places) > 1
        drawn = self.x.clone()
        self.x.zero_()
        for place, *_ in self.places.values():
            self.within.write(place, torch.ones_like(place))
        found = self.x.reshape(len(self.x), -1).any(1).all()
        self.x.copy_(drawn)
        return bool(found)

    def rows(self, returns: str) -> Tensor:
        """All of x, its draws or means."""
        for name, (place, fn, _) in self.places.items() if returns == "means" else ():
            if (mean := finite_mean(fn)) is None:
                raise ValueError(f'{quoted(self.places)} have no finite means, or not all: ask for returns="draws"')
            self.within.write(place, self.unmasked(name, mean))
        return self.x.clone()


def tempered(fn: Any, temperature: float, name: str) -> Any:
    """The distribution of the site ``name`` at another temperature; one with a ``tempered`` method is asked for it."""
    if callable(own := getattr(fn, "tempered", None)):
        return own(temperature)
    if isinstance(fn, dist.Independent):
        return dist.Independent(tempered(fn.base_dist, temperature, name), fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        return dist.MaskedDistribution(tempered(fn.base_dist, temperature, name), fn._mask)
    if isinstance(fn, torch.distributions.TransformedDistribution):
        return dist.TransformedDistribution(tempered(fn.base_dist, temperature, name), fn.transforms)
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        component = tempered(fn.component_distribution, temperature, name)
        return dist.MixtureSameFamily(fn.mixture_distribution, component)
    for family, make in TEMPERED.items():
        if isinstance(fn, family):
            return make(fn, temperature)
    raise ValueError(
        f'site "{name}" is a {type(fn).__name__}, which has no temperature: leave temperature=1, or give the '
        "distribution a method tempered(temperature)"
    )


TEMPERED: dict[type, Callable[[Any, float], Any]] = {
    torch.distributions.Normal: lambda fn, t: dist.Normal(fn.loc, fn.scale * t),
    torch.distributions.MultivariateNormal: lambda fn, t: dist.MultivariateNormal(fn.loc, scale_tril=fn.scale_tril * t),
    torch.distributions.Bernoulli: lambda fn, t: dist.Bernoulli(logits=fn.logits / t),
    torch.distributions.Categorical: lambda fn, t: dist.Categorical(logits=fn.logits / t),
    torch.distributions.OneHotCategorical: lambda fn, t: dist.OneHotCategorical(logits=fn.logits / t),
    dist.Delta: lambda fn, t: fn,
}


def generate(program: Program, args: Batch, kwargs: Mapping[str, object], redraw: Redraw) -> tuple[Sites, Site]:
    """One run of the model, its data drawn: its sites, and the one that drew them (or that ``redraw`` names).

    Where several sites draw all of x together there is no such one.
    """
    sites = dreamt(program, args, kwargs, redraw)
    if redraw.site is None:
        if redraw.whole:
            return sites, {}
        redraw.site = observing_site(sites, redraw.names)
        if redraw.site not in redraw.names:  # it observes a copy of x, which is not followed: now known by its name
            return generate(program, args, kwargs, redraw)
    return sites, named(sites, redraw.site)


def dreamt(program: Program, args: Batch, kwargs: Mapping[str, object], redraw: Redraw) -> Sites:
    """The sites of one run of the model that draws what ``redraw`` says."""
    with beside(args, kwargs), Record() as record, redraw:
        try:
            program(*args, **kwargs)
        except NotImplementedError as error:
            last = next(reversed(redraw.names), next(reversed(record.sites), "the first"))
            raise ValueError(
                f'the model draws at site "{last}", or after it, from a distribution that has no sampler '
                f"({' '.join(str(error).split())}): give it one, or leave it observed"
            ) from error
    refuse_untraced(record.sites, "generate")
    return record.sites


def named(sites: Sites, name: str) -> Site:
    """One of a run's sites."""
    if name not in sites:
        known = quoted(name for name, found in sites.items() if counts(found))
        raise ValueError(f'the model has no site "{name}", but {known}: choose one of those')
    return sites[name]


def ties(run: Callable[[], Sites]) -> dict[str, frozenset[str]]:
    """The observed sites of a program, factors among them, that depend on its latents, and on which.

    :param run: runs the program, for its sites.
    """
    with torch.no_grad(), pyro.validation_enabled(False), isolated_rng(), protected_buffers(run), Origins({}):
        marked = observed(run())
    found = {name: get_provenance(log_prob(site)) for name, site in marked.items() if site["mask"] is not False}
    return {name: latents for name, latents in found.items() if latents}


def refuse_tied(program: Program, args: Batch, kwargs: Mapping[str, object], redrawn: Collection[str]) -> None:
    """Refuse a model that weighs its latents by more than the data that it draws at these sites, however it does."""
    tied = ties(run := partial(record, program, args, kwargs))
    with torch.no_grad(), pyro.validation_enabled(False), isolated_rng(), protected_buffers(program):
        one, other = run(), run()  # on other latents: what is written in place leaves no mark
    for name, site in observed(one).items():
        if name in redrawn or site["mask"] is False:
            continue
        if name in tied or not torch.equal(log_prob(site), log_prob(other[name])):
            raise ValueError(
                f'latents simulated with their data are no draws from the posterior here: site "{name}", a factor or '
                f"an observation that is not simulated, depends on {quoted(sorted(tied.get(name, latent(one))))}: "
                "take a model without it (for given data, ais_log_likelihood takes it as it is)"
            )


def observing_site(sites: Sites, redrawn: Iterable[str]) -> str:
    """The one site at which a run drew its data, or else observed any."""
    names = [*redrawn] or [name for name, site in observed(sites).items() if not point_mass(site["fn"])]
    if not names:
        raise ValueError(
            f"the model observes nothing (its sites: {quoted(sites)}): pass a model that has a site with obs=x, "
            "or name the site to return with site="
        )
    if len(names) > 1:
        raise ValueError(
            f"the model observes several sites, {quoted(names)}, that are no parts of x: name the one to return with "
            "site=, or several for a joint draw"
        )
    return names[0]
