r"""What an evaluation returns: log p(x) of every datum with its error, and what it says of the data as a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pyrovae.arguments import in_range
from pyrovae.errors import NumericalError
from pyrovae.html import table

RELIABLE_K = 0.7
ENOUGH = 100  # draws that carry an estimate
DRAWS, SPREAD = 100, 1e-9  # of log p(x) in ArviZ's tables
EQUAL = 1e-3  # relative spread of the weights of a posterior-equal guide, which is rounding only


class Estimate:
    """What estimates of log p(x), one per datum with a standard error each, say of the data as a whole."""

    log_prob: Tensor
    std_error: Tensor

    def __post_init__(self) -> None:
        if number := int(self.log_prob.isnan().sum()):
            raise NumericalError(
                f"log p(x) of {number} of {self.log_prob.numel()} data is NaN: check that data and weights are finite"
            )

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

    #: The columns besides ``log_prob``, and what says how they were found.
    columns: ClassVar[tuple[str, ...]]
    settings: ClassVar[tuple[str, ...]]
    draws: Mapping[str, Tensor] = MappingProxyType({})

    def to_arviz(self) -> Any:
        r"""The estimates for ArviZ: the groups ``log_likelihood``, ``sample_stats``, and ``posterior``, the draws.

        They are an ``xarray.DataTree`` with ArviZ 1, an ``arviz.InferenceData`` with ArviZ 0.23.
        Parameters are a point and latents are integrated out, so that the density of a datum given all others is its
        own, :math:`\hat p(x_b)`, at every draw: ``arviz.loo`` gives
        :math:`\mathrm{elpd} = \sum_b \log \hat p(x_b)`, and ``arviz.compare`` compares models by it.

        >>> table = AISEstimate(*torch.full((4, 50), -1.5), 16, 1000, 0, "float32").to_arviz()
        >>> round(float(table.log_likelihood.log_prob.mean(("chain", "draw")).sum()), 6)
        -75.0
        """
        import arviz
        import xarray

        # Without any spread ArviZ finds no tail to fit, and warns.
        point = self.log_prob.reshape(1, 1, -1).cpu() + SPREAD * torch.linspace(-1, 1, DRAWS)[:, None]
        each = {name: getattr(self, name).expand_as(self.log_prob).reshape(-1).cpu() for name in self.columns}
        kept = self.draws or {"point": torch.zeros(DRAWS)}
        posterior = {name: value.unsqueeze(0).cpu().numpy() for name, value in kept.items()}
        local = {name: ["datum"] for name in self.draws if self.log_prob.dim() == 1}
        attrs = {name: "" if (value := getattr(self, name)) is None else value for name in self.settings}
        groups = {
            "posterior": arviz.dict_to_dataset(posterior, dims=local),
            "log_likelihood": xarray.Dataset({"log_prob": (("chain", "draw", "datum"), point.numpy())}),
            "sample_stats": xarray.Dataset({name: ("datum", value.numpy()) for name, value in each.items()}),
        }
        if "InferenceData" in vars(arviz):
            return arviz.InferenceData(attrs=attrs, **groups)
        return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=attrs), **groups})

    def warning(self) -> str | None:
        """What a reader must know before quoting :attr:`nll`, or None."""
        return None

    def _repr_html_(self) -> str:
        values = {name: getattr(self, name).double().flatten() for name in ("log_prob", *self.columns)}
        rows = [
            (name, v.min().item(), v.median().item(), v.max().item())
            for name, v in values.items()
            if v.isfinite().any()
        ]
        return table(str(self), ["", "least", "median", "most"], rows, self.warning())

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
    draws: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    carrying_draws: Tensor = field(default_factory=lambda: torch.tensor(math.nan))
    columns: ClassVar = ("std_error", "ess", "pareto_k", "carrying_draws")
    settings: ClassVar = ("num_samples", "seed", "dtype")

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
    columns: ClassVar = ("std_error", "ess", "acceptance")
    settings: ClassVar = ("num_chains", "num_temperatures", "seed", "dtype")

    @property
    def num_weights(self) -> int:
        return self.num_chains

    def __str__(self) -> str:
        return (
            f"NLL {self.nll:.2f} ± {self.nll_std_error:.2g} nats by AIS, {self.num_chains} chains, median ESS "
            f"{self.ess.median().item():.0f}, {self.num_temperatures} temperatures, acceptance "
            f"{self.acceptance.mean():.2f}"
        )


class Bracket(NamedTuple):
    """Stochastic bounds on log p(x) of data simulated from a model, in nats: ``lower`` and ``upper``, each ``[n]``."""

    lower: AISEstimate
    upper: AISEstimate

    @property
    def gap(self) -> float:
        """Mean of upper - lower: what the log-likelihoods, and any that AIS finds on real data, may be off by."""
        return (self.upper.log_prob - self.lower.log_prob).mean().item()
