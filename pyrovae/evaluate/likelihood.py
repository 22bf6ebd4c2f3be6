r"""log p(x) by importance sampling, with a standard error and a warning where neither can be trusted."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae import data as datasets
from pyrovae.arguments import positive_int
from pyrovae.compile.checked import Checked, check_compile, distinct, wanted
from pyrovae.compile.precision import full_float32
from pyrovae.engine.particles import Particles
from pyrovae.engine.probe import check_fold, nesting, probe
from pyrovae.engine.programs import Program, device_of, eval_mode, evaluating, protected_buffers, reached_modules
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.run import measure, run
from pyrovae.engine.sites import latent
from pyrovae.engine.unwrap import point_mass
from pyrovae.engine.weights import _Tally
from pyrovae.evaluate.estimate import LikelihoodEstimate
from pyrovae.evaluate.proposals import refine
from pyrovae.evaluate.resampling import Resampler
from pyrovae.memory import MEMORY, _fitting_chunk, _PeakBytes, is_out_of_memory
from pyrovae.progress import ProgressBar

SAVED = 1e-11  # seconds that compiling saves, per parameter and sample of one datum (measured on CPUs)


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
    device = device_of(model, guide)
    results: list[tuple[Tensor, ...]] = []
    seeded = nullcontext() if seed is None else isolated_rng(seed)
    total = len(args[0]) if len(args) == 1 and isinstance(args[0], datasets.Images) else None
    with torch.no_grad(), seeded, full_float32(), ProgressBar("log p(x)", total, progress) as bar:
        sampler, resampler = None, None
        for batch in datasets.batches(args, batch_size, seed=seed or 0, device=device):
            proposal = refine(model, guide, *batch, steps=refine_steps, **kwargs) if refine_steps else guide
            if sampler is None or refine_steps:
                sampler = _Sampler(model, proposal, batch, kwargs, num_samples, chunk_size, fold_particles, memory)
                resampler = resampler or Resampler(num_draws, seed, sampler.pair)
                sampler.prepare(False if refine_steps else compile, total or len(batch[0]), resampler)
            if sampler.joint and (results or batch_size is not None):
                raise ValueError(
                    "the pair has latents outside the data plate, so that its weights are joint over the data, which "
                    "therefore cannot come in batches: pass them whole, as tensors, without batch_size"
                )
            results.append(sampler(batch))
            bar.update(sum(log_prob.numel() for log_prob, *_ in results), "data")
    if sampler is None or resampler is None:
        raise datasets.DataError("there are no data to evaluate: pass at least one datum")
    columns = [torch.cat(c, -1) if c[0].dim() else c[0] for c in zip(*results, strict=True)]
    log_prob, std_error, ess, k = columns
    dtype = str(sampler.dtype).removeprefix("torch.")
    return LikelihoodEstimate(
        log_prob, std_error, ess, k, num_samples, seed, dtype, sampler.passes.path, refine_steps, resampler.results()
    )


class _Sampler:
    """Draws log-weights of a pair, batch by batch, and sums them up."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        batch: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_samples: int,
        chunk_size: int | None,
        fold: bool,
        memory: int,
    ) -> None:
        self.model, self.guide, self.kwargs, self.num_samples, self.fold = model, guide, kwargs, num_samples, fold
        with reached_modules(model, guide) as modules, evaluating(model, guide):
            checked = self.pair = probe(model, guide, batch, kwargs)
        check_fold(checked, fold)
        self.seen = 0
        self.modules, self.nesting = list(modules), nesting(checked)
        self.exact = not latent(checked.guide) and not latent(checked.model)
        self.joint = checked.joint
        subsampled = checked.particles.uncommon_subsampled
        if self.joint and subsampled:
            raise ValueError(
                f'log p(x) needs the whole data set, but plate "{subsampled[0]}" is subsampled and '
                "its latents are shared: evaluate with the full plate"
            )
        with protected_buffers(), isolated_rng(), _PeakBytes() as used:
            self._refuse_without_density(self._run(batch, 2))
        self.dtype = measure(checked.particles).dtype
        self.chunk_size = chunk_size or _fitting_chunk(used.peak / 2, memory, batch)
        self.subsampled = checked.layout.oversampling != 1.0 or bool(checked.particles.uncommon_subsampled)
        self.tensors = distinct(t for module in self.modules for t in (*module.parameters(), *module.buffers()))

    def prepare(self, compile: bool | str, number: int, resampler: Resampler) -> None:
        """Decide, from counts alone where ``compile`` is "auto", whether passes go through a compiled graph."""
        weights = sum(t.numel() for t in self.tensors)
        self.resampler = resampler
        self.passes = Checked(
            partial(self._measure, resampler),
            self.tensors,
            wanted=wanted(compile, number * self.num_samples * weights * SAVED),
            reason="a plate is subsampled, and every pass must weigh the same data" if self.subsampled else None,
        )

    def _measure(self, resampler: Resampler, size: int, *batch: Any) -> list[Tensor]:
        """The log-weights of one pass, ``[size, B]``, in eval mode, and what a resampler wants of it."""
        run = self._run(batch, size)
        return [measure(run), *resampler.values(run)]

    def _run(self, batch: tuple[Any, ...], num_particles: int) -> Particles:
        with eval_mode(self.modules):
            return run(
                self.model, self.guide, batch, self.kwargs,
                num_particles=num_particles, nesting=self.nesting, fold=self.fold, scaled=False,
            )  # fmt: skip

    def _refuse_without_density(self, particles: Particles) -> None:
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
            draws = site["value"].unflatten(0, (2, -1)) if self.fold else site["value"]
            bare = not auxiliary and not mass.log_density.any()
            if bare or torch.equal(draws[0], draws[1]):
                raise ValueError(
                    f'the pair has no log p(x): guide site "{name}" is a bare Delta on a continuous latent (an '
                    "autoencoder); draw it from a distribution with a density"
                )

    def __call__(self, batch: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """log_prob, std_error, ess and pareto_k of one batch."""
        tally, drawn, subsample = _Tally(self.num_samples), 0, _SameSubsample()
        while drawn < self.num_samples:
            size = min(self.chunk_size, self.num_samples - drawn)
            try:
                with subsample:
                    log_w, *values = self.passes(size, *batch)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
                self.chunk_size = size // 2
                self.passes.forget()
                continue
            tally.add(log_w)
            if self.resampler.num_draws:
                self.resampler.add(log_w, values)
            del values  # or two passes would be held at a time
            drawn += size
        self.resampler.finish()
        results = tally.results()
        bad = torch.isnan(results[0]) | torch.isposinf(results[0])
        if bad.any():
            where = self.seen + int(bad.reshape(-1).nonzero()[0])
            raise ValueError(
                f"the log-weights of datum {where} are NaN or +inf: check that data and parameters are finite"
            )
        self.seen += len(results[0]) if results[0].dim() else 0
        if self.exact:
            results = (results[0], torch.zeros_like(results[1]), *results[2:])
        return results


class _SameSubsample(Messenger):
    """Keeps what a subsampling plate drew at the first pass: all passes weigh the same data."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.drawn:
            msg["value"] = self.drawn[msg["name"]]

    def _pyro_post_sample(self, msg: Any) -> None:
        plate = msg["fn"]  # a folded plate is of another size where fewer particles are left, and has nothing to keep
        if type(plate).__name__ == "_Subsample" and plate.subsample_size not in (None, plate.size):
            self.drawn[msg["name"]] = msg["value"]
