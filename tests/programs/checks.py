"""What must be true of a program under an objective, each told as "ok", "-" where it has no meaning, or what is wrong.

Pyro's own objectives, and bounds written by hand, say what is right.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar
from unittest.mock import patch

import pyro
import pyro.infer
import torch
from pyro import poutine
from torch import Tensor
from torch.utils.data import DataLoader

import pyrovae as pv
from pyrovae.compile import checked, inductor
from pyrovae.compile import graph as graphs
from tests.laws.objectives import hand_groups, hand_iwae, hand_mean, hand_power
from tests.programs.registry import Pair, make

T = TypeVar("T")
K = 4
BETAS = (0.0, 0.3, 1.0)


def hand_tvo(log_w: Tensor) -> Tensor:
    terms = [(b - a) * (torch.softmax(a * log_w, 0) * log_w).sum(0) for a, b in pairwise(BETAS)]
    return torch.stack(terms).sum(0)


#: By name: the objective of a pair's options, and its bound by hand.
OBJECTIVES: dict[str, tuple[Callable[..., pv.Objective], Callable[[Tensor], Tensor]]] = {
    "ELBO": (partial(pv.ELBO, 1), hand_mean),
    "IWAE": (partial(pv.IWAE, K), hand_iwae),
    "Renyi": (partial(pv.Renyi, 0.5, K), hand_power(0.5)),
    "MIWAE": (partial(pv.MIWAE, 2, K // 2), hand_groups(2)),
    "CIWAE": (partial(pv.CIWAE, 0.3, K), lambda log_w: 0.3 * hand_mean(log_w) + 0.7 * hand_iwae(log_w)),
    "VIMCO": (partial(pv.VIMCO, K), hand_iwae),
    "RWS": (partial(pv.RWS, K), hand_iwae),
    "TVO": (partial(pv.TVO, K, betas=BETAS), hand_tvo),
}
#: What may be refused, by what the sentence says.
REFUSALS = {
    "stl or dreg without rsample": "needs reparameterised sites",
    "enumeration in the guide": "guide site .* is marked for enumeration",
    "no density": r"the pair has no log p\(x\)|has no meaning",
    "weights joint over data that are subsampled": "cannot subsample plate|needs the whole of plate",
}


class Case:
    """A program with an objective, made anew; ``quick`` checks take few steps, and compare no means."""

    def __init__(self, name: str, objective: str, *, quick: bool = False) -> None:
        self.known_as = name, objective
        self.steps, self.seeds = (5, 4) if quick else (30, 40)
        self.quick = quick
        self.pair: Pair = make(name)
        made, self.hand = OBJECTIVES[objective]
        self.name, self.objective = objective, made(**self.pair.options)
        self.marked = any(s["infer"].get("enumerate") for s in guide_sites(self))
        self.first: float = self.objective.loss(self.pair.model, self.pair.guide, *self.pair.args)  # makes parameters

    def anew(self) -> "Case":
        """The same, untrained."""
        return Case(*self.known_as, quick=self.quick)

    def parameters(self) -> dict[str, Tensor]:
        """All that is trained, by name: Pyro's store was empty before the program ran."""
        known = dict(pyro.get_param_store().named_parameters())
        for role in ("model", "guide"):
            owner = getattr(self.pair, role)
            owner = owner if isinstance(owner, torch.nn.Module) else getattr(owner, "__self__", None)
            if isinstance(owner, torch.nn.Module):
                known |= {f"{role}.{name}": p for name, p in owner.named_parameters()}
        distinct = {id(p): (name, p) for name, p in reversed(known.items()) if p.requires_grad}
        aside = self.pair.aside
        return {name: p for name, p in reversed(distinct.values()) if not (aside and re.search(aside, name))}

    def gradient(self, objective: Any, seed: int) -> tuple[float, Tensor]:
        """The loss of an objective on one seed's noise, and its gradient, flat."""
        parameters = list(self.parameters().values())
        for parameter in parameters:
            parameter.grad = None
        pyro.set_rng_seed(seed)
        loss = objective.loss_and_grads(self.pair.model, self.pair.guide, *self.pair.args)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in parameters]
        return float(loss), torch.cat([g.flatten() for g in grads]) if grads else torch.zeros(0)


# --- the checks: (case) -> what came of it ---------------------------------------------------------------------------


def loss(case: Case) -> str:
    """The loss is finite, and the bound by hand of the log-weights on the same noise; the ELBO's is Pyro's own."""
    if not math.isfinite(case.first):
        return f"loss is {case.first}"
    pair, total = case.pair, case.objective.total_particles
    pyro.set_rng_seed(1)
    ours = case.objective.loss(pair.model, pair.guide, *pair.args)
    if (scales := scale_of(pair)) and not case.marked:
        pyro.set_rng_seed(1)
        with torch.no_grad():
            log_w = pv.log_weights(pair.model, pair.guide, *pair.args, num_particles=total, **pair.options)
        if problem := differ(ours, float(-scales * by_hand(case, log_w)), 1e-4):
            return f"the bound by hand: {problem}"
    if case.name == "ELBO":
        objective = theirs_of(case)
        pyro.set_rng_seed(1)
        theirs = objective.loss(pair.model, pair.guide, *pair.args)
        if differ(ours, float(theirs), 1e-4):
            return same_mean(case, lambda objective, seed: torch.tensor([case.gradient(objective, seed)[0]]))
    return "ok"


def by_hand(case: Case, log_w: Tensor) -> Tensor:
    """The bound by hand, summed over data; all such bounds move with a constant, without which they underflow."""
    top = log_w.detach().double().amax(0)
    return (case.hand(log_w.double() - top) + top).sum()


def scale_of(pair: Pair) -> float:
    """The factor that all sites have in common; 0 where there is no such number."""
    pyro.set_rng_seed(1)
    with pyro.validation_enabled(False):
        drawn = poutine.trace(pair.guide).get_trace(*pair.args)
        run = poutine.trace(poutine.replay(pair.model, drawn)).get_trace(*pair.args)
    sites = [s for t in (drawn, run) for s in t.nodes.values() if s["type"] == "sample"]
    found = {
        float(scale) if torch.as_tensor(scale := s["scale"]).numel() == 1 else math.nan
        for s in sites
        if type(s["fn"]).__name__ != "_Subsample" and not s["infer"].get("_deterministic")
    }
    return found.pop() if len(found) == 1 and not math.isnan(next(iter(found))) else 0.0


def theirs_of(case: Case) -> Any:
    """Pyro's objective for a pair, which has run once: then it knows the plates, and draws no more than ours."""
    objective = case.pair.theirs()
    objective.loss(case.pair.model, case.pair.guide, *case.pair.args)
    return objective


def differ(ours: float, theirs: float, tolerance: float) -> str:
    """What two numbers differ by, if it is more than rounding."""
    off = abs(ours - theirs)
    return "" if off <= tolerance * max(1.0, abs(theirs)) else f"{ours:.6g}, and {theirs:.6g} is right"


def gradient(case: Case) -> str:
    """The gradient: that of Pyro's own on the same noise, or of the same mean; else the derivative of the bound."""
    ours = case.gradient(case.objective, 2)[1]
    if not torch.isfinite(ours).all():
        return "gradient is not finite"
    if not ours.any():
        return "gradient is 0"
    if case.name == "ELBO":
        theirs = case.gradient(theirs_of(case), 2)[1]
        if close(ours, theirs):
            return "ok"
        return far(ours, theirs) if deterministic(case) else same_mean(case, lambda *run: case.gradient(*run)[1])
    if case.name in ("RWS", "TVO") or not reparameterised(case) or not (scale := scale_of(case.pair)):
        return "-"
    return derivative(case, ours, scale)


def derivative(case: Case, ours: Tensor, scale: float) -> str:
    """Compare with the derivative of the bound by hand in the parameters."""
    pair = case.pair
    parameters = list(case.parameters().values())
    pyro.set_rng_seed(2)
    log_w = pv.log_weights(
        pair.model, pair.guide, *pair.args, num_particles=case.objective.total_particles, **pair.options
    )
    total = -scale * by_hand(case, log_w)
    grads = torch.autograd.grad(total, parameters, allow_unused=True)
    theirs = torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, grads, strict=True)]
    )
    if not torch.isfinite(theirs).all():  # the bound by hand underflows
        return "-"
    return "ok" if close(ours, theirs) else far(ours, theirs)


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).norm() <= 2e-3 * max(float(theirs.norm()), 1e-3))


def far(ours: Tensor, theirs: Tensor) -> str:
    off = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-9))
    return f"gradient of norm {float(ours.norm()):.4g} is off by {off:.2g} of it"


def guide_sites(case: Case) -> list[Any]:
    with pyro.validation_enabled(False):
        run = poutine.trace(case.pair.guide).get_trace(*case.pair.args)
    return [
        s for s in run.nodes.values()
        if s["type"] == "sample" and type(s["fn"]).__name__ != "_Subsample"
        and (not s["is_observed"] or type(s["fn"]).__name__ == "Unit")
    ]  # fmt: skip


def reparameterised(case: Case) -> bool:
    """Whether all that the guide draws is, and all its factors."""
    return all(s["fn"].has_rsample for s in guide_sites(case))


def deterministic(case: Case) -> bool:
    return case.gradient(case.objective, 3)[0] == case.gradient(case.objective, 4)[0]


def same_mean(case: Case, draw: Callable[[Any, int], Tensor], runs: int = 60) -> str:
    """Whether ours and theirs have one mean, along eight directions that say nothing of either.

    A false alarm comes about once in a million, were the means normal.
    """
    if case.quick:
        return "-"
    means, errors = [], []
    for objective, first in ((case.objective, 100), (theirs_of(case), 10_000)):
        drawn = torch.stack([draw(objective, first + i) for i in range(runs)]).double()
        turn = torch.randn(drawn.shape[1], 8, generator=torch.Generator().manual_seed(0), dtype=torch.double)
        along = drawn @ (turn / drawn.shape[1] ** 0.5)
        means.append(along.mean(0))
        errors.append(along.var(0) / runs)
    off = float(((means[0] - means[1]) / (errors[0] + errors[1]).sqrt().clamp(min=1e-12)).abs().max())
    return "ok" if off < 5.5 else f"the mean is off by {off:.1f} standard errors"


def fit(case: Case) -> str:
    """After a few steps the bound is better, on the same noise; or after ten times as many, where few are a walk."""
    return trained(case, (case.steps,) if case.quick else (case.steps, 10 * case.steps), compile=False)


def trained(case: Case, steps: Iterable[int], *, compile: bool) -> str:
    pair = case.pair
    before = measured(case)
    data = DataLoader([pair.args], batch_size=None) if pair.args else ()
    for epochs in steps:
        pv.fit(
            pair.model, pair.guide, data, objective=case.objective, epochs=epochs, lr=pair.lr, compile=compile,
            progress=False,
        )  # fmt: skip
        after = measured(case)
        error = float((before.var() / len(before) + after.var() / len(after)).sqrt())
        better = float(before.mean() - after.mean())
        if better > (-3 * error if case.quick or compile else 0):  # a graph is the eager step, which came first
            return "ok"
    return f"loss {before.mean():.5g} became {after.mean():.5g} (standard error {error:.2g})"


def measured(case: Case) -> Tensor:
    """The loss on some seeds' noise."""
    losses = []
    for seed in range(case.seeds):
        pyro.set_rng_seed(1000 + seed)
        losses.append(case.objective.loss(case.pair.model, case.pair.guide, *case.pair.args))
    return torch.tensor(losses, dtype=torch.float64)


def likelihood(case: Case) -> str:
    """log p(x) is a number, and above the mean of its log-weights."""
    pair = case.pair
    found = pv.log_likelihood(pair.model, pair.guide, *pair.args, num_samples=64, seed=0, **pair.options)
    if not torch.isfinite(found.log_prob).all():
        return "log p(x) is not finite"
    if scale_of(pair) != 1:  # some of the data alone
        return "ok"
    pyro.set_rng_seed(0)
    with torch.no_grad():
        log_w = pv.log_weights(pair.model, pair.guide, *pair.args, num_particles=64, **pair.options)
    error = float(log_w.reshape(64, -1).sum(1).std()) / 8
    bound = float(log_w.mean(0).sum())
    total = float(found.log_prob.sum())
    return "ok" if total >= bound - 6 * error - 1e-3 * abs(bound) else f"log p(x) {total:.5g} is below {bound:.5g}"


def compiled(case: Case) -> str:
    """The step becomes a graph that is found equal to the eager one, and trains; or it runs eagerly, and says why.

    The graph runs operation by operation: through Inductor each would take ten seconds and more.
    """
    with (
        patch.object(checked, "capture", graphs.capture_once),
        patch.object(inductor, "through_inductor", lambda module: module),
        patch.object(inductor, "_compiled", type(inductor._compiled)()),
    ):
        return lowered(case)


def lowered(case: Case) -> str:
    """The same through Inductor."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        came = trained(case.anew(), (case.steps,), compile=True)
    why = next((str(w.message) for w in said if "cannot compile" in str(w.message)), None)
    return came if came != "ok" or why is None else f"eager: {why}"


#: By name, the cheap ones first; the last takes half a minute, and runs where it is asked for.
CHECKS: dict[str, Callable[[Case], str]] = {
    "loss": loss, "gradient": gradient, "fit": fit, "log p": likelihood, "compiled": compiled, "inductor": lowered,
}  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings: of particles that run one after the other, and the like."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def outcomes(program: str, objective: str, names: Iterable[str], *, quick: bool = False) -> dict[str, str]:
    """What comes of the checks of one program under one objective, one after the other."""
    with quiet():
        case: Case | str = told(lambda: Case(program, objective, quick=quick))
        found = {name: case if isinstance(case, str) else outcome(case, name) for name in names}
    pyro.clear_param_store()
    return found


def told(what: Callable[[], T]) -> T | str:
    """What a function gives, or what is to be said of its error."""
    try:
        return what()
    except Exception as error:
        said = " ".join(str(error).split())
        kind = next((kind for kind, words in REFUSALS.items() if re.search(words, said)), None)
        return f"refused, {kind}: {said}" if kind else f"FAULT {type(error).__name__}: {said[:600]}"


def outcome(case: Case, check: str) -> str:
    """What comes of one check."""
    found = told(lambda: CHECKS[check](case))
    if check == "log p" and not case.pair.density and found == "ok":
        return "FAULT: log p(x) of a pair without densities"
    known = found in ("ok", "-") or found.startswith(("eager", "refused", "FAULT"))
    return found if known else f"FAULT: {found}"
