r"""log p(x) by importance sampling, with a standard error and a warning where neither can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor

from pyrovae.arguments import positive_int
from pyrovae.compile.checked import SAVED, Checked, check_compile, signature, tensors_of, wanted
from pyrovae.engine.conditional import draw_summed
from pyrovae.engine.fold import Fold
from pyrovae.engine.particles import Particles, measure
from pyrovae.engine.probe import Look, check_pair, warn_of_strays
from pyrovae.engine.programs import Batch, Program, protected_buffers, rows
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.runner import Runner
from pyrovae.engine.sites import latent, quoted, untraced
from pyrovae.engine.unwrap import is_discrete, point_mass
from pyrovae.engine.weights import Tally, fit_bytes
from pyrovae.engine.whole import refuse_part
from pyrovae.errors import NumericalError
from pyrovae.evaluate.estimate import LikelihoodEstimate
from pyrovae.evaluate.kept import Draws, Resampler, unblanked
from pyrovae.evaluate.measuring import Batches
from pyrovae.evaluate.proposals import refine
from pyrovae.evaluate.sharing import Sharing
from pyrovae.memory import MEMORY, Passes, PeakBytes, fitting_chunk, require_memory


def log_likelihood(
    model: Program,
    guide: Program,
    *args: Any,
    num_samples: int = 5000,
    seed: int | None = None,
    chunk_size: int | None = None,
    batch_size: int | None = None,
    fold_particles: Fold = False,
    vectorize_particles: bool = True,
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
    modules run in eval mode. Processes that work together (:mod:`pyrovae.ranks`) take rows of each batch, and all get
    what one process would. A dynamically binarised data set is drawn once, by ``seed``. A plate that subsamples at
    random is taken whole, but for one whose rows are the data given.

    :param args: what the programs take: tensors, passed whole unless ``batch_size`` is given; or one Dataset or
        DataLoader, which is batched (by 100, unless ``batch_size`` says otherwise; not at all for joint weights).
    :param num_samples: S.
    :param seed: isolates and seeds the draws; None takes them from torch's global generator.
    :param chunk_size: draws per pass; None takes what fits in ``memory`` bytes and halves it if memory runs out. The
        same seed gives the same draws only with the same chunk_size, which None chooses from sizes alone.
    :param batch_size: data per pass; None passes tensors whole, and takes 100 from a Dataset.
    :param fold_particles: fold particles into the batch, as for :func:`pyrovae.log_weights`.
    :param vectorize_particles: False for particles that run one after the other, as there.
    :param memory: bytes that a pass may take; 2 GiB by default.
    :param refine_steps: of gradient by which the guide is fitted to each datum before it proposes, as by
        :func:`pyrovae.refine`; such an evaluation runs eagerly, and says so wherever it is printed.
    :param num_draws: posterior draws to keep per datum, resampled by weight with replacement; where the effective
        sample size is below it many are equal. What only some batches have, or have longer, as series of several
        lengths do, and what masks leave out of model and guide, is NaN (-1 for integers) elsewhere.
    :param compile: True for passes through one compiled graph (see :mod:`pyrovae.compile.graph`), whose first is
        compared with the eager one on the same noise; what cannot be compiled runs eagerly after a warning. "auto"
        compiles where the number of data and samples promises a shorter evaluation.
    :param progress: show a progress bar; None shows it on terminals only.
    :raises NumericalError: for weights that are NaN or infinite.
    :raises ValueError: for a pair without a density (a Delta guide on a continuous latent), joint weights (latents
        outside the data plate) of data that a ``batch_size`` or a loader cuts, and a part of a plate that some latent
        lies outside of.

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
    require_memory(fit_bytes(num_samples), f"the tail of {num_samples:,} weights of a datum", "lower num_samples")
    chunk_size = None if chunk_size is None else positive_int("chunk_size", chunk_size)
    batch_size = None if batch_size is None else positive_int("batch_size", batch_size)
    refine_steps = positive_int("refine_steps", refine_steps, minimum=0)
    num_draws = positive_int("num_draws", num_draws, minimum=0)
    check_compile(compile)
    data = Batches(model, guide, args, kwargs, batch_size, seed=seed, title="log p(x)", progress=progress)
    runner = Runner(model, guide, fold=fold_particles, vectorize=vectorize_particles)
    sharing = Sharing(kwargs, apart=not (refine_steps or num_draws))
    sampler = Sampler(runner, kwargs, num_samples, memory, sharing)
    results: list[tuple[Tensor, ...]] = []
    with data:
        for batch in data:
            if refine_steps:
                sampler.runner.guide = refine(model, guide, *batch, steps=refine_steps, **kwargs)
            if not results:
                compiles = False if refine_steps else compile
                number = data.total or rows(batch, kwargs)
                sampler.prepare(data.seen, batch, number, num_draws, seed, chunk_size, compiles)
                sharing.begin(data.seen, batch)
            results.append(sharing(batch, lambda part, first: sampler(part, data.done + first)))
            if results[-1][0].dim() != results[0][0].dim():
                raise ValueError(
                    "some batches have latents outside the data plate, and others have not: evaluate data of one kind "
                    "at a time"
                )
    log_prob, std_error, ess, k, draws = (torch.cat(c, -1) if c[0].dim() else c[0] for c in zip(*results, strict=True))
    return LikelihoodEstimate(
        log_prob, std_error, ess, k, num_samples, seed, str(sampler.dtype).removeprefix("torch."), sampler.weigh.kind,
        refine_steps, sampler.resampler.results(), draws,
    )  # fmt: skip


class Sampler:
    """Draws log-weights of a pair, batch by batch, and sums them up."""

    def __init__(
        self, runner: Runner, kwargs: Mapping[str, object], num_samples: int, memory: int, sharing: Sharing
    ) -> None:
        self.runner, self.kwargs, self.sharing = runner, kwargs, sharing
        self.num_samples, self.memory = num_samples, memory

    def prepare(
        self,
        seen: Look,
        batch: Batch,
        number: int,
        num_draws: int,
        seed: int | None,
        chunk_size: int | None,
        compile: bool | str,
    ) -> None:
        """Refuse what has no log p(x), and choose from counts and sizes alone what is left open.

        That is how many draws a pass takes, and whether passes go through a compiled graph (of ``number`` data in all).
        """
        check_pair(seen)
        warn_of_strays(seen)
        self.runner.meet(seen, refuse_part)
        state = tensors_of(seen.modules)
        self.exact = not latent(seen.guide) and not latent(seen.model) and not any(map(untraced, seen.model.values()))
        self.resampler = Resampler(num_draws, seed, seen)
        drawn = [site["fn"] for run in (seen.guide, seen.model) for site in latent(run).values()]
        discrete = [is_discrete(fn) for fn in drawn if point_mass(fn) is None]
        self.discrete = any(discrete) and all(discrete)
        with protected_buffers(self.runner.model, self.runner.guide), isolated_rng(), PeakBytes() as used:
            refuse_without_density(self.run(batch, 2), seen.auxiliary.lacking)
        self.dtype = measure(seen.particles).dtype
        saved = 0.0 if self.exact else SAVED * number * self.num_samples * sum(t.numel() for t in state)
        self.weigh = Checked(self.weights, state, hoists=True, wanted=wanted(compile, saved))
        size = chunk_size or fitting_chunk(used.peak / 2, self.memory, batch, self.num_samples)
        self.passes = Passes(size, on_halving=self.weigh.forget)

    def run(self, batch: Batch, num_particles: int) -> Particles:
        """One run of the pair, every scale ignored."""
        return self.runner(batch, self.kwargs, num_particles, check=refuse_part, scaled=False)

    def weights(self, size: int, *batch: object) -> list[Tensor]:
        """The log-weights of one pass, ``[size, B]``, and what the resampler wants of it."""
        one = partial(self.run, num_particles=1)
        with self.sharing.drawing(partial(self.run, num_particles=size), batch, size, one):
            particles = self.run(batch, size)
        return [measure(particles), *self.resampler.values(particles)]

    def draw_summed(self, batch: Batch, draws: Draws) -> Draws:
        """Draws of what is summed out, given posterior draws of all else."""
        runner, kept = self.runner, self.resampler
        together = not (runner.separate or runner.fold)
        ranks = {name: way.rank for name, way in kept.ways.items()}
        draws = {name: unblanked(draw) for name, draw in draws.items()}
        return draw_summed(runner.model, batch, self.kwargs, draws, ranks, kept.layout, together)

    def __call__(self, batch: Batch, first: int) -> tuple[Tensor, ...]:
        """log_prob, std_error, ess, pareto_k and carrying_draws of one batch, which begins with datum ``first``."""
        tally = Tally(self.num_samples, discrete=self.discrete)
        self.resampler.begin(signature(batch))
        self.weigh.begin()
        weigh = self.weigh if self.sharing.graphs else self.weights
        for log_w, *values in self.passes(self.num_samples, lambda size: weigh(size, *batch)):
            tally.add(log_w)
            self.resampler.add(log_w, values)
            del values  # or two passes would be held at a time
        self.resampler.finish(partial(self.draw_summed, batch))
        sums, k, draws = tally.results()
        bad = torch.isnan(sums.log_mean) | torch.isposinf(sums.log_mean)
        if bad.any():
            where = first + int(bad.reshape(-1).nonzero()[0])
            raise NumericalError(
                f"the log-weights of datum {where} are NaN or +inf: check that data and parameters are finite"
            )
        return sums.log_mean, torch.zeros_like(sums.log_mean) if self.exact else sums.std_error, sums.ess, k, draws


def refuse_without_density(particles: Particles, lacking: Sequence[str]) -> None:
    """A continuous latent at a point mass has no density, unless that transforms another draw and says by how much.

    Autoguides do: their draw is auxiliary, or the Delta carries the log-density. It must be as many numbers, too.
    """
    measure(particles)  # also counts towards the memory of a pass
    if lacking:
        raise ValueError(
            f"the pair has no log p(x): guide sites {quoted(lacking)} are Deltas of more numbers than are drawn for "
            "them in all; draw them from a distribution with a density"
        )
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
