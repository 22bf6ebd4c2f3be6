r"""log p(x) by importance sampling, with a standard error and a warning where neither can be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.arguments import positive_int
from pyrovae.compile.checked import SAVED, Checked, check_compile, tensors_of, wanted
from pyrovae.engine.particles import Particles
from pyrovae.engine.probe import check_fold, checked_look
from pyrovae.engine.programs import Batch, Program, device_of, protected_buffers
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.run import measure, run
from pyrovae.engine.sites import Site, latent
from pyrovae.engine.unwrap import point_mass
from pyrovae.engine.weights import Tally
from pyrovae.evaluate.estimate import LikelihoodEstimate
from pyrovae.evaluate.measuring import Batches, measuring, rows
from pyrovae.evaluate.proposals import refine
from pyrovae.evaluate.resampling import Resampler
from pyrovae.memory import MEMORY, Passes, PeakBytes, fitting_chunk


def log_likelihood(
    model: Program,
    guide: Program,
    *args: Any,
    num_samples: int = 5000,
    seed: int | None = None,
    chunk_size: int | None = None,
    batch_size: int | None = None,
    fold_particles: bool = False,
    memory: int = MEMORY,
    refine_steps: int = 0,
    num_draws: int = 0,
    compile: bool | str = "auto",
    progress: bool | None = False,
    **kwargs: Any,
) -> LikelihoodEstimate:
    r"""Estimate :math:`\log p(x)` of every datum with exactly ``num_samples`` draws from the guide.

    .. math:: \log \hat p(x_b) = \log \frac1S \sum_{s=1}^S \frac{p(x_b, z_s)}{q(z_s \mid x_b)},
        \qquad z_s \sim q(z \mid x_b)

    In expectation a lower bound on :math:`\log p(x_b)` (IWAE's with K = S) that rises to it with S. Scales are ignored;
    modules run in eval mode. A dynamically binarised data set is drawn once, by ``seed``.

    :param args: what the programs take: tensors, passed whole unless ``batch_size`` is given; or one Dataset or
        DataLoader, which is batched (by 100, unless ``batch_size`` says otherwise).
    :param num_samples: S.
    :param seed: isolates and seeds the draws; None takes them from torch's global generator.
    :param chunk_size: draws per pass; None takes what fits in ``memory`` bytes and halves it if memory runs out. The
        same seed gives the same draws only with the same chunk_size, which None chooses from sizes alone.
    :param batch_size: data per pass; None passes tensors whole, and takes 100 from a Dataset.
    :param fold_particles: fold particles into the batch, for networks that take one batch dimension only.
    :param memory: bytes that a pass may take; 2 GiB by default.
    :param refine_steps: of gradient by which the guide is fitted to each datum before it proposes, as by
        :func:`pyrovae.refine`; such an evaluation runs eagerly, and says so wherever it is printed.
    :param num_draws: posterior draws to keep per datum, resampled by weight with replacement; where the effective
        sample size is below it many are equal.
    :param compile: True for passes through one compiled graph (see :mod:`pyrovae.compile.graph`), whose first is
        compared with the eager one on the same noise; what cannot be compiled runs eagerly after a warning. "auto"
        compiles where the number of data and samples promises a shorter evaluation.
    :param progress: show a progress bar; None shows it on terminals only.
    :raises ValueError: for a pair without a density (a Delta guide on a continuous latent), weights that are NaN or
        infinite, and joint weights (latents outside the data plate) of data that come in several batches.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.8))
    >>> estimate = log_likelihood(model, guide, torch.zeros(3), num_samples=1000, seed=0)
    >>> exact = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(0.0))
    >>> bool(((estimate.log_prob - exact).abs() < 5 * estimate.std_error).all())
    True

    Burda, Grosse, Salakhutdinov (2016), *Importance weighted autoencoders*.
    """
    num_samples = positive_int("num_samples", num_samples)
    chunk_size = None if chunk_size is None else positive_int("chunk_size", chunk_size)
    batch_size = None if batch_size is None else positive_int("batch_size", batch_size)
    refine_steps = positive_int("refine_steps", refine_steps, minimum=0)
    num_draws = positive_int("num_draws", num_draws, minimum=0)
    check_compile(compile)
    data = Batches(args, batch_size, seed=seed, device=device_of(model, guide), title="log p(x)", progress=progress)
    sampler = Sampler(model, guide, kwargs, num_samples, fold_particles)
    results: list[tuple[Tensor, ...]] = []
    with measuring(model, guide, seed=seed), data.bar:
        for batch in data:
            if refine_steps:
                sampler.guide = refine(model, guide, *batch, steps=refine_steps, **kwargs)
            if not results:
                sampler.prepare(batch, num_draws, seed, chunk_size, memory)
                sampler.choose(False if refine_steps else compile, data.total or rows(batch))
            if sampler.joint and (results or batch_size is not None):
                raise ValueError(
                    "the pair has latents outside the data plate, so that its weights are joint over the data, which "
                    "therefore cannot come in batches: pass them whole, as tensors, without batch_size"
                )
            results.append(sampler(batch, data.done))
    log_prob, std_error, ess, k = (torch.cat(c, -1) if c[0].dim() else c[0] for c in zip(*results, strict=True))
    return LikelihoodEstimate(
        log_prob, std_error, ess, k, num_samples, seed, str(sampler.dtype).removeprefix("torch."), sampler.weigh.kind,
        refine_steps, sampler.resampler.results(),
    )  # fmt: skip


class Sampler:
    """Draws log-weights of a pair, batch by batch, and sums them up."""

    def __init__(
        self, model: Program, guide: Program, kwargs: Mapping[str, object], num_samples: int, fold: bool
    ) -> None:
        self.model, self.guide, self.kwargs, self.num_samples, self.fold = model, guide, kwargs, num_samples, fold

    def prepare(self, batch: Batch, num_draws: int, seed: int | None, chunk_size: int | None, memory: int) -> None:
        """Look at the pair, refuse what has no log p(x), and measure a pass."""
        seen = checked_look(self.model, self.guide, batch, self.kwargs)
        check_fold(seen, self.fold)
        subsampled = seen.particles.uncommon_subsampled
        if seen.joint and subsampled:
            raise ValueError(
                f'log p(x) needs the whole data set, but plate "{subsampled[0]}" is subsampled and '
                "its latents are shared: evaluate with the full plate"
            )
        self.nesting, self.joint, self.tensors = seen.nesting, seen.joint, tensors_of(seen.modules)
        self.exact = not latent(seen.guide) and not latent(seen.model)
        self.subsampled = bool(subsampled) or seen.layout.oversampling != 1.0
        self.resampler, self.subsample = Resampler(num_draws, seed, seen), SameSubsample()
        with protected_buffers(), isolated_rng(), PeakBytes() as used:
            refuse_without_density(self.run(batch, 2))
        self.dtype = measure(seen.particles).dtype
        self.chunk_size = chunk_size or fitting_chunk(used.peak / 2, memory, batch)

    def choose(self, compile: bool | str, number: int) -> None:
        """Choose, from counts alone where ``compile`` is "auto", whether passes go through a compiled graph."""
        saved = SAVED * number * self.num_samples * sum(t.numel() for t in self.tensors)
        reason = "a plate is subsampled, and every pass must weigh the same data" if self.subsampled else None
        self.weigh = Checked(self.weights, self.tensors, wanted=wanted(compile, saved), reason=reason)
        self.passes = Passes(self.chunk_size, on_halving=self.weigh.forget)

    def run(self, batch: Batch, num_particles: int) -> Particles:
        """One run of the pair, every scale ignored."""
        with self.subsample:
            return run(
                self.model, self.guide, batch, self.kwargs,
                num_particles=num_particles, nesting=self.nesting, fold=self.fold, scaled=False,
            )  # fmt: skip

    def weights(self, size: int, *batch: object) -> list[Tensor]:
        """The log-weights of one pass, ``[size, B]``, and what the resampler wants of it."""
        particles = self.run(batch, size)
        return [measure(particles), *self.resampler.values(particles)]

    def __call__(self, batch: Batch, first: int) -> tuple[Tensor, ...]:
        """log_prob, std_error, ess and pareto_k of one batch, which begins with datum ``first``."""
        tally, self.subsample = Tally(self.num_samples), SameSubsample()
        for log_w, *values in self.passes(self.num_samples, lambda size: self.weigh(size, *batch)):
            tally.add(log_w)
            self.resampler.add(log_w, values)
            del values  # or two passes would be held at a time
        self.resampler.finish()
        sums, k = tally.results()
        bad = torch.isnan(sums.log_mean) | torch.isposinf(sums.log_mean)
        if bad.any():
            where = first + int(bad.reshape(-1).nonzero()[0])
            raise ValueError(
                f"the log-weights of datum {where} are NaN or +inf: check that data and parameters are finite"
            )
        return sums.log_mean, torch.zeros_like(sums.log_mean) if self.exact else sums.std_error, sums.ess, k


def refuse_without_density(particles: Particles) -> None:
    """A continuous latent at a point mass has no density, unless that transforms another draw and says by how much.

    Autoguides do: their draw is auxiliary, or the Delta carries the log-density.
    """
    measure(particles)  # also counts towards the memory of a pass
    auxiliary = any(site["infer"].get("is_auxiliary") for site in particles.guide.values())
    for name, site in latent(particles.guide).items():
        prior = particles.model.get(name)
        mass = point_mass(site["fn"])
        if not isinstance(mass, Delta) or prior is None or prior["fn"].support.is_discrete:
            continue
        if isinstance(point_mass(prior["fn"]), Delta) and prior["mask"] is None:  # a deterministic relation
            continue
        draws = site["value"].unflatten(0, (2, -1)) if particles.layout.folded else site["value"]
        bare = not auxiliary and not mass.log_density.any()
        if bare or torch.equal(draws[0], draws[1]):
            raise ValueError(
                f'the pair has no log p(x): guide site "{name}" is a bare Delta on a continuous latent (an '
                "autoencoder); draw it from a distribution with a density"
            )


class SameSubsample(Messenger):
    """Keeps what a subsampling plate drew at the first pass: all passes weigh the same data."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Site) -> None:  # type: ignore[override]
        if msg["name"] in self.drawn:
            msg["value"] = self.drawn[msg["name"]]

    def _pyro_post_sample(self, msg: Site) -> None:  # type: ignore[override]
        plate = msg["fn"]  # a folded plate is of another size where fewer particles are left, and has nothing to keep
        if type(plate).__name__ == "_Subsample" and plate.subsample_size not in (None, plate.size):
            self.drawn[msg["name"]] = msg["value"]
