"""A Pyro model as a generator: sites drawn anew, observed, tempered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.engine.programs import Program
from pyrovae.engine.sites import Record, Sites, counts, quoted
from pyrovae.engine.unwrap import point_mass


def program_of(model: Any) -> Program:
    """The model of a pair; any other program is the model itself."""
    return model.model if callable(getattr(model, "model", None)) and hasattr(model, "guide") else model


class Redraw(Messenger):
    """Draw, instead of observing, the site named and every site whose observation is ``x`` or a view of it.

    Latents are drawn at the temperature given.
    """

    def __init__(self, x: Tensor, site: Any = None, temperature: float = 1.0) -> None:
        super().__init__()
        self.x, self.site, self.temperature = x, site, temperature
        self.names: list[str] = []

    def __enter__(self) -> Any:
        self.names = []
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and (msg["name"] == self.site or _share_memory(msg["value"], self.x)):
            msg["is_observed"], msg["value"] = False, None
            self.names.append(msg["name"])
        elif self.temperature != 1 and msg["value"] is None and counts(msg):
            msg["fn"] = tempered(msg["fn"], self.temperature, msg["name"])


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
    for family, make in _TEMPERED.items():
        if isinstance(fn, family):
            return make(fn, temperature)
    raise ValueError(
        f'site "{name}" is a {type(fn).__name__}, which has no temperature: leave temperature=1, or give the '
        "distribution a method tempered(temperature)"
    )


_TEMPERED: dict[type, Callable[[Any, float], Any]] = {
    torch.distributions.Normal: lambda fn, t: dist.Normal(fn.loc, fn.scale * t),
    torch.distributions.MultivariateNormal: lambda fn, t: dist.MultivariateNormal(fn.loc, scale_tril=fn.scale_tril * t),
    torch.distributions.Bernoulli: lambda fn, t: dist.Bernoulli(logits=fn.logits / t),
    torch.distributions.Categorical: lambda fn, t: dist.Categorical(logits=fn.logits / t),
    torch.distributions.OneHotCategorical: lambda fn, t: dist.OneHotCategorical(logits=fn.logits / t),
    dist.Delta: lambda fn, t: fn,
}


def _share_memory(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() != 0


def generate(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], redraw: Redraw) -> Sites:
    """One run of the model, its data drawn; ``redraw.site`` says at which site, unless it asks for one."""
    with Record() as record, redraw:
        program(*args, **kwargs)
    if redraw.site is None:
        redraw.site = _observing(record.sites, redraw.names)
        if redraw.site not in redraw.names:  # it observes a copy of x, as of x[index]: now known by its name
            return generate(program, args, kwargs, redraw)
    if redraw.site not in record.sites:
        known = quoted(name for name, found in record.sites.items() if counts(found))
        raise ValueError(f'the model has no site "{redraw.site}", but {known}: choose one of those')
    return record.sites


def _observing(sites: Sites, redrawn: list[str]) -> str:
    names = redrawn or [n for n, s in sites.items() if s["is_observed"] and counts(s) and not point_mass(s["fn"])]
    if not names:
        raise ValueError(
            f"the model observes nothing (its sites: {quoted(sites)}): pass a model that has a site with obs=x, "
            "or name the site to return with site="
        )
    if len(names) > 1:
        raise ValueError(f"the model observes several sites, {quoted(names)}: name the one to return with site=")
    return names[0]
