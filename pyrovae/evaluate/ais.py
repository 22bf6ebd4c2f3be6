r"""log p(x) by annealed importance sampling, and its bracket by bidirectional Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyrovae import data as datasets
from pyrovae.arguments import in_range, one_of, positive_int, rising_betas
from pyrovae.compile.checked import Checked, check_compile, distinct, wanted
from pyrovae.compile.precision import full_float32
from pyrovae.engine.generate import Redraw, generate, program_of
from pyrovae.engine.particles import Particles
from pyrovae.engine.probe import nesting
from pyrovae.engine.programs import Program, device_of, evaluating, protected_buffers, reached_modules
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.sites import PARTICLE_PLATE, ParticlePlate, Record, Sites, latent, quoted
from pyrovae.engine.unwrap import is_masked, point_mass, unconstrained
from pyrovae.evaluate.estimate import AISEstimate, Bracket
from pyrovae.evaluate.likelihood import SAVED
from pyrovae.progress import ProgressBar
from pyrovae.sampling import blank

State = dict[str, Tensor]


_STEEPNESS = 4.0  # of the sigmoid schedule


_WARM_UP, _VISITS, _TRIES = 40, 100, 2  # of the pilot run: transitions at first, temperatures visited, at each


_GAINS = 0.5, 0.2  # of log step size per unit of acceptance, at first and later


_HANDLERS = 1.5e-3  # seconds that compiling saves per evaluation of the gradient, whatever the size: Pyro's handlers


def ais_log_likelihood(
    model: Program,
    *args: Any,
    guide: Program | None = None,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    leapfrog_steps: int = 10,
    schedule: str | Sequence[float] = "sigmoid",
    target_acceptance: float = 0.65,
    seed: int | None = None,
    batch_size: int | None = None,
    compile: bool | str = "auto",
    progress: bool | None = False,
    **kwargs: Any,
) -> AISEstimate:
    r"""Estimate :math:`\log p(x)` of every datum by annealing from the prior (or a guide) to the posterior.

    .. math:: f_\beta(z) = q_0(z)^{1 - \beta}\, p(x, z)^\beta, \qquad
              \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1}) \big[\log p(x, z_{t-1}) - \log q_0(z_{t-1})\big]

    with :math:`z_0 \sim q_0` and :math:`z_t` from :math:`z_{t-1}` by Hamiltonian Monte Carlo that leaves
    :math:`f_{\beta_t}` invariant. It needs no good guide: where importance sampling says that its weights cannot be
    trusted, this can. In expectation :math:`\log \frac1C \sum_c w_c` is a lower bound of log p(x); :func:`bdmc`
    brackets it. Step sizes are found per datum and temperature by a pilot run and then held, so that the weights stay
    unbiased. Constrained latents are moved in unconstrained space.

    :param model: a Pyro model with continuous latents, or a pair (its ``.model`` is run).
    :param args: what it takes, as for :func:`pyrovae.log_likelihood`; a Dataset or DataLoader is batched.
    :param guide: where to start, instead of the prior: a program that draws the latents from a density.
    :param num_chains: C, per datum.
    :param num_temperatures: T, transitions per chain.
    :param leapfrog_steps: of each transition.
    :param schedule: "sigmoid" (Wu et al.), "linear", or betas that rise from 0 to 1 (T + 1 of them).
    :param target_acceptance: that the pilot run adapts step sizes to.
    :param seed: isolates and seeds; None takes torch's global generator.
    :param batch_size: data at a time; None takes tensors whole, and 100 of a Dataset.
    :param compile: True for one compiled graph of the gradient; "auto" where there are enough temperatures for it.
    :param progress: show a progress bar; None shows it on terminals only.
    :raises ValueError: for a discrete latent, or one without a density (named); a guide that draws other sites.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
    >>> x = torch.tensor([0.0, 2.0])
    >>> found = ais_log_likelihood(model, x, num_temperatures=50, seed=0)
    >>> exact = dist.Normal(0.0, 1.25**0.5).log_prob(x)
    >>> bool(((found.log_prob - exact).abs() < 5 * found.std_error).all())
    True

    Neal (2001), *Annealed importance sampling*; Wu et al. (2017), *On the quantitative analysis of decoder-based
    generative models*.
    """
    settings = _Settings.checked(num_chains, num_temperatures, leapfrog_steps, schedule, target_acceptance, compile)
    batch_size = None if batch_size is None else positive_int("batch_size", batch_size)
    program = program_of(model)
    device = device_of(program)
    total = len(args[0]) if len(args) == 1 and isinstance(args[0], datasets.Images) else None
    parts = []
    with _quiet(seed, program, *([guide] if guide else [])), ProgressBar("AIS", total, progress) as bar:
        annealer = None
        for batch in datasets.batches(args, batch_size, seed=seed or 0, device=device):
            if annealer is None:
                annealer = _Annealer(program, guide, batch, kwargs, settings, number=total or len(batch[0]))
            parts.append(annealer.forward(batch))
            bar.update(sum(accepted.numel() for _, accepted in parts), "data")
    if annealer is None:
        raise datasets.DataError("there are no data to evaluate: pass at least one datum")
    return annealer.estimate(parts, seed)


def bdmc(
    model: Program,
    n: int,
    *args: Any,
    like: Any = None,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    leapfrog_steps: int = 10,
    schedule: str | Sequence[float] = "sigmoid",
    target_acceptance: float = 0.65,
    seed: int | None = None,
    compile: bool | str = "auto",
    **kwargs: Any,
) -> Bracket:
    r"""Bracket log p(x) of ``n`` data that the model itself generates.

    A datum simulated with its latents is an exact draw from the posterior, so that annealing can also run backwards,
    from the posterior to the prior, where :math:`-\log \frac1C \sum_c w'_c` is an *upper* bound in expectation:

    .. math:: \mathbb E \log \tfrac1C \textstyle\sum_c w_c \;\le\; \log p(x) \;\le\;
              \mathbb E \big[{-\log} \tfrac1C \textstyle\sum_c w'_c\big]

    The gap bounds the error of both. As long as the model fits the data, it says how far
    :func:`ais_log_likelihood` with the same settings can be trusted on them.

    :param n: how many data to simulate.
    :param like: data as the model takes them, for its shape; see :func:`pyrovae.sample`.

    All else is as for :func:`ais_log_likelihood`.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
    >>> bool(abs(bdmc(model, 20, like=torch.zeros(1), num_temperatures=100, seed=0).gap) < 0.05)
    True

    Grosse, Ghahramani and Adams (2015), *Sandwiching the marginal likelihood using bidirectional Monte Carlo*.
    """
    settings = _Settings.checked(num_chains, num_temperatures, leapfrog_steps, schedule, target_acceptance, compile)
    program = program_of(model)
    with _quiet(seed, program):
        redraw = Redraw(blank(program, positive_int("n", n), like))
        simulated, data = generate(program, (redraw.x, *args), kwargs, redraw)
        batch = (data["value"], *args)
        truth = {name: site["value"] for name, site in latent(simulated).items() if site is not data}
        annealer = _Annealer(program, None, batch, kwargs, settings, number=2 * n)
        lower = annealer.forward(batch)
        upper = annealer.backward(batch, truth)
    return Bracket(annealer.estimate([lower], seed), annealer.estimate([upper], seed, sign=-1))


class _Settings(NamedTuple):
    num_chains: int
    betas: list[float]
    leapfrog_steps: int
    target: float
    compile: bool | str

    @classmethod
    def checked(cls, chains: Any, temperatures: Any, steps: Any, schedule: Any, target: Any, compile: Any) -> _Settings:
        chains = positive_int("num_chains", chains, minimum=2)
        steps = positive_int("leapfrog_steps", steps)
        check_compile(compile)
        target = in_range("target_acceptance", target, 0.01, 0.99)
        return cls(chains, make_betas(schedule, positive_int("num_temperatures", temperatures)), steps, target, compile)


def make_betas(schedule: str | Sequence[float], temperatures: int) -> list[float]:
    """Inverse temperatures from 0 to 1, ``temperatures`` + 1 of them."""
    if not isinstance(schedule, str):
        return rising_betas(schedule)
    t = torch.linspace(0, 1, temperatures + 1, dtype=torch.float64)
    if one_of("schedule", schedule, ("sigmoid", "linear")) == "sigmoid":
        t = torch.sigmoid(_STEEPNESS * (2 * t - 1))
        t = (t - t[0]) / (t[-1] - t[0])
    return t.tolist()


def _quiet(seed: int | None, *programs: Program) -> ExitStack:
    """Where measuring happens: seeded, in eval mode, at full precision, without gradients to the parameters."""
    stack = ExitStack()
    if seed is not None:
        stack.enter_context(isolated_rng(seed))
    for context in (torch.no_grad(), full_float32(), evaluating(*programs)):
        stack.enter_context(context)
    return stack


class _Annealer:
    """Chains of one model, batch by batch, moved by Hamiltonian Monte Carlo in unconstrained space."""

    def __init__(
        self,
        model: Program,
        guide: Program | None,
        batch: tuple[Any, ...],
        kwargs: dict[str, Any],
        settings: _Settings,
        *,
        number: int,
    ) -> None:
        self.model, self.guide, self.kwargs, self.settings = model, guide, kwargs, settings
        with protected_buffers(), isolated_rng(), reached_modules(model, *([guide] if guide else [])) as modules:
            with Record() as record:
                model(*batch, **kwargs)
            self.probed = Particles.of({}, record.sites)
            self._check(record.sites, batch)
        state = distinct(t for m in modules for t in (*m.parameters(), *m.buffers()))
        self.nesting = nesting(self.probed)
        self.maps: dict[str, Any] = {
            name: unconstrained(site["fn"].support) for name, site in latent(record.sites).items()
        }
        self.event_dims = {
            name: site["fn"].event_dim if self.maps[name] is None else self.maps[name].domain.event_dim
            for name, site in latent(record.sites).items()
        }
        evaluations = len(settings.betas) * (settings.leapfrog_steps + 1) * -(-number // len(batch[0]))
        rows = settings.num_chains * len(batch[0])
        saved = evaluations * (_HANDLERS + SAVED * rows * sum(t.numel() for t in state))
        self.slope = Checked(self._slope, state, wanted=wanted(settings.compile, saved))
        self.dtype = "float32"

    def _check(self, sites: Sites, batch: tuple[Any, ...]) -> None:
        hidden = latent(sites)
        if not hidden:
            raise ValueError("the model has no latents to anneal: its log p(x) is exact, use pyrovae.log_likelihood")
        for name, site in hidden.items():
            if site["fn"].support.is_discrete:
                raise ValueError(f'latent site "{name}" is discrete, and HMC moves continuous ones only: enumerate it')
            if point_mass(site["fn"]) is not None or site["mask"] is not None or is_masked(site["fn"]):
                raise ValueError(f'latent site "{name}" has no prior density: the model has no log p(x)')
        if self.guide is not None:
            with Record() as record:
                self.guide(*batch, **self.kwargs)
            drawn = latent(record.sites)
            if drawn.keys() != hidden.keys() or any(point_mass(site["fn"]) is not None for site in drawn.values()):
                raise ValueError(
                    f"to start from a guide it must draw {quoted(hidden)} from densities, and nothing else; it has "
                    f"{quoted(drawn)}: leave guide out to start from the prior"
                )

    # --- densities -------------------------------------------------------------------------------------------------

    def _run(self, program: Program, batch: tuple[Any, ...], values: State) -> Sites:
        plate = ParticlePlate(PARTICLE_PLATE, self.settings.num_chains, dim=-1 - self.nesting)
        with pyro.validation_enabled(False), Record(values) as record, plate:
            program(*batch, **self.kwargs)
        return record.sites

    def _particles(self, guide: Sites, model: Sites) -> Particles:
        return Particles.of(guide, model, self.settings.num_chains, -1 - self.nesting)

    def _densities(self, batch: tuple[Any, ...], u: State) -> tuple[Tensor, Tensor, Tensor | float]:
        """log q_0, log p(x, z) and log |dz / du| at unconstrained latents, each ``[C, *plates]``."""
        values, volumes = {}, {}
        for name, point in u.items():
            transform = self.maps[name]
            values[name] = point if transform is None else transform(point)
            if transform is not None:
                volumes[name] = transform.log_abs_det_jacobian(point, values[name])
        guide = {} if self.guide is None else self._run(self.guide, batch, values)
        particles = self._particles(guide, self._run(self.model, batch, values))
        prior, likelihood = particles.log_prior(), particles.log_likelihood()
        joint = prior if likelihood is None else prior + likelihood  # type: ignore[operator]
        volume = sum(particles.layout.expand(particles.layout.reduce(v)) for v in volumes.values())
        start = prior if self.guide is None else particles.log_guide()
        assert start is not None
        assert joint is not None
        return start, joint, volume

    def _slope(self, names: tuple[str, ...], beta: Tensor, *given: Any) -> list[Tensor]:
        """log q_0, log p(x, z), log f_beta with the volume, and the gradient of the last in every latent."""
        points, batch = given[: len(names)], given[len(names) :]
        with torch.enable_grad():
            leaves = {name: point.detach().requires_grad_() for name, point in zip(names, points, strict=True)}
            start, joint, volume = self._densities(batch, leaves)
            tempered = (1 - beta) * start + beta * joint + volume
            gradients = torch.autograd.grad(tempered.sum(), list(leaves.values()))
        return [start.detach(), joint.detach(), tempered.detach(), *gradients]

    def _evaluate(self, batch: tuple[Any, ...], beta: Tensor, u: State) -> list[Tensor]:
        return self.slope(tuple(u), beta, *u.values(), *batch)

    # --- chains ----------------------------------------------------------------------------------------------------

    def _start(self, batch: tuple[Any, ...]) -> State:
        """Chains drawn from q_0, in unconstrained space."""
        sites = self._run(self.model if self.guide is None else self.guide, batch, {})
        return self._pulled_back({name: site["value"] for name, site in latent(sites).items()})

    def _pulled_back(self, values: State) -> State:
        return {n: v.clone() if self.maps[n] is None else self.maps[n].inv(v) for n, v in values.items()}

    def _transition(self, batch: tuple[Any, ...], beta: Tensor, u: State, step: Tensor) -> tuple[State, Tensor, Tensor]:
        """One HMC step that leaves f_beta invariant; the new state, log p - log q_0 there, and who accepted."""
        spread = {name: self._spread(step, name) for name in u}
        momentum = {name: torch.randn_like(point) for name, point in u.items()}
        start, joint, before, *slopes = self._evaluate(batch, beta, u)
        energy = before - self._kinetic(momentum)
        moved, p = dict(u), momentum
        for _ in range(self.settings.leapfrog_steps):
            p = {n: p[n] + 0.5 * spread[n] * g for n, g in zip(u, slopes, strict=True)}
            moved = {n: moved[n] + spread[n] * p[n] for n in u}
            new_start, new_joint, after, *slopes = self._evaluate(batch, beta, moved)
            p = {n: p[n] + 0.5 * spread[n] * g for n, g in zip(u, slopes, strict=True)}
        log_ratio = (after - self._kinetic(p) - energy).nan_to_num(-math.inf)
        accept = torch.rand_like(log_ratio).log() < log_ratio
        kept = {n: torch.where(self._spread(accept, n), moved[n], u[n]) for n in u}
        return kept, torch.where(accept, new_joint - new_start, joint - start), accept

    def _spread(self, weights: Tensor, name: str) -> Tensor:
        """A number per chain and datum, shaped to multiply the site's unconstrained value."""
        return self.layout.spread(weights, self.event_dims[name])

    def _kinetic(self, momentum: State) -> Tensor:
        parts = [self.layout.reduce(sum_rightmost(0.5 * p.square(), self.event_dims[n])) for n, p in momentum.items()]
        return self.layout.expand(sum(parts))  # type: ignore[arg-type]

    def _prepare(self, batch: tuple[Any, ...]) -> tuple[State, Tensor]:
        """Fresh chains and the step sizes of all temperatures, ``[T, *plates]``, by a pilot run."""
        self.layout = self._particles({}, self._run(self.model, batch, {})).layout
        u = self._start(batch)
        _, joint, _ = self._densities(batch, u)
        self.dtype = str(joint.dtype).removeprefix("torch.")
        last = len(self.settings.betas) - 1
        visited = sorted({round(1 + (last - 1) * i / _VISITS) for i in range(_VISITS + 1)})
        log_step, found = torch.full_like(joint[:1], math.log(0.1)), []
        for t in visited:
            gain = _GAINS[t > 1]
            for _ in range(_TRIES if t > 1 else _WARM_UP):
                u, _, accept = self._transition(batch, joint.new_tensor(self.settings.betas[t]), u, log_step.exp())
                log_step = log_step + gain * (accept.to(joint.dtype).mean(0, keepdim=True) - self.settings.target)
            found.append(log_step)
        table = _smoothed(torch.stack(found))
        at = torch.tensor(visited, device=table.device)
        index = torch.searchsorted(at, torch.arange(1, last + 1, device=table.device))
        return self._start(batch), table[index].exp()

    def forward(self, batch: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """log w ``[C, *plates]`` in float64, and the mean acceptance ``[*plates]``."""
        u, steps = self._prepare(batch)
        start, joint, _ = self._densities(batch, u)
        ratio, log_w = joint - start, torch.zeros_like(joint, dtype=torch.float64)
        accepted = torch.zeros_like(log_w[0])
        for t in range(1, len(self.settings.betas)):
            beta, before = self.settings.betas[t], self.settings.betas[t - 1]
            log_w = log_w + (beta - before) * ratio.double()
            if t < len(self.settings.betas) - 1:  # where the chains end does not matter
                u, ratio, accept = self._transition(batch, joint.new_tensor(beta), u, steps[t - 1])
                accepted = accepted + accept.double().mean(0)
        return log_w, accepted / max(len(self.settings.betas) - 2, 1)

    def backward(self, batch: tuple[Any, ...], truth: State) -> tuple[Tensor, Tensor]:
        """log w' of chains that begin at the latents which made the data, down to the prior."""
        u, steps = self._prepare(batch)
        exact = self._pulled_back(truth)
        u = {name: exact[name].expand_as(point).clone() for name, point in u.items()}
        start, joint, _ = self._densities(batch, u)
        ratio, log_w = joint - start, torch.zeros_like(joint, dtype=torch.float64)
        accepted = torch.zeros_like(log_w[0])
        for t in range(len(self.settings.betas) - 1, 0, -1):
            beta, below = self.settings.betas[t], self.settings.betas[t - 1]
            if t < len(self.settings.betas) - 1:  # the first state is exact
                u, ratio, accept = self._transition(batch, joint.new_tensor(beta), u, steps[t - 1])
                accepted = accepted + accept.double().mean(0)
            log_w = log_w - (beta - below) * ratio.double()
        return log_w, accepted / max(len(self.settings.betas) - 2, 1)

    def estimate(self, parts: list[tuple[Tensor, Tensor]], seed: int | None, sign: int = 1) -> AISEstimate:
        """What the weights of all batches say."""
        log_w = torch.cat([w for w, _ in parts], -1)
        acceptance = torch.cat([a.reshape(-1) if a.dim() else a.reshape(1) for _, a in parts])
        num = len(log_w)
        log_sum, log_squares = torch.logsumexp(log_w, 0), torch.logsumexp(2 * log_w, 0)
        dead = torch.isneginf(log_sum)
        ess = torch.where(dead, 0.0, (2 * log_sum - log_squares).exp())
        std_error = torch.where(dead, math.inf, ((num / ess - 1).clamp(min=0) / (num - 1)).sqrt())
        return AISEstimate(
            sign * (log_sum - math.log(num)), std_error, ess, acceptance, num, len(self.settings.betas) - 1, seed,
            self.dtype, self.slope.path,
        )  # fmt: skip


def _smoothed(table: Tensor) -> Tensor:
    """Each row averaged with those before and after it: the pilot's steps scatter."""
    window, rows = 5, len(table)
    low = [max(0, i - window) for i in range(rows)]
    high = [min(rows, i + window + 1) for i in range(rows)]
    return torch.stack([table[a:b].mean(0) for a, b in zip(low, high, strict=True)])
