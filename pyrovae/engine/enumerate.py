r"""Sites summed out: marked ``infer={"enumerate": "parallel"}`` in the model, and not drawn by the guide.

.. math:: \log p(z) = \log \sum_c p(z, c), \qquad \log p(x \mid z) = \log \sum_c p(x, z, c) - \log p(z)

Pyro's messenger gives every such site a dim of its own, left of particles and plates, and Pyro's tensor variable
elimination sums them out, plates inside of plates and chains of :func:`pyro.markov` among them. Sums are taken by
:func:`einsum`, in log space throughout, where a product of exponentials would underflow.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from operator import add, or_

import pyro
import torch
from opt_einsum import shared_intermediates
from pyro.ops import packed
from pyro.ops.contract import _partition_terms, contract_to_tensor
from pyro.ops.einsum.util import Tensordot
from pyro.ops.rings import LogRing
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from pyrovae.engine.marginal import Marginal
from pyrovae.engine.programs import Batch, Program
from pyrovae.engine.sites import Site, Sites, carriers, counted, depth, drawn, latent, log_prob, quoted, record
from pyrovae.engine.unwrap import unmasked
from pyrovae.errors import is_out_of_memory

# --- the run ---------------------------------------------------------------------------------------------------------


class Enumerate(EnumMessenger):
    """Gives sites that are marked and not replayed all their values at once, along a dim of their own."""

    def _pyro_sample(self, msg: Site) -> None:  # type: ignore[override]
        replayed, observed = msg["done"], msg["is_observed"]
        msg["done"], msg["is_observed"] = False, observed or replayed  # else it forgets what a replayed site hangs on
        super()._pyro_sample(msg)  # type: ignore[arg-type]
        msg["done"], msg["is_observed"] = msg["done"] or replayed, observed


def to_sum(model: Sites, guide: Sites) -> Sites:
    """A model's sites, with those that are to be summed out noted: marked for it, and not drawn by the guide."""
    undrawn = {name: site for name, site in latent(model).items() if name not in guide}
    return model | {name: {**site, "summed": True} for name, site in undrawn.items() if refusal(site) == ""}


def refusal(site: Site) -> str | None:
    """Why a site that is marked for enumeration cannot be summed out, or nothing; None of a site without a mark."""
    how, draws = site["infer"].get("enumerate"), site["infer"].get("num_samples")
    if how is None:
        return None
    if how != "parallel" or draws is not None:
        what = f'"{how}", which runs the model once for each value' if draws is None else "num_samples, which draws it"
        return f'is marked {what}: mark it infer={{"enumerate": "parallel"}} alone, by which it is summed out exactly'
    if not site["fn"].has_enumerate_support:
        return f"is marked for enumeration, but {type(site['fn']).__name__} does not list its values: draw it there"
    return ""


def record_sums(model: Program, args: Batch, kwargs: Mapping[str, object], guide: Sites, noted: Sites) -> Sites | None:
    """The model's sites of a run on the guide's draws, after the sums; None where there is nothing to sum.

    :param noted: of a run before, by :func:`to_sum`.
    """
    names = [name for name, site in noted.items() if site.get("summed")]
    if not names:
        return None
    first_dim = -1 - depth(guide, noted)
    try:
        with pyro.validation_enabled(False), Enumerate(first_dim):
            return summed_out(record(model, args, kwargs, drawn(guide)), first_dim)
    except (RuntimeError, TypeError, IndexError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"model sites {quoted(names)} are marked for enumeration, but the model fails on all their values at once "
            f"({type(error).__name__}: {' '.join(str(error).split())}): take what belongs to each value by indexing, "
            "as in means[c], without control flow, or sample them in the guide"
        ) from error


# --- sums in log space, for Pyro's contraction ------------------------------------------------------------------------


def transpose(a: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Axes in another order."""
    return a.permute(axes)


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """The log of a sum of products of exponentials."""
    inputs, output = equation.split("->")
    terms = list(zip(inputs.split(","), operands, strict=True))
    order = output + "".join(sorted({dim for dims, _ in terms for dim in dims} - set(output)))
    total = reduce(add, (aligned(dims, term, order) for dims, term in terms))
    if summed := tuple(range(len(output), len(order))):
        return log_sum_exp(total, summed)
    return total.clone() if len(terms) == 1 else total  # a new tensor, which gets dims of its own


tensordot = Tensordot(einsum)


def aligned(dims: str, term: Tensor, order: str) -> Tensor:
    """A term with an axis for each of ``order``, of size 1 where it has none."""
    term = term.permute([dims.index(dim) for dim in order if dim in dims])
    return term[tuple(slice(None) if dim in dims else None for dim in order)]


def log_sum_exp(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """As torch's, but without NaN among the derivatives where all is -inf."""
    finite = torch.finfo(x.dtype)
    top = x.detach().amax(dims, keepdim=True).clamp(finite.min, finite.max)
    total = (x - top).exp().sum(dims)
    dead = total == 0
    return torch.where(dead, -torch.inf, torch.where(dead, 1.0, total).log() + top.squeeze(dims))


class LogSums(LogRing):
    """Pyro's ring of sums in log space, by :func:`einsum`."""

    _backend = __name__


# --- what is left ----------------------------------------------------------------------------------------------------


@dataclass
class Sum:
    """Sites that hang together by what is summed out.

    :ivar terms: their log-probabilities, packed as Pyro does it: a symbol for each axis.
    :ivar dims: the symbols of what is summed out.
    :ivar plates: around each site, by symbol, with their sizes.
    :ivar run: all sites, which know the plates by name and the dims by symbol.
    :ivar exact: whether sums are taken in float64.
    """

    sites: Sites
    terms: dict[str, Tensor]
    dims: set[str]
    run: Trace
    exact: bool

    def __post_init__(self) -> None:
        symbols = self.run.plate_to_symbol
        self.plates = {
            name: {symbols[f.name]: f.size for f in site["cond_indep_stack"] if f.vectorized}
            for name, site in self.sites.items()
        }
        self.common = frozenset.intersection(*map(frozenset, self.plates.values()))
        self.ring = LogSums(dim_to_size=self.sizes)
        self.factors = {name: in_double(term) if self.exact else term for name, term in self.terms.items()}

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of all plates, by symbol."""
        return {symbol: size for around in self.plates.values() for symbol, size in around.items()}

    @property
    def enumerated(self) -> list[str]:
        """The names of what is summed out."""
        return [name for name, site in self.sites.items() if is_enumerated(site)]

    @property
    def prior(self) -> list[str]:
        """The names of what counts as prior: point masses that carry a part of it, then the latents in order."""
        rest = {name: site for name, site in self.sites.items() if not is_enumerated(site)}
        return [*carriers(rest), *latent(rest)]

    def tree(self, factors: Mapping[str, Tensor]) -> OrderedDict[frozenset[str], list[Tensor]]:
        """Factors by the plates around them, as Pyro takes them."""
        found: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for name, factor in factors.items():
            found.setdefault(frozenset(self.plates[name]), []).append(factor)
        return found

    def over(self, names: Collection[str]) -> Tensor:
        """The log of the sum of the product of these sites' densities, ``[particles, *common plates]``."""
        tree = self.tree({name: factor for name, factor in self.factors.items() if name in names})
        try:
            with shared_intermediates(self.ring._cache):
                found = contract_to_tensor(tree, self.dims, target_ordinal=self.common, ring=self.ring)
        except NotImplementedError as error:
            meant = str(error).partition("[")[2].partition("]")[0].split(", ")
            plates = [name for name, symbol in self.run.plate_to_symbol.items() if symbol in meant]
            raise ValueError(
                f"sites {quoted(self.enumerated)} hang together across plates {quoted(plates)}, of which none lies in "
                "the other, so that their sum has exponentially many terms: make one of them sequential "
                "(for i in pyro.plate(...)), or sample some of the sites in the guide"
            ) from error
        dtype = reduce(torch.promote_types, (term.dtype for term in self.terms.values()))
        return packed.unpack(found, self.run.symbol_to_dim).to(dtype)

    def given(self, name: str) -> Tensor:
        """The log-probability of a latent given those before it."""
        before = self.prior[: self.prior.index(name)]
        joint = self.over([*self.enumerated, *before, name])
        return quotient(joint, self.over([*self.enumerated, *before])) if before else joint

    def left(self) -> Sites:
        """The sites as they are then: one of the latents has log p(z), and one of the data log p(x | z)."""
        enumerated, prior = self.enumerated, self.prior
        data = [name for name in self.sites if name not in (*enumerated, *prior)]
        log_prior = self.over([*enumerated, *prior]) if prior else None
        shares = dict.fromkeys(prior, log_prior)
        if data:
            joint = self.over(list(self.sites))
            shares |= dict.fromkeys(data, joint if log_prior is None else quotient(joint, log_prior))
        found = {name: {**self.sites[name], "summed": True, "sum": enumerated} for name in enumerated}
        for name, share in shares.items():
            assert share is not None
            fn = Marginal(self.sites[name]["fn"], share, partial(self.given, name))
            own: Site = {"fn": fn, "mask": None, "args": (), "kwargs": {}, "sum": enumerated}
            found[name] = {**self.sites[name], **own, "absorbed": name not in (*prior[-1:], *data[:1])}
        return found


def summed_out(sites: Sites, first_dim: int, *, exact: bool = False) -> Sites:
    """The sites of a run inside of :class:`Enumerate`, after the sums.

    What hangs on an enumerated site becomes a :class:`Marginal`. All names and plates stay.
    """
    return reduce(or_, (each.left() for each in sums(sites, first_dim, exact=exact)), sites)


def sums(sites: Sites, first_dim: int, *, exact: bool = False) -> Iterator[Sum]:
    """What is summed out of the sites of a run inside of :class:`Enumerate`.

    :param first_dim: the first of the enumerated dims.
    :param exact: in float64.
    """
    if not any(map(is_enumerated, sites.values())):
        return
    run = Trace()
    run.nodes.update(sites)  # type: ignore[arg-type]
    run.symbolize_dims()
    dims = {site["infer"]["_enumerate_symbol"] for site in sites.values() if is_enumerated(site)}
    meant = [site for site in counted(sites) if is_enumerated(site) or hangs_on(site, first_dim)]
    terms = {site["name"]: packed_term(site) for site in meant}
    names = {id(term): name for name, term in terms.items()}
    for parts, own in _partition_terms(None, list(terms.values()), dims):
        members = {names[id(part)] for part in parts}
        each = {name: term for name, term in terms.items() if name in members}
        yield Sum({name: sites[name] for name in each}, each, own, run, exact)


def is_enumerated(site: Site) -> bool:
    """Whether a site has all its values at once."""
    return "_enumerate_dim" in site["infer"]


def hangs_on(site: Site, first_dim: int) -> bool:
    """Whether a site has one of its values for each value of an enumerated one."""
    value, mask = site["value"], site["mask"]
    batch = value.shape[: value.dim() - site["fn"].event_dim]
    shapes = batch, site["fn"].batch_shape, mask.shape if isinstance(mask, Tensor) else ()
    return any(size > 1 for shape in shapes for size in shape[: max(0, len(shape) + first_dim + 1)])


def packed_term(site: Site) -> Tensor:
    """The log-probability of a site, packed; that of an enumerated one without masks, so that it sums to 1."""
    if is_enumerated(site):
        refuse_short_memory(site)
        site = {**site, "mask": None, "fn": unmasked(site["fn"])}
    try:
        return packed.pack(log_prob(site), site["infer"]["_dim_to_symbol"])
    except ValueError as error:
        raise ValueError(
            f'model site "{site["name"]}" has a log-probability of a shape that its plates do not explain '
            f"({' '.join(str(error).split())}): put it in a plate for each of its batch dims"
        ) from error


def refuse_short_memory(site: Site) -> None:
    """Refuse a site that hangs on another whose dim it has itself: that is further back than its chain remembers."""
    shape, dim = site["fn"].batch_shape, site["infer"]["_enumerate_dim"]
    if len(shape) >= -dim and shape[dim] != 1:
        raise ValueError(
            f'site "{site["name"]}" hangs on enumerated sites further back than its chain remembers: raise history in '
            "pyro.markov"
        )


def in_double(term: Tensor) -> Tensor:
    """A packed term in float64."""
    found = term.double()
    found._pyro_dims = term._pyro_dims  # type: ignore[attr-defined]
    return found


def quotient(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log a / b, which is log a where b is 0: a is so, too."""
    dead = torch.isneginf(log_b)
    return torch.where(dead, log_a, log_a - torch.where(dead, 0.0, log_b))
