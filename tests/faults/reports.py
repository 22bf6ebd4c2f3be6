"""What users of other such software reported publicly, each tried here; the docstring names the report."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyrovae as pv
from tests.faults.matrix import fault, small_run
from tests.pairs import Noisy, guide_of, model_of

X = torch.randn(23, generator=torch.Generator().manual_seed(0)) * 2
BITS = (torch.rand(23, 6, generator=torch.Generator().manual_seed(1)) > 0.4).float()
EXACT = dist.Normal(0.0, 2**0.5).log_prob(X)  # of z ~ N(0, 1), x ~ N(z, 1)

model = model_of(lambda z: dist.Normal(z, 1.0))
posterior = guide_of(lambda x: dist.Normal(x / 2, 0.5**0.5))
near = guide_of(lambda x: dist.Normal(x / 2, 0.8))


def quadrature(pair: pv.models.VAE, x: Tensor) -> Tensor:
    """log p(x) of a VAE of one latent unit, on a grid."""
    z = torch.linspace(-9, 9, 4001)
    with torch.no_grad():
        log_p = pair.eval().likelihood(z.unsqueeze(-1)).log_prob(x.unsqueeze(1))
    return (log_p + dist.Normal(0.0, 1.0).log_prob(z)).logsumexp(-1) + math.log(18 / 4000)


def trained(folder: Path, epochs: int, pair: nn.Module | None = None, **options: Any) -> Any:
    """A run of a pair that is always the same, from its start or resumed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        pair = pair or Noisy(0.1)
    wanted = {"objective": pv.IWAE(2), "batch_size": 5, "progress": False, "device": "cpu", "compile": False}
    result = pv.fit(pair.model, pair.guide, BITS, epochs=epochs, run_dir=folder, **(wanted | options))
    return result, {name: value.clone() for name, value in pair.state_dict().items()}


def interrupted(folder: Path, epochs: int, at: int, *, batch: int | None = None, **options: Any) -> None:
    """A run that stops in an epoch, or after one."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    steps = -(-len(BITS) // 5)
    left = iter(range(at * steps + (steps if batch is None else batch)))
    own = Noisy.model

    def dying(self: Noisy, x: Tensor) -> None:
        if torch.is_grad_enabled() and self.training and len(x) <= 5 and next(left, None) is None:
            stop()
        own(self, x)

    try:
        with patch.object(Noisy, "model", dying):
            trained(folder, epochs, **options)
    except KeyboardInterrupt:
        return
    raise AssertionError("it was not interrupted")


def same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(mine[name], theirs[name]) for name in theirs)


def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    clocks = ("seconds", "cpu_seconds", "images_per_second")
    return [{key: value for key, value in row.items() if key not in clocks} for row in history]


# --- likelihoods ---------------------------------------------------------------------------------------------------


@fault("E", "log_likelihood", each={"bernoulli": "bernoulli", "gaussian": "gaussian"})
def a_likelihood_has_its_constant_and_no_other(folder: Path, likelihood: str):
    """clementchadebec/benchmark_VAE#123: get_nll may add a normal's constant to a Bernoulli."""
    torch.manual_seed(0)
    pair = pv.models.VAE((6,), latent_dim=1, hidden=(3,), likelihood=likelihood)
    prior = guide_of(lambda x: dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
    outcome = yield lambda: pv.log_likelihood(pair.model, prior, BITS, num_samples=20000, seed=0)
    found = outcome.value
    assert ((found.log_prob - quadrature(pair, BITS)).abs() < 6 * found.std_error + 1e-4).all()


@fault("E", "log_likelihood")
def all_data_count_not_the_last_batch(folder: Path):
    """scverse/scvi-tools#1032: the marginal likelihood was that of the last minibatch."""
    outcome = yield lambda: pv.log_likelihood(model, posterior, X, num_samples=5, batch_size=10, seed=0)
    assert abs(outcome.value.nll + EXACT.mean().item()) < 1e-5
    assert torch.allclose(outcome.value.log_prob.float(), EXACT, atol=1e-5)


@fault("E", "log_likelihood")
def batches_of_unequal_size_weigh_by_their_data(folder: Path):
    """NVlabs/LSGM#13: a mean of means, twice."""
    loader = DataLoader(TensorDataset(X), batch_size=11)
    outcome = yield lambda: pv.log_likelihood(model, posterior, loader, num_samples=5, seed=0)
    assert abs(outcome.value.nll + EXACT.mean().item()) < 1e-5


@fault("E", "log_likelihood")
def each_datum_gets_its_own_figure(folder: Path):
    """yburda/iwae#2: per-datum log-likelihoods grew along the list, whatever the data."""
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(2))
    outcome = yield lambda: pv.log_likelihood(model, posterior, X[order], num_samples=5, batch_size=1, seed=0)
    assert torch.allclose(outcome.value.log_prob.float(), EXACT[order], atol=1e-5)


@fault("E", "log_likelihood")
def weights_are_averaged_not_log_weights_nor_their_negatives(folder: Path):
    """phlippe/CategoricalNF#2: a logsumexp of negative log-likelihoods."""
    outcome = yield lambda: pv.log_likelihood(model, near, X, num_samples=40000, seed=0)
    found = outcome.value
    assert ((found.log_prob - EXACT).abs() < 6 * found.std_error).all()
    assert found.std_error.max() < 0.05


@fault("E", "log_likelihood")
def an_estimate_is_the_objective_of_as_many_particles(folder: Path):
    """thu-ml/zhusuan#98: is the test log-likelihood the IWAE bound of so many particles?"""
    outcome = yield lambda: pv.log_likelihood(model, near, X, num_samples=64, seed=3)
    pyro.set_rng_seed(0)
    bounds = torch.tensor([-pv.IWAE(64).loss(model, near, X) / len(X) for _ in range(200)])
    assert abs(-outcome.value.nll - bounds.mean()) < 6 * (bounds.std() + outcome.value.nll_std_error)


@fault("E", "evaluate", 0, r"bits/dim|nats")
def bits_per_dimension_are_of_discrete_pixels(folder: Path):
    """openai/vdvae#14, rosinality/glow-pytorch#4: which output is the NLL, and may it be negative?"""
    run = small_run(folder / "run")
    yield "evaluate", run, "--samples", "20", "--device", "cpu"
    results = json.loads((run / "results.json").read_text())
    assert results["nll"] > 0
    assert abs(results["bits_per_dim"] - results["nll"] / (64 * math.log(2))) < 1e-9


@fault("E", "load")
def a_reopened_model_encodes_as_before(folder: Path):
    """scverse/scvi-tools#577: another latent after reloading, drawn and in train mode."""
    pair = pv.models.VAE((6,), latent_dim=2, hidden=(3,))
    pv.fit(pair.model, pair.guide, BITS, objective=pv.ELBO(1), epochs=1, run_dir=folder / "run", progress=False)
    outcome = yield lambda: pv.load(folder / "run")
    pair.eval()
    assert not outcome.value.training
    assert torch.equal(outcome.value.encode(BITS), pair.encode(BITS))
    found = [pv.log_likelihood(p.model, p.guide, BITS, num_samples=50, seed=1) for p in (pair, outcome.value)]
    assert torch.equal(found[0].log_prob, found[1].log_prob)


# --- bounds --------------------------------------------------------------------------------------------------------


def subsampled(full: int) -> tuple[Any, Any]:
    """A pair whose plate says that the batch is a part of so many data."""

    def of_model(x: Tensor) -> None:
        with pyro.plate("data", full, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def of_guide(x: Tensor) -> None:
        mean = pyro.param("shift", torch.tensor(0.3)) + x / 2
        with pyro.plate("data", full, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(mean, 0.8))

    return of_model, of_guide


def mean_loss(objective: Any, pair: tuple[Any, Any], x: Tensor, scale: float) -> tuple[float, float]:
    """A loss and its gradient, per datum, over many copies of the same data."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    loss = objective.differentiable_loss(*pair, x)
    loss.backward()
    gradient = pyro.get_param_store()._params["shift"].grad
    return loss.item() / len(x) / scale, gradient.item() / len(x) / scale


@fault("E", "objectives", each={"elbo": pv.ELBO(5), "iwae": pv.IWAE(5), "renyi": pv.Renyi(0.5, 5)})
def a_subsample_scales_a_bound_once_outside_its_logarithm(folder: Path, objective: Any):
    """pyro-ppl/pyro#2194, #531: a subsample's scale inside the logarithm of Renyi's bound, and twice in gradients."""
    x = torch.full((4000,), 0.7)
    outcome = yield lambda: mean_loss(objective, subsampled(40000), x, 10.0)
    whole = mean_loss(objective, subsampled(4000), x, 1.0)
    assert abs(outcome.value[0] - whole[0]) < 0.05  # of other noise; a scale inside the logarithm is off by 2
    assert abs(outcome.value[1] - whole[1]) < 0.05


@fault("E", "objectives")
def a_bound_of_many_data_is_the_sum_of_their_bounds(folder: Path):
    """pyro-ppl/numpyro#1608: Renyi's bound summed log-weights over local latents first."""
    pyro.set_rng_seed(0)
    log_w = torch.randn(5, 7)
    outcome = yield lambda: pv.IWAE(5).bound(log_w)
    assert torch.allclose(outcome.value, log_w.exp().mean(0).log(), atol=1e-6)
    exact = -EXACT.sum().item()
    assert abs(pv.IWAE(3).loss(model, posterior, X) - exact) < 1e-3


# --- data ----------------------------------------------------------------------------------------------------------


@fault("E", "fit", 3, r"x\[?.*255|between 0 and 1|outside the support")
def pixels_that_were_not_divided_are_refused(folder: Path):
    """pycroscopy/atomai#85: NaN from images that were not normalised."""
    pair = pv.models.VAE((6,), latent_dim=2, hidden=(3,), likelihood="continuous_bernoulli")
    yield lambda: pv.fit(pair.model, pair.guide, BITS * 255, objective=pv.ELBO(1), epochs=1, progress=False)


@fault("E", "fit", each={str(d): d for d in (torch.int32, torch.int16, torch.uint8, torch.int64)})
def labels_of_any_integer_type_are_taken(folder: Path, dtype: torch.dtype):
    """ToniCreswell/attribute-cVAEGAN#4: expected Long, found Int."""
    labels = (torch.arange(len(BITS)) % 3).to(dtype)
    pairs = []
    for _ in range(2):
        torch.manual_seed(0)
        pairs.append(pv.models.ConditionalVAE((6,), num_classes=3, latent_dim=2, hidden=(3,)))
    options: dict[str, Any] = {"objective": pv.ELBO(1), "epochs": 1, "batch_size": 5, "progress": False}
    yield lambda: pv.fit(pairs[0].model, pairs[0].guide, (BITS, labels), **options)
    pv.fit(pairs[1].model, pairs[1].guide, (BITS, labels.long()), **options)
    assert same(pairs[0].state_dict(), pairs[1].state_dict())


@fault("E", "fit", 3, "label|class|integer", each={
    "halves": torch.arange(23) % 3 + 0.5, "one-hot": torch.eye(3)[torch.arange(23) % 3],
    "out of range": torch.arange(23) % 4,
})  # fmt: skip
def labels_that_are_no_classes_are_refused(folder: Path, labels: Tensor):
    """neuronets/nobrainer#315: labels as floats where class indices belong."""
    pair = pv.models.ConditionalVAE((6,), num_classes=3, latent_dim=2, hidden=(3,))
    yield lambda: pv.fit(pair.model, pair.guide, (BITS, labels), objective=pv.ELBO(1), epochs=1, progress=False)


@fault("E", "fit", each={str(d): d for d in (torch.int64, torch.uint8, torch.bool, torch.float64)})
def data_of_any_type_are_matched_to_the_parameters(folder: Path, dtype: torch.dtype):
    """Natsu6767/InfoGAN-PyTorch#7: found Long, expected Float."""
    found = []
    for x in (BITS.to(dtype), BITS):
        torch.manual_seed(0)
        pair = pv.models.VAE((6,), latent_dim=2, hidden=(3,))
        options: dict[str, Any] = {"objective": pv.ELBO(1), "epochs": 1, "batch_size": 5, "progress": False}
        if not found:
            yield lambda x=x, pair=pair, options=options: pv.fit(pair.model, pair.guide, x, **options)
        else:
            pv.fit(pair.model, pair.guide, x, **options)
        found.append(pv.log_likelihood(pair.model, pair.guide, x, num_samples=20, seed=0).log_prob)
    assert torch.equal(found[0], found[1])


@fault("E", "fit", 2, "one datum.*BatchNorm", each={"of one": 1, "whose last is of one": 11})
def a_batch_of_one_under_batch_norm_is_named(folder: Path, size: int):
    """scverse/scvi-tools#3035, #681: a minibatch of one sample fails, or gives NaN."""
    pair, x = Noisy(), BITS if size == 11 else BITS[:5]
    yield lambda: pv.fit(pair.model, pair.guide, x, objective=pv.ELBO(1), epochs=1, batch_size=size, progress=False)


# --- NaN -----------------------------------------------------------------------------------------------------------


class Poisoned(Noisy):
    """A pair whose decoder's parameter becomes NaN at a step."""

    def __init__(self, step: int) -> None:
        super().__init__(0.0)
        self.steps, self.step = 0, step

    def model(self, x: Tensor) -> None:
        if torch.is_grad_enabled() and self.training and len(x) <= 5:
            self.steps += 1
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            logits = self.decoder(z)
            logits = logits * (math.nan if self.steps > self.step else 1.0)
            pyro.sample("x", dist.Bernoulli(logits=logits, validate_args=False).to_event(1), obs=x)


@fault("E", "fit", 5, '"x"', each={"epoch 1": 3, "epoch 3": 12})
def nan_in_training_names_its_site_and_spares_the_weights(folder: Path, step: int):
    """clementchadebec/benchmark_VAE#102, #132, pyro-ppl/pyro#571: "NaN detected in train loss", and no word more."""
    pair = Poisoned(step)
    yield lambda: pv.fit(
        pair.model, pair.guide, BITS, objective=pv.ELBO(1), epochs=4, batch_size=5, progress=False, compile=False
    )
    assert all(torch.isfinite(p).all() for p in pair.parameters())


# --- early stopping ------------------------------------------------------------------------------------------------


def falling(folder: Path, values: list[float]) -> Any:
    """A validation bound that takes these values, by the epochs that the run has logged."""
    from pyrovae.train import monitor

    def bound(_: object) -> float:
        log = folder / "r" / "metrics.jsonl"
        return values[len(log.read_text().splitlines()) if log.exists() else 0]

    return patch.object(monitor.Validation, "__call__", bound)


@fault("E", "fit")
def patience_waits_for_warm_up(folder: Path):
    """scverse/scvi-tools#307 (#3262): early stopping ended training before the warm-up had."""
    with falling(folder, [-1.0, *[-2.0 - i for i in range(30)]]):
        outcome = yield lambda: trained(folder / "r", 20, validation=BITS, patience=2, kl_warmup=8)
    assert len(outcome.value[0].history) >= 10


@fault("E", "fit", 0, "warm")
def a_warm_up_longer_than_the_training_is_said(folder: Path):
    """scverse/scvi-tools#1569: the warm-up was longer than the training, so that beta stayed below 1."""
    yield lambda: trained(folder / "r", 2, kl_warmup=40)


@fault("E", "fit")
def patience_goes_on_counting_after_a_resumption(folder: Path):
    """Lightning-AI/pytorch-lightning#1463: wait is 0 and the best forgotten after a resumption."""
    bounds = [-3.0, -1.0, -2.0, -2.0, -2.0, -2.0, -2.0, -2.0, -2.0, -2.0]
    options: dict[str, Any] = {"validation": BITS, "patience": 4}
    with falling(folder, bounds):
        interrupted(folder / "r", 10, 4, **options)
    with falling(folder, bounds):
        outcome = yield lambda: trained(folder / "r", 10, resume=True, **options)
    assert len(outcome.value[0].history) == 6
    assert outcome.value[0].best_epoch == 2


@fault("E", "fit")
def a_better_bound_after_a_resumption_is_the_best(folder: Path):
    """Lightning-AI/pytorch-lightning#18727: the best value was not updated after a resumption."""
    bounds = [-3.0, -2.0, -2.5, -1.0, -1.5, -1.6]
    with falling(folder, bounds):
        interrupted(folder / "r", 6, 2, validation=BITS)
    with falling(folder, bounds):
        outcome = yield lambda: trained(folder / "r", 6, resume=True, validation=BITS)
    assert outcome.value[0].best_epoch == 4


@fault("E", "fit", each={"first": [math.nan, -2.0, -1.0, -3.0], "later": [-2.0, math.nan, -1.0, -3.0]})
def a_bound_that_is_no_number_is_never_the_best(folder: Path, bounds: list[float]):
    """Lightning-AI/pytorch-lightning#1008, Bjarten/early-stopping-pytorch#16: NaN compares as an improvement."""
    with falling(folder, bounds):
        outcome = yield lambda: trained(folder / "r", 4, validation=BITS)
    assert outcome.value[0].best_epoch == 3
    assert (folder / "r" / "best").is_dir()


# --- checkpoints ---------------------------------------------------------------------------------------------------


@fault("E", "fit", each={"after an epoch": None, "in an epoch": 2, "at an epoch's first step": 0})
def a_resumed_run_takes_the_steps_that_were_left(folder: Path, batch: int | None):
    """Lightning-AI/pytorch-lightning#850, #5325, #11555, #12274, #19403: an epoch twice, cut short, a step more."""
    options: dict[str, Any] = {"schedule": "cosine", "kl_warmup": 3, "particles": (1, 2)}
    interrupted(folder / "r", 4, 2, batch=batch, **options)
    outcome = yield lambda: trained(folder / "r", 4, resume=True, **options)
    whole, weights = trained(folder / "whole", 4, **options)
    assert timeless(outcome.value[0].history) == timeless(whole.history)
    assert sum(row["steps"] for row in whole.history) == 20
    assert same(outcome.value[1], weights)


@fault("E", "fit", each={"adam": None, "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)})
def the_optimizer_remembers(folder: Path, optimizer: Any):
    """NM512/dreamerv3-torch#38: the optimizer was reset by a resumption."""
    interrupted(folder / "r", 3, 1, optimizer=optimizer)
    outcome = yield lambda: trained(folder / "r", 3, resume=True, optimizer=optimizer)
    assert same(outcome.value[1], trained(folder / "whole", 3, optimizer=optimizer)[1])


@fault("E", "fit")
def the_optimizer_of_parameters_in_the_store_remembers(folder: Path):
    """pyro-ppl/pyro#252: parameters of the store could be saved, the optimizer's state of them could not."""

    def of_guide(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.1)) * x, scale))

    def job(place: Path, epochs: int, **more: Any) -> list[float]:
        pyro.clear_param_store()
        pv.fit(
            model, of_guide, X, objective=pv.ELBO(2), epochs=epochs, batch_size=5, lr=0.05, run_dir=place,
            progress=False, compile=False, **more,
        )  # fmt: skip
        return [pyro.param(name).item() for name in ("scale", "slope")]

    def stopping(*_: object) -> None:
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        job(folder / "r", 4, on_epoch=stopping)
    outcome = yield lambda: job(folder / "r", 4, resume=True)
    assert outcome.value == job(folder / "whole", 4)


@fault("E", "fit", 2, "lr|batch_size", each={"another rate": {"lr": 0.5}, "another batch": {"batch_size": 7}})
def another_setting_is_not_taken_silently(folder: Path, other: dict[str, Any]):
    """Lightning-AI/pytorch-lightning#12819: what of a changed learning rate, when a run is resumed?"""
    interrupted(folder / "r", 3, 1)
    says = "lr" if "lr" in other else "batch_size"
    outcome = yield lambda: trained(folder / "r", 3, resume=True, **other)
    assert says in outcome.message


@fault("E", "fit", 6, each={"replace": "replace", "mkdir": "mkdir"})
def a_checkpoint_that_may_not_be_written_is_an_error(folder: Path, call: str):
    """Lightning-AI/pytorch-lightning#21800: a PermissionError was swallowed, and nothing was saved."""
    own, left = getattr(os, call), iter(range(1))

    def denied(*arguments: Any, **options: Any) -> Any:
        if str(folder / "r") in str(arguments[0]) and next(left, None) is None:
            raise PermissionError(13, "Permission denied", str(arguments[0]))
        return own(*arguments, **options)

    with patch.object(os, call, denied):
        yield lambda: trained(folder / "r", 8)


@fault("E", "fit", 1)
def the_old_checkpoint_goes_when_the_new_one_is_there(folder: Path):
    """Lightning-AI/pytorch-lightning#1150: the old checkpoint was deleted, the new one not yet written."""
    trained(folder / "r", 2)
    from pyrovae.runs import Run

    run = Run(folder / "r")
    kept = run.weights()

    class Died(BaseException):
        """What comes while a file is written."""

    def dying(*_: object) -> None:
        raise Died

    def save() -> None:
        with patch("pyrovae.runs.run.save_file", dying):
            run.save("last", Noisy().state_dict(), run.state())

    yield save
    assert same(Run(folder / "r").weights(), kept)


@fault(
    "E",
    "train --resume",
    4,
    r"state\.pt.*(damaged|changed)",
    each={f"{share:.0%}": share for share in (0.0, 0.5, 0.99)},
)
def half_a_checkpoint_is_named(folder: Path, share: float):
    """Lightning-AI/pytorch-lightning#688, #19970: "unexpected EOF, the file might be corrupted"."""
    run = small_run(folder / "run")
    content = (run / "last" / "state.pt").read_bytes()
    (run / "last" / "state.pt").write_bytes(content[: int(share * len(content))])
    yield "train", "--resume", "--run-dir", run, "--device", "cpu"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
