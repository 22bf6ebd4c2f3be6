"""One look at a pair: what it draws and reaches, how its plates lie, and whether guide and model go together."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from itertools import count
from operator import or_
from types import SimpleNamespace

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions import Unit
from pyro.infer.autoguide import AutoDiscreteParallel
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyrovae.engine.auxiliary import Auxiliary, auxiliary_of
from pyrovae.engine.blame import ADVICE, at_fault, nan_in
from pyrovae.engine.brief import shorten
from pyrovae.engine.enumerate import record_sums, refusal, to_sum
from pyrovae.engine.observed import OTHER, check_observed, excused
from pyrovae.engine.particles import Layout, Particles, Role
from pyrovae.engine.programs import (
    Batch,
    Program,
    graph_leaves,
    isolated_run,
    protected_buffers,
    reached_modules,
    warn,
    within,
)
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.sites import (
    Record,
    Sites,
    counted,
    counts,
    depth,
    frames,
    latent,
    log_prob,
    observed,
    quoted,
    record,
    record_pair,
)
from pyrovae.engine.unwrap import point_mass, unvalidated
from pyrovae.errors import DataError, NumericalError, is_out_of_memory


@dataclass(frozen=True)
class Look:
    """What one run of a pair, with one particle, shows of it.

    :ivar guide: the guide's sites.
    :ivar model: the model's sites, on the guide's samples.
    :ivar modules: the modules that the programs are, belong to or call, none of them below another.
    :ivar held: those modules that the programs hold besides, and may call methods of, which have buffers.
    :ivar store: the tensors of Pyro's parameter store that the programs use, unconstrained, by name.
    :ivar auxiliary: what the guide draws that the model lacks.
    :ivar again: runs the model once more, on draws of its own.
    :ivar left: the model's sites with those that are enumerated summed out; None where none is.
    """

    guide: Sites
    model: Sites
    modules: list[nn.Module]
    held: list[nn.Module]
    store: dict[str, Tensor]
    auxiliary: Auxiliary
    again: Callable[[], Sites]
    left: Sites | None = None

    @property
    def sums(self) -> bool:
        """Whether sites of the model are summed out."""
        return self.left is not None

    @property
    def noise(self) -> frozenset[str]:
        """Draws of the guide that do not count in log q."""
        return self.auxiliary.noise

    @cached_property
    def marked(self) -> list[str]:
        """The guide's sites that are marked for enumeration; without an AutoDiscreteParallel's, which marks all."""
        guides = [part for own in self.modules for part in own.modules() if isinstance(part, AutoDiscreteParallel)]
        drawn = {site["name"] for guide in guides for site, *_ in guide._discrete_sites}
        return [name for name, s in latent(self.guide).items() if s["infer"].get("enumerate") and name not in drawn]

    @cached_property
    def particles(self) -> Particles:
        """The run itself, scaled."""
        return Particles.of(self.guide, self.left or self.model, noise=self.noise, scaled=True)

    @cached_property
    def unscaled(self) -> Particles:
        """The run itself, every scale ignored."""
        return Particles.of(self.guide, self.left or self.model, noise=self.noise)

    @property
    def layout(self) -> Layout:
        """The plates that all sites share."""
        return self.unscaled.layout

    @cached_property
    def nesting(self) -> int:
        """The number of dimensions that the programs' own plates take."""
        return depth(self.guide, self.model)

    @property
    def joint(self) -> bool:
        """Whether no plate is around every site, so that the weights are joint over the data."""
        return not self.layout.dims

    @property
    def strays(self) -> list[str]:
        """The sites that make weights joint although the model's random variables share a plate: those outside of it.

        These are factors, and latents for which the guide has no such plate; other draws of the guide are not meant.
        """
        factors = {s["name"]: s for s in counted(self.model) if isinstance(point_mass(s["fn"]), Unit)}
        shared = Layout.around([site for site in counted(self.model) if site["name"] not in factors]).plates
        if not self.joint or not shared:
            return []
        place = max(key[1:] for key in shared)
        guide = {n: s for n, s in self.unscaled.guide.items() if n in self.model or s["is_observed"]}
        meant = [*factors.items(), *guide.items()]
        return [name for name, site in meant if place not in {key[1:] for key in frames(site)}]

    @property
    def sizes(self) -> set[int]:
        """The sizes of all plates, and how many values each site has that is summed out."""
        summed = [site["fn"] for site in self.model.values() if site.get("summed")]
        plates = [f.size for run in (self.guide, self.model) for s in run.values() for f in s["cond_indep_stack"]]
        return {*plates, *(len(fn.enumerate_support(expand=False)) for fn in summed)}

    @property
    def full_size(self) -> int | None:
        """The full size of the rightmost plate around the observed sites if it is subsampled, else None."""
        stacks = [site["cond_indep_stack"] for site in observed(self.model).values()]
        plates = {f.name: f for stack in stacks for f in stack if f.dim in (-1, None)}
        return next((f.full_size for f in plates.values() if f.full_size and f.full_size > f.size), None)

    def check_data(self) -> None:
        """Refuse data outside of the support of the sites that observe them.

        :raises DataError: naming site, index and value.
        """

        def again() -> Sites:
            if self.left is not None:  # with bounds for each of the values that are summed over
                return self.left
            with pyro.validation_enabled(False), isolated_rng(OTHER), protected_buffers(self.again):
                return self.again()

        check_observed(self.model, again=again)

    def check_numbers(self, batch: Batch) -> None:
        """Refuse what is no number in the run.

        :raises NumericalError: naming the parameter, or the site.
        :raises DataError: where the data are at fault.
        """
        if found := nan_in(module_state(self.modules) | self.store) or at_fault(self.guide, self.model, batch):
            raise (DataError if found.kind == "data" else NumericalError)(f"{found.said}: {ADVICE[found.kind]}")

    @cached_property
    def state(self) -> PairState:
        """The tensors that the pair reaches; unlike the look it holds no graph, and may be kept."""
        known = {id(tensor) for tensor in module_state(self.modules).values()}
        stored = {f"param.{name}": tensor for name, tensor in self.store.items()}
        loose = {}
        for name, tensor in (stored | {f"leaf.{i}": leaf for i, leaf in enumerate(self.leaves())}).items():
            if id(tensor) not in known:
                known.add(id(tensor))
                loose[name] = tensor
        return PairState(self.modules, loose, len(self.modules), self.held)

    def leaves(self) -> list[Tensor]:
        """The tensors that require grad and that the log-probabilities of the run depend on."""
        with pyro.validation_enabled(False), isolated_rng(), torch.enable_grad():
            drawn = [log_prob(site, in_guide=True).sum() for site in counted(self.guide)]
            terms = [*drawn, *(log_prob(site).sum() for site in counted(self.model))]
            return graph_leaves(torch.stack(terms).sum()) if terms else []


@dataclass(frozen=True)
class PairState:
    """The tensors of a pair: those of its modules, and by name those that belong to no module.

    The latter are of Pyro's parameter store ("param.NAME"), or leaves that the programs close over ("leaf.NUMBER").
    """

    modules: list[nn.Module]
    loose: dict[str, Tensor]
    first: int  # of the modules, those reached at first; the others joined later
    held: list[nn.Module]  # what else the programs hold that has buffers: these are put back, but not saved

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold, as it is now: a module may have put other tensors in its buffers' place."""
        later = (module_state([module], f"later.{i}.") for i, module in enumerate(self.modules[self.first :]))
        return reduce(or_, later, module_state(self.modules[: self.first]) | self.loose)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """What can be trained, each tensor once, in the order modules, store, leaves."""
        tensors = self.tensors
        first_names = {id(tensor): name for name, tensor in reversed(tensors.items()) if tensor.requires_grad}
        return {name: tensors[name] for name in reversed(first_names.values())}

    def add(self, other: PairState, leaves: Iterable[Tensor]) -> None:
        """Take in what another run of the pair reached, if the leaves, of a third run, say that it lasts."""
        lasting = set(map(id, leaves))
        stored = {id(tensor): f"param.{name}" for name, tensor in pyro.get_param_store().named_parameters()}
        below = {child for module in self.modules for child in module.modules()}
        for module in other.modules:
            if module not in below and any(id(parameter) in lasting for parameter in module.parameters()):
                self.modules.append(module)
        known = set(map(id, self.tensors.values()))
        for tensor in other.loose.values():
            if id(tensor) not in known and (id(tensor) in stored or id(tensor) in lasting):
                self.loose[stored.get(id(tensor), f"leaf.later.{len(self.loose)}")] = tensor

    def to(self, device: torch.device) -> None:
        """Move everything, in place."""
        for module in self.modules:
            module.to(device)
        for tensor in self.loose.values():
            tensor.data = tensor.data.to(device)


def look(
    model: Program, guide: Program, args: Batch, kwargs: Mapping[str, object] | None = None, *, validate: bool = True
) -> Look:
    """Run a pair once with one particle, leaving no trace in generators and buffers; lazy modules come into being.

    :param validate: whether what the model observes is checked, and Pyro's own checks are made, where they are on.
    :raises DataError: for data outside of the observed sites' support, or not finite where they must be.
    :raises NumericalError: for weights that are not, or a site.
    """
    validating = nullcontext() if validate else pyro.validation_enabled(False)
    try:
        with (
            torch.enable_grad(), isolated_run(), validating, protected_buffers(model, guide),
            reached_modules(model, guide) as reached, poutine.trace(param_only=True) as parameters,
        ):  # fmt: skip
            drawn_by_guide, joint = record_drawn(model, guide, args, kwargs or {})
            sites = drawn_by_guide, to_sum(joint, drawn_by_guide)
            try:
                left = record_sums(model, args, kwargs or {}, *sites)
            except ValueError:
                check_shapes("model", sites[1])  # which may be the reason
                raise
    except ValueError as error:  # by Pyro's checks; where the data are at fault, they are told of in plainer words
        if validate:
            with suppress(RuntimeError, TypeError, LookupError, AssertionError):
                seen = look(model, guide, args, kwargs, validate=False)
                seen.check_data()
                if "nan" in str(error):
                    seen.check_numbers(args)
        raise
    auxiliary = auxiliary_of(guide, args, kwargs or {}, *sites)
    below = {child for module in reached for child in module.modules() if child is not module}
    store = {name: site["value"].unconstrained() for name, site in parameters.trace.nodes.items()}  # type: ignore[union-attr]
    again = partial(record, model, args, kwargs or {})
    held = [module for module in within(model, guide) if module._buffers and module not in {*reached, *below}]
    seen = Look(*sites, [m for m in reached if m not in below], held, store, auxiliary, again, left)
    if not validate:
        return seen
    seen.check_data()
    if seen.sums:  # other values of what is summed out may allow what the one that was drawn does not
        return replace(seen, model={name: {**s, "fn": unvalidated(s["fn"])} for name, s in seen.model.items()})
    return replace(seen, model={name: excused(site) for name, site in seen.model.items()})


def record_drawn(model: Program, guide: Program, args: Batch, kwargs: Mapping[str, object]) -> tuple[Sites, Sites]:
    """The sites of a pair's run, all that the guide has drawn; a ValueError for programs that only marks let run."""
    try:
        return record_pair(model, guide, args, kwargs)
    except (AssertionError, IndexError, RuntimeError) as error:
        with Record() as run, suppress(Exception):
            guide(*args, **kwargs)
        marked = [name for name, site in latent(run.sites).items() if site["infer"].get("enumerate")]
        if not marked or is_out_of_memory(error):
            raise
        raise ValueError(
            f"guide sites {quoted(marked)} are marked for enumeration, but the programs fail where these are drawn "
            f"({type(error).__name__}: {' '.join(str(error).split())}), as a look at them does: let them run on draws "
            "as well, taking what belongs to each value by indexing, as in means[c]"
        ) from error


def module_state(modules: list[nn.Module], prefix: str = "") -> dict[str, Tensor]:
    """The parameters and persistent buffers that modules have by now, by name; of several by number and name."""
    prefixes = [prefix] if len(modules) == 1 else [f"{prefix}{i}." for i in range(len(modules))]
    return {
        prefix + name: tensor
        for prefix, module in zip(prefixes, modules, strict=True)
        for name, tensor in module.state_dict(keep_vars=True).items()
        if not is_lazy(tensor)
    }


def unlike(number: int, sizes: Collection[int]) -> int:
    """This number of particles or a few more, where so many in the place of a plate or of values would not fail."""
    return next(n for n in count(number) if n not in sizes)


# --- checks ----------------------------------------------------------------------------------------------------------


def checked_look(model: Program, guide: Program, args: Batch, kwargs: Mapping[str, object]) -> Look:
    """A look at a pair, after checks that guide and model go together."""
    seen = look(model, guide, args, kwargs)
    check_pair(seen)
    return seen


def check_pair(seen: Look) -> None:
    """Guide and model must go together, and every site must lie in its plates."""
    check_match(seen)
    check_shapes("guide", seen.guide)
    check_shapes("model", seen.model)


def check_match(seen: Look) -> None:
    """Every latent site of the model must be drawn by the guide, and the other way round."""
    drawn, wanted = latent(seen.guide), latent(seen.model)
    if not counted(seen.model):
        raise ValueError("the model has no sample site: it must observe something; add pyro.sample(..., obs=x)")
    for name, site in wanted.items():
        if name not in drawn and (why := refusal(site)):
            raise ValueError(f'model site "{name}" is not drawn by the guide, and {why}')
        if name not in drawn:
            raise ValueError(
                f'model site "{name}" is neither observed nor drawn by the guide, which draws {quoted(drawn)}: '
                "sample it in the guide, or pass obs="
            )
    for name, site in drawn.items():
        if name not in wanted and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f'guide site "{name}" is not a latent site of the model, which has {quoted(wanted)}: '
                'rename it, or mark it infer={"is_auxiliary": True}'
            )
    try:
        check_model_guide_match(*(SimpleNamespace(nodes=sites) for sites in (wanted, drawn)))  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{error}: give its distribution one shape, in the same plates, in both") from error


def warn_of_strays(seen: Look) -> None:
    """Say that weights are joint where the model's random variables alone would not make them so."""
    if strays := seen.strays:
        warn(
            f"the weights are joint over the data, because {quoted(strays)} lie outside of the plate that all random "
            "sites of the model share (guide and model know it by dim and size): put them in it, or take what is "
            "computed as that of the whole data set"
        )


def check_shapes(role: Role, sites: Sites) -> None:
    """Pyro's check of every site's shape against its plates, and of its value against its support."""
    for name, site in sites.items():
        if not counts(site) or "sum" in site:
            continue
        try:
            with torch.no_grad():
                scored = {**site, "log_prob": log_prob(site, in_guide=role == "guide")}
            check_site_shape(scored, max_plate_nesting=math.inf)  # type: ignore[arg-type]
        except ValueError as error:
            shorten(error)
            raise ValueError(f'{role} site "{name}": ' + " ".join(str(error).split())) from error
