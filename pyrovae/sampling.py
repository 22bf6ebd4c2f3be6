"""Generation: any Pyro model run without its observation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils.data import DataLoader

from pyrovae.arguments import in_range, one_of, positive_int, sizes
from pyrovae.data import as_dataset
from pyrovae.programs import Program, evaluating, isolated_rng, roots
from pyrovae.sites import Record, Site, Sites, counts, point_mass, quoted

__all__ = ["sample"]


def sample(
    model: Any,
    n: int,
    *args: Any,
    returns: str = "means",
    site: str | None = None,
    temperature: float = 1.0,
    like: Any = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Tensor:
    r"""Generate ``n`` data from a model: run it on a blank ``x`` that sets the batch shape and is then not observed.

    .. math:: z_i \sim p(z), \qquad \text{returned: } \mathbb E[x \mid z_i] \text{ ("means") or }
              x_i \sim p(x \mid z_i) \text{ ("draws")}

    Means are what one looks at: the noise of single pixels, which the likelihood does not model well, is left out. They
    are less spread than data; use draws wherever the distribution of :math:`x` matters. Only the site that observes
    ``x`` is drawn: labels among ``args``, or what ``pyro.condition`` sets, stay as given.

    Modules run in eval mode and get their own mode back. Where a plate subsamples, the model is run until there are
    ``n`` data; latents outside the plate are then drawn once per run.

    :param model: a pair (its ``.model`` is run), or any Pyro model whose first argument is ``x``.
    :param n: how many.
    :param args: what the model takes after ``x``, such as labels ``[n]``.
    :param returns: "means" or "draws".
    :param site: which site to return; needed where the model observes several, allowed for latent ones.
    :param temperature: of the latents: below 1 they keep to the prior's modes. Standard deviations of normal sites are
        multiplied by it, logits of discrete ones divided.
    :param like: data as the model takes them (a tensor ``[N, *event]``, a Dataset, ...), of which only the shape of a
        datum and the dtype are used; not needed where the model belongs to a module that has an ``input_shape``.
    :param seed: isolates and seeds the draws; None takes them from the global generators.
    :return: ``[n, *event]``, without gradient.
    :raises ValueError: an argument outside its range; no ``like`` where it is needed; no site that observes ``x``, or
        several; a distribution without a mean.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 0.1), obs=x)
    >>> x = sample(model, 1000, like=torch.zeros(1), returns="draws", seed=0)
    >>> x.shape, bool((x.std() - 1.01**0.5).abs() < 0.1)
    (torch.Size([1000]), True)
    >>> sample(model, 3, like=torch.zeros(1), site="z", returns="draws").shape
    torch.Size([3])
    """
    n = positive_int("n", n)
    one_of("returns", returns, ("means", "draws"))
    if in_range("temperature", temperature, 0.0) == 0:
        raise ValueError("temperature must be above 0, got 0: pass a small one")
    program = program_of(model)
    x = blank(program, n, like)
    args = tuple(a.to(x.device) if isinstance(a, Tensor) else a for a in args)
    redraw = Redraw(x, site, temperature)
    parts: list[Tensor] = []
    with torch.no_grad(), evaluating(program), nullcontext() if seed is None else isolated_rng(seed):
        while sum(map(len, parts)) < n:
            found = generate(program, (x, *args), kwargs, redraw)[redraw.site]
            parts.append(_with_rows(found["value"] if returns == "draws" else _mean(found), found["name"]))
    return torch.cat(parts)[:n]


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


def blank(program: Program, n: int, like: Any) -> Tensor:
    """Zeros ``[n, *event]`` of the dtype and on the device that the model works with."""
    modules = roots(program)
    parameter = next((p for m in modules for p in m.parameters() if p.is_floating_point()), None)
    if like is not None:
        example = _example(like)
        device = example.device if parameter is None else parameter.device
        return example.new_zeros((n, *example.shape), device=device)
    for module in modules:
        if hasattr(module, "input_shape"):
            known = torch.empty(0) if parameter is None else parameter
            return known.new_zeros((n, *sizes("input_shape", module.input_shape)))
    raise ValueError(
        "the shape of a datum is not known, as the model belongs to no module with an input_shape: "
        "pass like=, data as the model takes them, such as torch.zeros(1, 784)"
    )


def _example(like: Any) -> Tensor:
    """One datum of ``like``, its labels aside."""
    if isinstance(like, Tensor):
        if not like.dim():
            raise ValueError("like must be data [N, *event], got a tensor without dimensions: pass like.unsqueeze(0)")
        return like.new_empty(like.shape[1:])
    source = as_dataset(like)
    item = next(iter(source)) if isinstance(source, DataLoader) else source[0]
    x = torch.as_tensor(item[0] if isinstance(item, tuple | list) else item)
    return x[0] if isinstance(source, DataLoader) else x


def _mean(site: Site) -> Tensor:
    try:
        mean = site["fn"].mean
    except (NotImplementedError, AttributeError):
        mean = None
    if mean is None or not torch.isfinite(mean).all():
        kind = type(_innermost(site["fn"])).__name__
        raise ValueError(f'site "{site["name"]}" is a {kind}, which has no finite mean: ask for returns="draws"')
    return mean


def _innermost(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _with_rows(value: Tensor, name: str) -> Tensor:
    if not value.dim() or not len(value):
        raise ValueError(
            f'site "{name}" has shape {tuple(value.shape)}, no row for each datum: '
            'put it in the plate, as with pyro.plate("data", len(x))'
        )
    return value
