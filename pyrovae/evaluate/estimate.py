r"""What an evaluation returns: log p(x) of every datum with its error, and what it says of the data as a whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae.arguments import in_range

RELIABLE_K = 0.7
ENOUGH = 100  # draws that carry an estimate
EQUAL = 1e-3  # relative spread of the weights of a posterior-equal guide, which is rounding only


class Estimate:
    """What estimates of log p(x), one per datum with a standard error each, say of the data as a whole."""

    log_prob: Tensor
    std_error: Tensor

    @property
    def num_weights(self) -> int:
        """How many independent weights per datum the standard error was estimated from."""
        raise NotImplementedError

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        r"""The ends of an interval around each :attr:`log_prob` that covers log p(x) with probability ``level``.

        .. math:: \log \hat p \pm t_{S - 1}\, \mathrm{std\_error}

        with Student's t, for the standard error is itself estimated from S weights (or chains). It is as right as they
        are: with a Pareto k above 0.7, or chains that have not reached the posterior, it covers less.
        """
        from scipy.stats import t as student

        reach = student.ppf((1 + in_range("level", level, 0.0, 1.0)) / 2, max(self.num_weights - 1, 1))
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
        number = self.log_prob.numel()
        return (self.log_prob.std() / math.sqrt(number)).item() if number > 1 else math.nan


@dataclass(frozen=True)
class LikelihoodEstimate(Estimate):
    r"""Importance-sampling estimates :math:`\log \hat p(x_b) = \log \frac1S \sum_s w_{sb}`, in nats, float64.

    ``std_error`` is the delta-method standard error of each :math:`\log \hat p`, ``ess`` the effective sample size
    :math:`(\sum w)^2 / \sum w^2`, ``pareto_k`` the tail shape of the weights: above 0.7 neither the estimate nor its
    standard error can be trusted. Weights of latents that are all discrete have no such tail, and k is NaN; what says
    whether they can be trusted is ``carrying_draws`` (NaN elsewhere): the ESS, or how many draws hold the largest
    weight, where these are fewer and hold more than a tenth of the sum. It should be 100. All are ``[B]``, or 0-d for a
    pair with joint weights. ``draws`` are the posterior draws that were asked for, by site, ``[num_draws, B, *other
    plates, *event]`` (without B for joint weights).
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
    carrying_draws: Tensor = field(default_factory=lambda: torch.tensor(math.nan))

    @property
    def num_weights(self) -> int:
        return self.num_samples

    @property
    def unreliable(self) -> float:
        """The share of data of which :attr:`criterion` is so; weights that are all but equal are always reliable."""
        spread = self.std_error * math.sqrt(self.num_samples)
        doubtful = (self.pareto_k > RELIABLE_K) | (self.carrying_draws < ENOUGH)
        return (doubtful & (spread > EQUAL)).double().mean().item()

    @property
    def criterion(self) -> str:
        """What makes an estimate unreliable, by kind of latents."""
        discrete = self.pareto_k.isnan().any()
        return f"fewer than {ENOUGH} draws carry the weight" if discrete else f"Pareto k > {RELIABLE_K}"

    def warning(self) -> str | None:
        """What a reader must know before quoting :attr:`nll`, or None."""
        lost = int(torch.isinf(self.log_prob).sum())
        notes = [f"log p(x) is -inf for {lost} of {self.log_prob.numel()} data"] if lost else []
        if self.unreliable > 0:
            notes.append(
                f"{self.criterion} for {self.unreliable:.1%} of the data: neither their log p(x) nor "
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
        seed = "" if self.seed is None else self.seed
        return arviz.InferenceData(
            **groups,
            attrs={"num_samples": self.num_samples, "seed": seed, "dtype": self.dtype},
            log_likelihood=table(log_prob=self.log_prob),
            sample_stats=table(
                std_error=self.std_error,
                ess=self.ess,
                pareto_k=self.pareto_k,
                carrying_draws=self.carrying_draws.expand_as(self.ess),
            ),
        )


@dataclass(frozen=True)
class AISEstimate(Estimate):
    r"""Annealed estimates :math:`\log \hat p(x_b) = \log \frac1C \sum_c w_{cb}` in nats, float64, each ``[B]``.

    ``std_error`` is the delta-method standard error over chains, ``ess`` the effective number of chains,
    ``acceptance`` the mean acceptance rate of the transitions.
    """

    log_prob: Tensor
    std_error: Tensor
    ess: Tensor
    acceptance: Tensor
    num_chains: int
    num_temperatures: int
    seed: int | None
    dtype: str
    path: str = "eager"

    @property
    def num_weights(self) -> int:
        return self.num_chains

    def __str__(self) -> str:
        return (
            f"NLL {self.nll:.2f} ± {self.nll_std_error:.2g} nats by AIS, {self.num_chains} chains, "
            f"{self.num_temperatures} temperatures, acceptance {self.acceptance.mean():.2f}"
        )


class Bracket(NamedTuple):
    """Stochastic bounds on log p(x) of data simulated from a model, in nats: ``lower`` and ``upper``, each ``[n]``."""

    lower: AISEstimate
    upper: AISEstimate

    @property
    def gap(self) -> float:
        """Mean of upper - lower: what the log-likelihoods, and any that AIS finds on real data, may be off by."""
        return (self.upper.log_prob - self.lower.log_prob).mean().item()
