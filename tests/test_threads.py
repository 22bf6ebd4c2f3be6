"""Steps get the threads that have work in them, of those there are, and give them back."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import pyrovae as pv
from pyrovae.train.threads import threads_for

X = torch.arange(20.0).remainder(2).reshape(5, 4)


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (27, 1), (28, 2), (56, 3), (10**6, 3)])
def test_threads_are_those_that_have_work(rows: int, expected: int):
    network = nn.Sequential(nn.Linear(1000, 300, bias=False), nn.BatchNorm1d(300))
    assert threads_for([network], rows) == expected  # 9e5 multiplications a row


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(1, 1, 3), nn.GRU(2, 2), nn.MultiheadAttention(2, 1), nn.LazyLinear(2), nn.BatchNorm1d(2)]
)
def test_what_is_not_counted_keeps_the_number(layer: nn.Module):
    assert threads_for([layer], 1) == 3
    assert threads_for([nn.Linear(2, 2), layer], 1) == (1 if isinstance(layer, nn.BatchNorm1d) else 3)


def test_a_small_job_has_one_thread_and_who_looks_at_it_all():
    vae, seen = pv.models.VAE((4,), latent_dim=1, hidden=()), []
    result = pv.fit(
        vae.model, vae.guide, X, objective=pv.ELBO(), epochs=1, on_epoch=lambda _: seen.append(torch.get_num_threads())
    )
    assert result.timings["threads"] == 1
    assert seen == [torch.get_num_threads()] == [3]


def test_replicas_count_together():
    pairs = [pv.models.VAE((784,), latent_dim=1, hidden=(40,)) for _ in range(2)]
    data = torch.zeros(100, 784)
    alone = pv.fit(pairs[0].model, pairs[0].guide, data, objective=pv.ELBO(), epochs=1, compile=False)
    together = pv.fit_replicas(pairs, data, objective=pv.ELBO(), epochs=1)
    assert [alone.timings["threads"], together[0].timings["threads"]] == [1, 2]
