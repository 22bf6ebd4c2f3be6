"""Pairs that an objective cannot train or measure, refused by name."""

from __future__ import annotations

import math

import torch
from pyro.distributions import Unit
from pyro.infer.autoguide import AutoDiscreteParallel

from pyrovae.engine.probe import Look
from pyrovae.engine.scores import score_function
from pyrovae.engine.sites import latent, oversampling, quoted, same, says_rsample
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


def refuse_without_gradient(seen: Look, objective: str) -> None:
    """Refuse sites marked for enumeration, and guide factors that do not say how they depend on parameters."""
    drawn = marked_by_themselves(seen)
    for name, site in (*seen.guide.items(), *seen.model.items()):
        if site["infer"].get("enumerate") and name not in drawn:
            raise ValueError(
                f'site "{name}" is marked for enumeration, which {objective} cannot do: '
                "use pyro.infer.TraceEnum_ELBO, or remove the mark"
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


def marked_by_themselves(seen: Look) -> set[str]:
    """The sites that an AutoDiscreteParallel draws: it marks them whatever the objective."""
    guides = [part for module in seen.modules for part in module.modules() if isinstance(part, AutoDiscreteParallel)]
    return {site["name"] for guide in guides for site, *_ in guide._discrete_sites}


def refuse_unscored_noise(seen: Look, objective: str) -> None:
    """Refuse noise of the guide that only its score could train, where no site follows its score."""
    for name, site in seen.particles.noise.items():
        if (score := score_function(site)) is not None and score.requires_grad:
            raise ValueError(
                f'{objective} does not train auxiliary guide site "{name}" ({type(site["fn"]).__name__}), which has '
                "no rsample, as its density does not count in log q: draw it from a fixed distribution, or use "
                "another objective"
            )
