"""Pairs that an objective cannot train or measure, refused by name."""

from __future__ import annotations

import math

import torch
from pyro.distributions import Unit

from pyrovae.engine.marginal import Marginal
from pyrovae.engine.probe import Look
from pyrovae.engine.scores import score_function
from pyrovae.engine.sites import Site, latent, oversampling, quoted, same, says_rsample
from pyrovae.engine.unwrap import point_mass


def refuse_uncommon_subsample(seen: Look, objective: str, particles: int) -> None:
    """Refuse, where the bound is not linear, a subsampled plate that not every site is inside of."""
    if subsampled := seen.particles.uncommon_subsampled:
        raise ValueError(
            f'{objective} with {particles} particles cannot subsample plate "{subsampled[0]}", which not '
            "every site is inside of: its weights are joint over the data; use pyrovae.ELBO, or the whole data set"
        )


def refuse_unlike_subsamples(seen: Look) -> None:
    """Refuse a latent whose plates subsample otherwise in the guide than in the model: its scales would not cancel."""
    model, guide = latent(seen.model), latent(seen.guide)
    for name in model.keys() & guide.keys():
        a, b = (math.prod(map(oversampling, run[name]["cond_indep_stack"])) for run in (model, guide))
        if not same(a, b):
            raise ValueError(
                f'each draw of site "{name}" stands for {a:g} in the model and for {b:g} in the guide, as their plates '
                "subsample: give the plates one size and one subsample in both"
            )


def refuse_unlike_scales(seen: Look) -> None:
    """Refuse scales that are not alike: of a latent in guide and model, and of the sites of a sum, which has one."""
    refuse_unlike_subsamples(seen)
    first: dict[tuple[str, ...], Site] = {}
    for name, site in (seen.left or {}).items():
        other = first.setdefault(tuple(site["sum"]), site) if "sum" in site else site
        if not same(site["scale"], other["scale"]):
            scales = [torch.as_tensor(s["scale"]).tolist() for s in (other, site)]
            raise ValueError(
                f'sites "{other["name"]}" and "{name}", which are summed over {quoted(site["sum"])} together, have the '
                f"scales {scales}, and a sum has one: put them in the same subsampled plate and poutine.scale, take "
                "the plate whole, or sample the enumerated sites in the guide"
            )
        if isinstance(site["fn"], Marginal):
            shapes = torch.as_tensor(site["scale"]).shape, site["fn"].share.shape
            if torch.broadcast_shapes(*shapes) != shapes[1]:
                raise ValueError(
                    f'site "{name}" has a scale of shape {list(shapes[0])}, but is part of a sum over '
                    f"{quoted(site['sum'])} of shape {list(shapes[1])}: give it one scale for each of those"
                )


def refuse_scored_sites(seen: Look, gradient: str) -> None:
    """Refuse latents without rsample, where the gradient flows through them; with dreg, several scales of latents."""
    drawn, scales = latent(seen.guide), [torch.as_tensor(t) for t in seen.particles.guide_tempering]
    for name, site in drawn.items():
        if score_function(site) is not None:
            why = "draws by rejection" if site["fn"].has_rsample else "has no rsample"
            raise ValueError(
                f'gradient="{gradient}" needs reparameterised sites, but guide site "{name}" '
                f'({type(site["fn"]).__name__}) {why}: use gradient="total"'
            )
    if gradient == "dreg" and any(t.dim() or not same(t, scales[0]) for t in scales):
        raise ValueError(
            f'gradient="dreg" needs one scale for all latent sites and data, but {quoted(drawn)} are scaled by '
            f'{[t.tolist() for t in scales]}: use gradient="total"'
        )


def refuse_expectation(seen: Look, options: dict[str, bool]) -> None:
    """Refuse what the exact expectation of marked guide sites cannot be joined with, by what it is called."""
    noise = f"noise of the guide ({quoted(sorted(seen.noise))})"
    for option, asked in (options | {noise: bool(seen.noise)}).items():
        if asked:
            raise ValueError(
                f'guide site "{seen.marked[0]}" is marked for enumeration, which does not go together with {option}: '
                "remove the mark, and the site is drawn"
            )


def refuse_without_gradient(seen: Look, objective: str | None) -> None:
    """Refuse guide sites marked for enumeration, and guide factors that do not say how they depend on parameters.

    :param objective: None of one that takes the marks.
    """
    if seen.marked and objective is not None:
        raise ValueError(
            f'guide site "{seen.marked[0]}" is marked for enumeration, and {objective} draws what the guide has: '
            "remove the mark, or leave the site out of the guide and mark it in the model, where every objective sums "
            "it out; pyrovae.ELBO alone takes the exact expectation of what the guide marks"
        )
    for name, site in seen.particles.guide.items():
        if isinstance(point_mass(site["fn"]), Unit) and not says_rsample(site["fn"]):
            raise ValueError(f'guide factor "{name}" must say has_rsample=True or False: pass it to pyro.factor')


def refuse_lacking(seen: Look) -> None:
    """Refuse Deltas of more numbers than are drawn for them, where log q at fixed samples enters."""
    if lacking := seen.auxiliary.lacking:
        raise ValueError(
            f"guide sites {quoted(lacking)} are Deltas of more numbers than are drawn for them in all, so that "
            '"log q at fixed z" has no meaning for them: use an objective with gradient="total"'
        )


def refuse_unscored_noise(seen: Look, objective: str) -> None:
    """Refuse noise of the guide that only its score could train, where no site follows its score."""
    for name, site in seen.particles.noise.items():
        if (score := score_function(site)) is not None and score.requires_grad:
            raise ValueError(
                f'{objective} does not train auxiliary guide site "{name}" ({type(site["fn"]).__name__}), which has '
                "no rsample, as its density does not count in log q: draw it from a fixed distribution, or use "
                "another objective"
            )
