r"""log p(x) by annealed importance sampling, and its bracket by bidirectional Monte Carlo."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pyrovae.arguments import in_range, one_of, positive_int, rising_betas
from pyrovae.compile.checked import SAVED, Checked, check_compile, tensors_of, wanted
from pyrovae.engine.enumerate import summed_out
from pyrovae.engine.generate import Written, generate, program_of, refuse_tied
from pyrovae.engine.particles import Layout, Particles
from pyrovae.engine.probe import Look, unlike
from pyrovae.engine.programs import Batch, Program, nothing, rows, warn
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.run import run_at, run_each_at
from pyrovae.engine.sites import Sites, counted, latent
from pyrovae.engine.unwrap import unconstrained
from pyrovae.engine.weights import Sums
from pyrovae.engine.whole import Whole, refuse_part
from pyrovae.errors import is_out_of_memory
from pyrovae.evaluate.estimate import AISEstimate, Bracket
from pyrovae.evaluate.hmc import HMC, LogDensity, State
from pyrovae.evaluate.measuring import Batches, measuring
from pyrovae.evaluate.movable import refuse_immovable, unmasked_latents
from pyrovae.evaluate.sharing import Sharing
from pyrovae.sampling import blank

HANDLERS = 1.5e-3  # seconds that compiling saves per evaluation of the gradient, whatever the size: Pyro's handlers


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
    annealer = Annealer(num_chains, num_temperatures, leapfrog_steps, schedule, target_acceptance, compile)
    batch_size = None if batch_size is None else positive_int("batch_size", batch_size)
    program = program_of(model)
    data = Batches(program, guide, args, kwargs, batch_size, seed=seed, title="AIS", progress=progress)
    parts: list[tuple[Tensor, ...]] = []
    sharing = Sharing(kwargs)

    def annealed(part: Batch, first: int) -> tuple[Tensor, ...]:
        with sharing.drawing(annealer.short(), part, num_chains):
            return annealer(part)

    with data:
        for batch in data:
            if not parts:
                annealer.prepare(program, guide, data.seen, batch, kwargs, data.total or rows(batch, kwargs))
                sharing.begin(data.seen, batch)
            parts.append(sharing(batch, annealed))
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

    Factors, and observations that stay as they are, must not depend on latents: the latents simulated with a datum
    would be no draws from their posterior, and the upper bound none.

    :param n: how many data to simulate.
    :param like: data as the model takes them, for its shape; see :func:`pyrovae.sample`.

    :raises ValueError: for a factor or an observation, by name, that depends on a latent.

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
    annealer = Annealer(num_chains, num_temperatures, leapfrog_steps, schedule, target_acceptance, compile)
    program = program_of(model)
    with measuring(program, seed=seed), Whole() as whole:
        redraw = Written(blank(program, positive_int("n", n), like, args, kwargs))
        whole.look(program, None, (redraw.x, *args), kwargs, validate=False)
        simulated, data = generate(program, (redraw.x, *args), kwargs, redraw)
        drawn = {data["name"]} if data else redraw.names.keys()  # or all of x, by several sites
        batch = (data["value"] if data else redraw.x, *args)
        refuse_tied(program, batch, kwargs, drawn)
        truth = {name: site["value"] for name, site in latent(simulated).items() if name not in drawn}
        annealer.prepare(program, None, whole.look(program, None, batch, kwargs), batch, kwargs, 2 * n)
        lower, upper = annealer(batch), annealer(batch, truth)
    return Bracket(annealer.estimate([lower], seed), annealer.estimate([upper], seed, sign=-1))


def make_betas(schedule: str | Sequence[float], temperatures: int) -> list[float]:
    """Inverse temperatures from 0 to 1, ``temperatures`` + 1 of them."""
    if not isinstance(schedule, str):
        return rising_betas(schedule)
    t = torch.linspace(0, 1, temperatures + 1, dtype=torch.float64)
    if one_of("schedule", schedule, ("sigmoid", "linear")) == "sigmoid":
        t = torch.sigmoid(4.0 * (2 * t - 1))
        t = (t - t[0]) / (t[-1] - t[0])
    return t.tolist()


class Annealer:
    r"""Chains that go, batch by batch and in unconstrained space, from :math:`q_0` to the joint: :math:`f_\beta`."""

    def __init__(
        self,
        num_chains: int,
        num_temperatures: int,
        leapfrog_steps: int,
        schedule: str | Sequence[float],
        target: float,
        compile: bool | str,
    ) -> None:
        self.num_chains = positive_int("num_chains", num_chains, minimum=2)
        self.leapfrog_steps = positive_int("leapfrog_steps", leapfrog_steps)
        check_compile(compile)
        self.compile, self.target = compile, in_range("target_acceptance", target, 0.01, 0.99)
        self.betas = make_betas(schedule, positive_int("num_temperatures", num_temperatures))
        self.last, self.dtype, self.apart = len(self.betas) - 1, torch.float32, False

    def prepare(
        self, model: Program, guide: Program | None, seen: Look, batch: Batch, kwargs: Mapping[str, object], number: int
    ) -> None:
        """Check what was seen; decide, where it is "auto", from counts alone whether gradients are compiled."""
        self.model, self.guide, self.source = model, guide or nothing, guide or model
        self.kwargs = kwargs
        refuse_part(seen)
        refuse_immovable(seen, model, guide, batch, kwargs)
        sites = self.like = latent(seen.model)
        self.nesting, self.sums, state = seen.nesting, seen.sums, tensors_of(seen.modules)
        maps = {name: unconstrained(site["fn"].support) for name, site in sites.items()}
        self.maps = {name: transform for name, transform in maps.items() if transform is not None}
        self.event_dims = {n: (self.maps[n].domain if n in self.maps else s["fn"]).event_dim for n, s in sites.items()}
        each = HANDLERS + SAVED * self.num_chains * rows(batch, kwargs) * sum(t.numel() for t in state)
        evaluations = (self.last + 1) * (self.leapfrog_steps + 1) * -(-number // rows(batch, kwargs))
        self.slope = Checked(self.evaluated, state, wanted=wanted(self.compile, evaluations * each))
        numbers = {self.num_chains, unlike(self.num_chains, seen.sizes)}
        self.apart = not all(self.runs_together(batch, number) for number in numbers)

    def run(self, program: Program, batch: Batch, values: State) -> Sites:
        """The sites of a program with all chains at these latents, after sums, or at fresh ones."""
        sums, chains = self.sums and bool(values), (self.num_chains, self.nesting)
        if self.apart:
            return run_each_at(program, batch, self.kwargs, values, self.like, *chains, sums=sums)
        return summed_out(*run_at(program, batch, self.kwargs, values, *chains, sums=sums))

    def runs_together(self, batch: Batch, number: int) -> bool:
        """Whether the programs take so many chains at once; after a warning, those that do not take one at a time."""
        trial = copy.copy(self)
        trial.num_chains = number
        try:
            with isolated_rng():
                trial.ends(batch, u := trial.start(batch))
                trial.particles(batch, trial.valued(u)).check_dims()
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            warn(
                "chains run one after the other, because together they fail "
                f"({type(error).__name__}: {' '.join(str(error).split())})"
            )
            return False
        return True

    def start(self, batch: Batch) -> State:
        """Chains drawn from q_0."""
        sites = self.run(self.source, batch, {})
        return self.pulled_back({name: sites[name]["value"] for name in self.event_dims})

    def pulled_back(self, values: State) -> State:
        """Latents that are moved, in unconstrained space."""
        return {n: self.maps[n].inv(values[n]) if n in self.maps else values[n].clone() for n in self.event_dims}

    def valued(self, u: State) -> State:
        """Latents of chains in unconstrained space."""
        return {name: self.maps[name](point) if name in self.maps else point for name, point in u.items()}

    def particles(self, batch: Batch, values: State) -> Particles:
        """A run of the pair with all chains at these latents."""
        drawn, sites = (unmasked_latents(self.run(own, batch, values)) for own in (self.guide, self.model))
        return Particles.of(drawn, sites, self.num_chains, -1 - self.nesting)

    def ends(self, batch: Batch, u: State) -> tuple[Tensor, Tensor, Tensor | float]:
        """log q_0, log p(x, z) and log |dz / du|, each ``[C, *plates]``."""
        particles = self.particles(batch, values := self.valued(u))
        guide, prior, likelihood = particles.log_guide(), particles.log_prior(), particles.log_likelihood()
        assert prior is not None
        joint = prior if likelihood is None else prior + likelihood
        volumes = [t.log_abs_det_jacobian(u[name], values[name]) for name, t in self.maps.items()]
        layout = particles.layout
        return prior if guide is None else guide, joint, sum(layout.expand(layout.reduce(v)) for v in volumes)

    def evaluated(self, names: tuple[str, ...], beta: Tensor, *points_and_batch: Any) -> list[Tensor]:
        """log f_beta with the volume, log p - log q_0, and the gradient of the first in every latent."""
        points, batch = points_and_batch[: len(names)], points_and_batch[len(names) :]
        with torch.enable_grad():
            leaves = {name: point.detach().requires_grad_() for name, point in zip(names, points, strict=True)}
            start, joint, volume = self.ends(batch, leaves)
            tempered = (1 - beta) * start + beta * joint + volume
            gradients = torch.autograd.grad(tempered.sum(), list(leaves.values()))
        return [tempered.detach(), joint.detach() - start.detach(), *gradients]

    def __call__(self, batch: Batch, truth: State | None = None) -> tuple[Tensor, Tensor]:
        """Anneal upwards from q_0: log w ``[C, *plates]`` in float64, and the mean acceptance ``[*plates]``.

        From ``truth``, the latents that made the data, chains go downwards, and what comes back is log w'.
        """
        order = list(range(self.last + 1))

        def density(t: int) -> LogDensity:
            return lambda u: self.slope(tuple(u), betas[t], *u.values(), *batch)

        layout = Layout.around(
            counted(self.run(self.model, batch, {})), num_particles=self.num_chains, particle_dim=-1 - self.nesting
        )
        hmc = HMC(layout, self.event_dims, self.leapfrog_steps)
        u = self.start(batch)
        _, joint, _ = self.ends(batch, u)
        self.dtype, betas = joint.dtype, joint.new_tensor(self.betas)  # one copy: each would wait for the device
        steps = hmc.pilot(density, self.last, u, torch.full_like(joint[:1], math.log(0.1)), self.target)

        u = self.start(batch)
        if truth is not None:
            exact, order = self.pulled_back(truth), order[::-1]
            u = {name: exact[name].expand_as(point).clone() for name, point in u.items()}
        start, joint, _ = self.ends(batch, u)
        ratio, log_w = joint - start, torch.zeros_like(joint, dtype=torch.float64)
        accepted = torch.zeros_like(log_w[0])
        for before, now in pairwise(order):
            log_w = log_w + (self.betas[now] - self.betas[before]) * ratio.double()
            if now != order[-1]:  # where the chains end does not matter
                u, ratio, accept = hmc.transition(density(now), u, steps[now - 1])
                accepted = accepted + accept.double().mean(0)
        return log_w, accepted / max(self.last - 1, 1)

    def short(self) -> Annealer:
        """Chains that draw what these do, over two temperatures."""
        other = copy.copy(self)
        other.betas, other.last = self.betas[:3], min(self.last, 2)
        other.slope = Checked(self.slope.function, self.slope.state, wanted=False)
        return other

    def estimate(self, parts: Sequence[tuple[Tensor, ...]], seed: int | None, sign: int = 1) -> AISEstimate:
        """What the weights of all batches say."""
        sums = Sums.of(torch.cat([log_w for log_w, _ in parts], -1))
        acceptance = torch.cat([accepted.reshape(-1) for _, accepted in parts])
        return AISEstimate(
            sign * sums.log_mean, sums.std_error, sums.ess, acceptance, self.num_chains, self.last, seed,
            str(self.dtype).removeprefix("torch."), self.slope.kind,
        )  # fmt: skip
