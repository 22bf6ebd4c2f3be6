r"""log p(x) by importance sampling, with a standard error and a warning where neither can be trusted."""

from __future__ import annotations

import math
import warnings
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from scipy.stats import t as student
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyrovae import data as datasets
from pyrovae import importance
from pyrovae.arguments import in_range, positive_int
from pyrovae.evaluate.proposals import refine
from pyrovae.evaluate.psis import pareto_k, tail_size
from pyrovae.evaluate.resampling import Resampler
from pyrovae.graph import (
    COMPILATION,
    CannotCompile,
    capture,
    check_compile,
    compare,
    signature,
    tensors,
)
from pyrovae.memory import is_out_of_memory
from pyrovae.noise import rewritten
from pyrovae.precision import full_float32
from pyrovae.programs import (
    Program,
    device_of,
    eval_mode,
    evaluating,
    isolated_rng,
    protected_buffers,
    reached_modules,
)
from pyrovae.progress import ProgressBar
from pyrovae.sites import latent, point_mass

RELIABLE_K = 0.7
EQUAL = 1e-3  # relative spread of the weights of a posterior-equal guide, which is rounding only
SAVED = 1e-11  # seconds that compiling saves, per parameter and sample of one datum (measured on CPUs)
MEMORY = 2 * 2**30  # bytes that one evaluation may take
WORKING_SET = {"cpu": 48 * 2**20, "cuda": 2**30}  # larger passes gain nothing: they leave the caches


class Figures:
    """What estimates of log p(x), one per datum with a standard error each, say of the data as a whole."""

    log_prob: Tensor
    std_error: Tensor

    @property
    def _independent(self) -> int:
        """How many independent weights per datum the standard error was estimated from."""
        raise NotImplementedError

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        r"""The ends of an interval around each :attr:`log_prob` that covers log p(x) with probability ``level``.

        .. math:: \log \hat p \pm t_{S - 1}\, \mathrm{std\_error}

        with Student's t, for the standard error is itself estimated from S weights (or chains). It is as right as they
        are: with a Pareto k above 0.7, or chains that have not reached the posterior, it covers less.
        """
        reach = student.ppf((1 + in_range("level", level, 0.0, 1.0)) / 2, max(self._independent - 1, 1))
        dead = torch.isinf(self.std_error)
        width = torch.where(dead | (self.std_error == 0), 0.0, self.std_error * reach)
        return torch.where(dead, -math.inf, self.log_prob - width), torch.where(dead, math.inf, self.log_prob + width)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood in nats per datum (in all, for joint weights)."""
        return -self.log_prob.mean().item()

    @property
    def nll_std_error(self) -> float:
        """Standard error of :attr:`nll` over the draws of the guide, the data taken as given."""
        return self.std_error.square().sum().sqrt().item() / max(self.std_error.numel(), 1)

    @property
    def nll_data_std_error(self) -> float:
        """Standard error of :attr:`nll` over the data, as a sample of a population (NaN for a single datum)."""
        return (
            (self.log_prob.std() / math.sqrt(self.log_prob.numel())).item() if self.log_prob.numel() > 1 else math.nan
        )


@dataclass(frozen=True)
class LikelihoodEstimate(Figures):
    r"""Importance-sampling estimates :math:`\log \hat p(x_b) = \log \frac1S \sum_s w_{sb}`, in nats, float64.

    ``std_error`` is the delta-method standard error of each :math:`\log \hat p`, ``ess`` the effective sample size
    :math:`(\sum w)^2 / \sum w^2`, ``pareto_k`` the tail shape of the weights: above 0.7 neither the estimate nor its
    standard error can be trusted. All are ``[B]``, or 0-d for a pair with joint weights. ``draws`` are the posterior
    draws that were asked for, by site, ``[num_draws, B, *other plates, *event]`` (without B for joint weights).
    """

    log_prob: Tensor
    std_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    num_samples: int
    seed: int | None
    dtype: str
    path: str = "eager"
    refine_steps: int = 0
    draws: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def _independent(self) -> int:
        return self.num_samples

    @property
    def unreliable(self) -> float:
        """The share of data whose Pareto k is above 0.7; weights that are all but equal are reliable whatever it is."""
        spread = self.std_error * math.sqrt(self.num_samples)
        return ((self.pareto_k > RELIABLE_K) & (spread > EQUAL)).double().mean().item()

    def warning(self) -> str | None:
        """What a reader must know before quoting :attr:`nll`, or None."""
        lost = int(torch.isinf(self.log_prob).sum())
        notes = [f"log p(x) is -inf for {lost} of {self.log_prob.numel()} data"] if lost else []
        if self.unreliable > 0:
            notes.append(
                f"Pareto k > {RELIABLE_K} for {self.unreliable:.1%} of the data: neither their log p(x) nor "
                "its standard error can be trusted; use more samples or a better guide"
            )
        return "; ".join(notes) or None

    def __str__(self) -> str:
        over_data = f" (± {self.nll_data_std_error:.2g} over data)" if self.log_prob.numel() > 1 else ""
        return (
            f"NLL {self.nll:.2f} ± {self.nll_std_error:.2g} nats{over_data}, "
            f"{self.num_samples} samples, median ESS {self.ess.median().item():.0f}"
            + (f", guide refined by {self.refine_steps} steps per datum" if self.refine_steps else "")
        )

    def to_arviz(self) -> Any:
        """The estimates as ``arviz.InferenceData``, one entry per datum: ``log_likelihood`` and ``sample_stats``.

        With ``draws`` also ``posterior``, one chain of them.
        """
        import arviz
        import xarray

        def table(**columns: Tensor) -> Any:
            return xarray.Dataset({k: ("datum", v.reshape(-1).cpu().numpy()) for k, v in columns.items()})

        kept = {name: value.unsqueeze(0).cpu().numpy() for name, value in self.draws.items()}
        local = {name: ["datum"] for name in kept if self.log_prob.dim() == 1}
        groups = {"posterior": arviz.dict_to_dataset(kept, dims=local)} if kept else {}
        return arviz.InferenceData(
            **groups,
            attrs={
                "num_samples": self.num_samples,
                "seed": "" if self.seed is None else self.seed,
                "dtype": self.dtype,
            },
            log_likelihood=table(log_prob=self.log_prob),
            sample_stats=table(std_error=self.std_error, ess=self.ess, pareto_k=self.pareto_k),
        )


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
    :param compile: True for passes through one compiled graph (see :mod:`pyrovae.graph`), whose first is compared with
        the eager one on the same noise; what cannot be compiled runs eagerly after a warning. "auto" compiles where the
        number of data and samples promises a shorter evaluation.
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
                sampler.choose_path(False if refine_steps else compile, total or len(batch[0]))
            if sampler.joint and (results or batch_size is not None):
                raise ValueError(
                    "the pair has latents outside the data plate, so that its weights are joint over the data, which "
                    "therefore cannot come in batches: pass them whole, as tensors, without batch_size"
                )
            resampler = resampler or Resampler(num_draws, seed, sampler.pair)
            results.append(sampler(batch, resampler))
            bar.update(sum(log_prob.numel() for log_prob, *_ in results), "data")
    if sampler is None or resampler is None:
        raise datasets.DataError("there are no data to evaluate: pass at least one datum")
    columns = [torch.cat(c, -1) if c[0].dim() else c[0] for c in zip(*results, strict=True)]
    log_prob, std_error, ess, k = columns
    dtype = str(sampler.dtype).removeprefix("torch.")
    return LikelihoodEstimate(
        log_prob, std_error, ess, k, num_samples, seed, dtype, sampler.path, refine_steps, resampler.results()
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
            checked = self.pair = importance.probe(model, guide, batch, kwargs)
        importance.check_fold(checked, fold)
        self.seen = 0
        self.modules, self.nesting = list(modules), importance.nesting(checked)
        self.exact = not latent(checked.guide) and not latent(checked.model)
        self.joint = not checked.common_dims
        if self.joint and checked.uncommon_subsampled:
            raise ValueError(
                f'log p(x) needs the whole data set, but plate "{checked.uncommon_subsampled[0]}" is subsampled and '
                "its latents are shared: evaluate with the full plate"
            )
        with protected_buffers(), isolated_rng(), _PeakBytes() as used:
            self._refuse_without_density(self._run(batch, 2))
        self.dtype = importance.measure(checked).dtype
        self.chunk_size = chunk_size or _fitting_chunk(used.peak / 2, memory, batch)
        self.subsampled = checked.oversampling != 1.0 or bool(checked.uncommon_subsampled)
        self.graph: tuple[Any, Any] | None = None
        self.path = "eager"

    def choose_path(self, compile: bool | str, number: int) -> None:
        """Decide, from counts alone where ``compile`` is "auto", whether passes go through a compiled graph."""
        weights = sum(p.numel() for p in self._tensors())
        chosen = number * self.num_samples * weights * SAVED > COMPILATION if compile == "auto" else compile
        self.path = "compiled" if chosen else "eager"

    def _tensors(self) -> list[Tensor]:
        found = (t for module in self.modules for t in (*module.parameters(), *module.buffers()))
        return list({id(t): t for t in found}.values())

    def _pass(self, batch: tuple[Any, ...], size: int, resampler: Resampler) -> list[Tensor]:
        """The log-weights of one pass, ``[size, B]``, in eval mode, and what a resampler wants of it."""
        if self.path == "compiled" and self.graph is None:
            try:
                self.graph = (size, signature(batch)), self._compile(batch, size, resampler)
            except CannotCompile as error:
                self.path = "eager"
                warnings.warn(f"cannot compile: {error}; running eagerly", stacklevel=4)
        if self.graph is not None and self.graph[0] == (size, signature(batch)):
            return self.graph[1](batch)
        return self._measure(batch, size, resampler)

    def _measure(self, batch: tuple[Any, ...], size: int, resampler: Resampler) -> list[Tensor]:
        run = self._run(batch, size)
        return [importance.measure(run), *resampler.values(run)]

    def _compile(self, batch: tuple[Any, ...], size: int, resampler: Resampler) -> Any:
        if self.subsampled:
            raise CannotCompile("a plate is subsampled, and every pass must weigh the same data")
        state = self._tensors()
        measured = partial(self._measure, batch, size, resampler)

        with isolated_rng(0), rewritten():
            expected = measured()
        compiled = capture(measured, [*state, *tensors(batch)]).compiled()
        with isolated_rng(0):
            compare(expected, compiled(*state, *tensors(batch)))
        return lambda batch: compiled(*state, *tensors(batch))

    def _run(self, batch: tuple[Any, ...], num_particles: int) -> importance.Particles:
        with eval_mode(self.modules):
            return importance.run(
                self.model, self.guide, batch, self.kwargs,
                num_particles=num_particles, nesting=self.nesting, fold=self.fold, scaled=False,
            )  # fmt: skip

    def _refuse_without_density(self, particles: importance.Particles) -> None:
        """A continuous latent at a point mass has no density, unless that transforms another draw and says by how much.

        Autoguides do: their draw is auxiliary, or the Delta carries the log-density.
        """
        importance.measure(particles)  # also counts towards the memory of a pass
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

    def __call__(self, batch: tuple[Any, ...], resampler: Resampler) -> tuple[Tensor, ...]:
        """log_prob, std_error, ess and pareto_k of one batch."""
        tally, drawn, subsample = _Tally(self.num_samples), 0, _SameSubsample()
        while drawn < self.num_samples:
            size = min(self.chunk_size, self.num_samples - drawn)
            try:
                with subsample:
                    log_w, *values = self._pass(batch, size, resampler)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
                self.chunk_size, self.graph = size // 2, None
                continue
            tally.add(log_w)
            if resampler.num_draws:
                resampler.add(log_w, values)
            del values  # or two passes would be held at a time
            drawn += size
        resampler.finish()
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


class _Tally:
    """Running sums of weights in float64, with the largest ones kept for the Pareto fit."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples, self.keep = num_samples, min(tail_size(num_samples) + 1, num_samples)
        self.pending: list[Tensor] = []
        self.log_sum = self.log_sum_squares = torch.tensor(-math.inf, dtype=torch.float64)
        self.largest: Tensor | None = None

    def add(self, log_w: Tensor) -> None:
        self.pending.append(log_w.double())
        if sum(map(len, self.pending)) >= 4 * self.keep:  # merging is dear in small portions
            self._merge()

    def _merge(self) -> None:
        log_w = torch.cat(self.pending)
        self.pending = []
        sums = torch.logsumexp(log_w, 0), torch.logsumexp(2 * log_w, 0)
        self.log_sum = torch.logaddexp(self.log_sum.to(log_w.device), sums[0])
        self.log_sum_squares = torch.logaddexp(self.log_sum_squares.to(log_w.device), sums[1])
        candidates = log_w if self.largest is None else torch.cat([self.largest, log_w])
        self.largest = candidates.movedim(0, -1).topk(min(self.keep, len(candidates)), -1).values.movedim(-1, 0)

    def results(self) -> tuple[Tensor, ...]:
        if self.pending:
            self._merge()
        assert self.largest is not None
        num, dead = self.num_samples, torch.isneginf(self.log_sum)
        ess = torch.where(dead, 0.0, (2 * self.log_sum - self.log_sum_squares).exp())
        variance = (num / ess - 1).clamp(min=0) / max(num - 1, 1)
        std_error = torch.where(dead, math.inf, variance.sqrt()) if num > 1 else torch.full_like(ess, math.inf)
        k = pareto_k(self.largest.reshape(self.keep, -1).T, num).view_as(ess)
        return self.log_sum - math.log(num), std_error, ess, k


class _PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.holders: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            pointer = tensor.untyped_storage().data_ptr() if isinstance(tensor, Tensor) else 0
            if pointer and (pointer in self.holders or pointer not in given):  # not a view of a parameter, say
                self._hold(tensor)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        self.now += 0 if self.holders.get(pointer) else size
        self.holders[pointer] = self.holders.get(pointer, 0) + 1
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._release, pointer, size)

    def _release(self, pointer: int, size: int) -> None:
        self.holders[pointer] -= 1
        if not self.holders[pointer]:
            del self.holders[pointer]
            self.now -= size


def _fitting_chunk(bytes_per_particle: float, memory: int, batch: tuple[Any, ...]) -> int:
    device = next((a.device.type for a in batch if isinstance(a, Tensor)), "cpu")
    budget = min(memory, WORKING_SET.get(device, WORKING_SET["cpu"]))
    return max(1, int(budget / max(bytes_per_particle, 1)))
