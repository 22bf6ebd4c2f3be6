"""Steps that C++ takes many at once are those that Python takes one by one."""

from __future__ import annotations

import cProfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, RMSprop

import pyrovae as pv
from pyrovae.compile.steps import Steps
from pyrovae.errors import NumericalError
from pyrovae.train.ahead import Ahead

ROWS, SIZE, BATCH = 53, 21, 8  # odd ones: rows, weights and biases that are no multiples of a vector


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many steps each call of C++ took, 3 at most."""
    numbers: list[int] = []
    call = Steps.__call__

    def counted(self: Steps, *given: Any) -> list[tuple[float, int]]:
        came = call(self, *given)
        numbers.append(len(came))
        return came

    monkeypatch.setattr(Steps, "__call__", counted)
    monkeypatch.setattr("pyrovae.compile.steps.AT_ONCE", 3)
    return numbers


def grey() -> pv.data.Images:
    return pv.data.Images(torch.rand(ROWS, SIZE, generator=torch.Generator().manual_seed(1)), binarization="dynamic")


def vae() -> pv.models.VAE:
    torch.manual_seed(0)
    return pv.models.VAE((SIZE,), latent_dim=3, hidden=(17,))


def trained(pair: Any, data: object, **options: Any) -> tuple[pv.Fit, list[Tensor]]:
    arguments = {"objective": pv.IWAE(2), "epochs": 3, "batch_size": BATCH, "compile": True, "lr": 1e-2} | options
    result = pv.fit(pair.model, pair.guide, data, **arguments)
    return result, [t.detach().clone() for t in pair.state_dict().values()]


def one_by_one(run: Callable[[], tuple[pv.Fit, list[Tensor]]]) -> tuple[pv.Fit, list[Tensor]]:
    with mock.patch.object(Ahead, "__call__", return_value=0):
        return run()


def alike(first: tuple[pv.Fit, list[Tensor]], second: tuple[pv.Fit, list[Tensor]]) -> None:
    """To rounding, which Adam may double."""
    names = "bound", "kl_weight", "num_particles", "learning_rate", "left_out", "skipped", "grad_norm", "steps"
    for a, b in zip(first[0].history, second[0].history, strict=True):
        assert {name: a.get(name) for name in names} == pytest.approx(
            {n: b.get(n) for n in names}, rel=1e-4, nan_ok=True
        )
    for p, q in zip(first[1], second[1], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def decaying(own: Iterable[Tensor]) -> AdamW:
    """As users write it: not fused, and biases, which lie between weights, without decay."""
    by_dim: dict[bool, list[Tensor]] = {True: [], False: []}
    for parameter in own:
        by_dim[parameter.dim() > 1].append(parameter)
    biases = {"params": by_dim[False], "lr": 3e-2, "weight_decay": 0.0}
    return AdamW([{"params": by_dim[True], "weight_decay": 0.3}, biases], lr=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": pv.ELBO(kl_weight=0.7), "kl_warmup": 2, "schedule": "linear"},
        {"particles": (1, 2), "schedule": lambda progress: 1 - progress / 2},
        {"lr": None, "optimizer": decaying, "clip_norm": 3.0, "schedule": "linear"},
        {"lr": None, "optimizer": lambda own: SGD(own, lr=1e-3, momentum=0.9, nesterov=True), "clip_norm": 1.0},
    ],
    ids=["plain", "warmed up", "in stages", "two groups, clipped", "SGD, clipped"],
)
def test_the_same_steps(options: dict[str, Any], taken: list[int]) -> None:
    """Losses, parameters, what is logged, and what an optimizer keeps; the odd last batch is Python's own."""
    first = trained(vae(), grey(), **options)
    assert sum(taken) >= 3 * (ROWS // BATCH) - 2
    assert max(taken) == 3
    alike(first, one_by_one(lambda: trained(vae(), grey(), **options)))


def test_noise_is_torchs(taken: list[int]) -> None:
    """Bits and normals come from its generator, to the state that it is left in."""
    states: list[Tensor] = []

    def run() -> tuple[pv.Fit, list[Tensor]]:
        return trained(vae(), grey(), on_epoch=lambda _: states.append(torch.get_rng_state()))

    run()
    one_by_one(run)
    assert taken
    assert all(map(torch.equal, states[:3], states[3:]))


def test_under_a_profiler(taken: list[int]) -> None:
    """It goes on afterwards."""
    with cProfile.Profile() as profiler:
        trained(vae(), grey(), epochs=1)
        sorted([1])
    assert taken
    assert any("sorted" in str(entry.code) for entry in profiler.getstats())


def test_labels_are_gathered_with_their_data(taken: list[int]) -> None:
    """As columns of the data, integers too."""
    torch.manual_seed(0)
    data = pv.data.Images((torch.rand(ROWS, SIZE) > 0.5).float(), torch.arange(ROWS) % 4)

    def pair() -> pv.models.ConditionalVAE:
        torch.manual_seed(0)
        return pv.models.ConditionalVAE((SIZE,), num_classes=4, latent_dim=3, hidden=(17,))

    first = trained(pair(), data)
    assert taken
    alike(first, one_by_one(lambda: trained(pair(), data)))


@pytest.mark.parametrize(
    "options", [{}, {"lr": None, "optimizer": lambda own: SGD(own, lr=1e-3), "clip_norm": 1.0}], ids=["Adam", "SGD"]
)
def test_resumed_to_the_same_bits(options: dict[str, Any], tmp_path: Path, taken: list[int]) -> None:
    """Which steps C++ takes does not hang on where a run was interrupted, though the optimizer may remember nothing."""
    _, whole = trained(vae(), grey(), epochs=4, **options)
    trained(vae(), grey(), epochs=2, run_dir=tmp_path, **options)
    _, resumed = trained(vae(), grey(), epochs=4, run_dir=tmp_path, resume=True, **options)
    assert taken
    assert all(map(torch.equal, whole, resumed))


def test_gradients_that_lie_otherwise(taken: list[int]) -> None:
    """Those of convolutions are channels last, and the graph puts them in order."""
    data = pv.data.Images((torch.rand(ROWS, 2, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.5).float())

    def run() -> tuple[pv.Fit, list[Tensor]]:
        torch.manual_seed(0)
        return trained(pv.models.VAE((2, 8, 8), latent_dim=3, network="conv", hidden=(17,)), data, epochs=2)

    first = run()
    assert taken
    alike(first, one_by_one(run))


class Rooted(nn.Module):
    """Normals whose locations have an infinite gradient where a datum begins with a 0; averages move in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.ones(SIZE)), nn.BatchNorm1d(SIZE)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            location = (self.weight * x[:, :1]).sqrt() + z[..., None]
            pyro.sample("x", dist.Normal(location, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.weight.mean() * self.norm(x).mean(-1), 1.0))


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_steps_are_withheld(clip_norm: float | None, taken: list[int]) -> None:
    """A gradient that is no number moves nothing, buffers neither, is counted and told of, and training goes on."""
    x = torch.rand(ROWS, SIZE, generator=torch.Generator().manual_seed(1)) + 0.1
    x[[5, 40], 0] = 0.0

    def run() -> tuple[pv.Fit, list[Tensor]]:
        with pytest.warns(UserWarning, match="was skipped, because"):
            return trained(Rooted(), x, on_nan="skip", clip_norm=clip_norm)

    first = run()
    assert taken
    assert all(row["skipped"] for row in first[0].history)
    alike(first, one_by_one(run))
    with pytest.raises(NumericalError, match="was not taken"):
        trained(Rooted(), x, clip_norm=clip_norm)


def test_what_it_does_not_know_it_leaves(taken: list[int]) -> None:
    """Other steps are Python's."""
    trained(vae(), grey(), epochs=1, lr=None, optimizer=lambda own: RMSprop(own, lr=1e-3))
    assert not taken


class Counting(pv.models.VAE):
    """Warms its likelihood up by a number: one that it counts itself, or one that others set."""

    def __init__(self, counts: bool) -> None:
        super().__init__((SIZE,), latent_dim=3, hidden=(17,))
        self.counts, self.calls, self.temperature = counts, 0, 1.0

    def model(self, x: Tensor) -> None:
        self.calls += self.counts
        with pyro.poutine.scale(scale=self.temperature if self.calls < 30 else 0.5):
            super().model(x)


def test_numbers_that_programs_change_are_seen() -> None:
    """What counts in Python is not compiled, and what is set between epochs ends that, with a warning each."""
    with pytest.warns(UserWarning, match=r'"Counting.calls" changes as the program runs'):
        assert trained(Counting(True), grey(), epochs=1)[0].timings["path"] == "eager"
    pair = Counting(False)

    def warm(fit: pv.Fit) -> None:
        pair.temperature = 0.5 if len(fit.history) == 2 else 1.0

    with pytest.warns(UserWarning, match=r'"Counting.temperature" has changed since'):
        result, _ = trained(pair, grey(), on_epoch=warm)
    assert abs(result.history[2]["bound"]) < 0.7 * abs(result.history[1]["bound"])
