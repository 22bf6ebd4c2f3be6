"""Generation: any Pyro model run without its observation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyrovae.arguments import in_range, one_of, positive_int, sizes
from pyrovae.data.feed import as_dataset
from pyrovae.engine.devices import home_of
from pyrovae.engine.generate import Written, generate, named, program_of
from pyrovae.engine.programs import Batch, Program, evaluating, held_by, roots
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.sites import Site
from pyrovae.engine.unwrap import finite_mean, innermost


@overload
def sample(
    model: Any,
    n: int,
    *args: Any,
    returns: str = ...,
    site: str | None = ...,
    temperature: float = ...,
    like: Any = ...,
    seed: int | None = ...,
    **kwargs: Any,
) -> Tensor: ...
@overload
def sample(
    model: Any,
    n: int,
    *args: Any,
    returns: str = ...,
    site: Sequence[str],
    temperature: float = ...,
    like: Any = ...,
    seed: int | None = ...,
    **kwargs: Any,
) -> dict[str, Tensor]: ...
def sample(
    model: Any,
    n: int,
    *args: Any,
    returns: str = "means",
    site: str | Sequence[str] | None = None,
    temperature: float = 1.0,
    like: Any = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Tensor | dict[str, Tensor]:
    r"""Generate ``n`` data from a model: run it on a blank ``x`` that sets the batch shape and is then not observed.

    .. math:: z_i \sim p(z), \qquad \text{returned: } \mathbb E[x \mid z_i] \text{ ("means") or }
              x_i \sim p(x \mid z_i) \text{ ("draws")}

    Means are what one looks at: the noise of single pixels, which the likelihood does not model well, is left out. They
    are less spread than data; use draws wherever the distribution of :math:`x` matters. Only the site that observes
    ``x`` is drawn: labels among ``args``, or what ``pyro.condition`` sets, stay as given. Where several sites observe
    parts of ``x`` (the columns of a table, the steps of a sequence), all of it is drawn jointly and comes back as the
    model takes it; a program that reads its own ``x[:, :t]`` on the way reads what was drawn, and what a mask leaves
    out (the steps beyond a length) is 0.

    Modules run in eval mode and get their own mode back. Where a plate subsamples, the model is run until there are
    ``n`` data; latents outside the plate are then drawn once per run.

    :param model: a pair (its ``.model`` is run), or any Pyro model whose first argument is ``x``.
    :param n: how many.
    :param args: what the model takes after ``x``, such as labels ``[n]``.
    :param returns: "means" or "draws".
    :param site: which site to return, latent ones too; several names give a joint draw of those sites, as a dict.
    :param temperature: of the latents: below 1 they keep to the prior's modes. Standard deviations of normal sites are
        multiplied by it, logits of discrete ones divided.
    :param like: data as the model takes them (a tensor ``[N, *event]``, a Dataset, ...), of which only the shape of a
        datum and the dtype are used; not needed where the model belongs to a module that has an ``input_shape``.
    :param seed: isolates and seeds the draws; None takes them from the global generators.
    :return: ``[n, *event]``, without gradient; for several names a dict of these.
    :raises ValueError: an argument outside its range; no ``like`` where it is needed; no site that observes ``x``, or
        several that observe copies of it; a distribution without a mean.

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
    >>> joint = sample(model, 1000, like=torch.zeros(1), site=("z", "x"), returns="draws", seed=0)
    >>> bool((joint["x"] - joint["z"]).abs().max() < 0.6)
    True
    """
    n = positive_int("n", n)
    one_of("returns", returns, ("means", "draws"))
    if in_range("temperature", temperature, 0.0) == 0:
        raise ValueError("temperature must be above 0, got 0: pass a small one")
    program = program_of(model)
    x = blank(program, n, like, args, kwargs)
    args = tuple(a.to(x.device) if isinstance(a, Tensor) else a for a in args)
    names = (site,) if isinstance(site, str) else tuple(site or ())
    redraw = Written(x, names[0] if names else None, temperature, names)
    parts: dict[str, list[Tensor]] = defaultdict(list)
    with torch.no_grad(), evaluating(program), nullcontext() if seed is None else isolated_rng(seed):
        while not parts or sum(map(len, next(iter(parts.values())))) < n:
            x.zero_()
            sites, found = generate(program, (x, *args), kwargs, redraw)
            if not found:
                return redraw.rows(returns)
            for name in names or (found["name"],):
                parts[name].append(rows_of(named(sites, name), returns))
    drawn = {name: torch.cat(each)[:n] for name, each in parts.items()}
    return next(iter(drawn.values())) if site is None or isinstance(site, str) else drawn


def blank(program: Program, n: int, like: object, args: Batch, kwargs: Mapping[str, object]) -> Tensor:
    """Zeros ``[n, *event]`` of the dtype and on the device that the model works with; ``args`` and more follow them."""
    modules = roots(program)
    parameter = next((tensor for tensor in held_by(program) if tensor.is_floating_point()), None)
    if like is None:
        shape = next((module.input_shape for module in modules if hasattr(module, "input_shape")), None)
        if shape is None:
            raise ValueError(
                "the shape of a datum is not known, as the model belongs to no module with an input_shape: "
                "pass like=, data as the model takes them, such as torch.zeros(1, 784)"
            )
        return (torch.empty(0) if parameter is None else parameter).new_zeros((n, *sizes("input_shape", shape)))
    if isinstance(like, Tensor):
        if not like.dim():
            raise ValueError("like must be data [N, *event], got a tensor without dimensions: pass like.unsqueeze(0)")
        example = like.new_empty(like.shape[1:])
    else:
        source = as_dataset(like)
        item = next(iter(source)) if isinstance(source, DataLoader) else source[0]
        first = item[0] if isinstance(item, tuple | list) else item
        if isinstance(first, Mapping):
            raise ValueError(
                "what is drawn must be the model's first argument, a tensor, got a dict: pass a function of it, "
                f"lambda x: model({{{next(iter(first), 'x')!r}: x}}), and such data as like="
            )
        x = torch.as_tensor(first)
        example = x[0] if isinstance(source, DataLoader) else x
    x = example.new_zeros((n, *example.shape))
    return x.to(home_of(program, args=(x, *args), kwargs=kwargs) or x.device)


def rows_of(site: Site, returns: str) -> Tensor:
    """A site's draws or means, a row for each datum."""
    name, value = site["name"], site["value"] if returns == "draws" else finite_mean(site["fn"])
    if value is None:
        kind = type(innermost(site["fn"])).__name__
        raise ValueError(f'site "{name}" is a {kind}, which has no finite mean: ask for returns="draws"')
    if not value.dim() or not len(value):
        raise ValueError(
            f'site "{name}" has shape {tuple(value.shape)}, no row for each datum: '
            'put it in the plate, as with pyro.plate("data", len(x))'
        )
    return value
