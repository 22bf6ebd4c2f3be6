"""What no noise reaches is computed once, and the rest gives what the whole gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import pyrovae as pv
from pyrovae.compile.graph import Graph, capture
from pyrovae.compile.hoisting import parts
from pyrovae.compile.noise import aten

X, ENCODER, DECODER = torch.randn(4, 3), torch.randn(3, 2), torch.randn(2, 3)


def products(graph: Graph) -> int:
    return sum(node.target is aten.mm.default for node in graph.module.graph.nodes)


def autoencoder() -> list[Tensor]:
    """An encoder of two layers, whose result is drawn around twice, and a decoder; the batch is read at both ends."""
    loc = (X @ ENCODER).tanh_() @ DECODER @ ENCODER
    z = loc.exp() + torch.randn(5, 4, 2)
    return [((z.flatten(0, 1) @ DECODER).view(5, 4, 3) - X).square_().sum(-1), loc]


def test_what_no_noise_reaches_is_cut_off() -> None:
    whole = capture(autoencoder, [X, ENCODER, DECODER])
    first, rest = parts(whole, 3)
    assert (products(whole), products(first), products(rest)) == (4, 3, 1)
    once = first(X, ENCODER, DECODER)
    assert len(once) == 1  # the last product leads to all that the rest needs
    noise = whole.noise()
    for given in (X, 2 * X):
        once = first(given, ENCODER, DECODER)
        found = rest(given, ENCODER, DECODER, *once, noise=lambda: noise)
        for one, other in zip(found, whole(given, ENCODER, DECODER, noise=lambda: noise), strict=True):
            torch.testing.assert_close(one, other)


def viewed() -> Tensor:
    """A view is made before its tensor is changed."""
    first = X @ ENCODER
    seen = first.view(2, 4)
    first.tanh_()
    return seen.view(4, 2)


def promoted() -> Tensor:
    """A change in place keeps single precision, where a result of its own would be double."""
    return (X @ ENCODER).mul_(torch.full((4, 2), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("made", [viewed, promoted])
def test_a_change_in_place_that_is_more_than_its_result_stays_one(made: Callable[[], Tensor]) -> None:
    whole = capture(lambda: [made() @ DECODER + torch.randn(4, 3)], [X, ENCODER, DECODER])
    noise = whole.noise()
    expected = made() @ DECODER + noise[0]
    first, rest = parts(whole, 3)
    found = rest(X, ENCODER, DECODER, *first(X, ENCODER, DECODER), noise=lambda: noise)
    torch.testing.assert_close(found, [expected])


def test_what_is_changed_in_place_stays_with_the_change() -> None:
    total = torch.zeros(4, 2)

    def counting() -> list[Tensor]:
        total.add_(X @ ENCODER)
        return [total @ DECODER + torch.randn(4, 3)]

    first, rest = parts(capture(counting, [X, ENCODER, DECODER, total]), 4)
    assert (products(first), products(rest)) == (1, 1)
    total.zero_()
    for calls in (1, 2):
        rest(X, ENCODER, DECODER, total, *first(X, ENCODER, DECODER, total))
        torch.testing.assert_close(total, calls * X @ ENCODER)


def test_a_factor_of_a_covariance_is_found_once() -> None:
    """Of the several results of an operation each that is read (here, also whether there is a factor)."""

    def correlated() -> list[Tensor]:
        return [torch.randn(3) @ torch.linalg.cholesky(X.mT @ X)]

    first, rest = parts(capture(correlated, [X]), 1)
    torch.testing.assert_close(first(X)[0], torch.linalg.cholesky(X.mT @ X))
    assert rest.compiled()(X, *first(X))[0].shape == (3,)


def test_a_batch_in_the_memory_of_the_last_is_another_batch() -> None:
    vae = pv.models.VAE((3,), latent_dim=2, hidden=(4,))
    buffer = torch.empty(2, 3)

    def refill(rows: list[Tensor]) -> Tensor:
        return buffer.copy_(torch.stack(rows))

    loader = DataLoader(list((torch.rand(6, 3) > 0.5).float()), batch_size=2, collate_fn=refill)
    eager, compiled = (
        pv.log_likelihood(vae.model, vae.guide, loader, num_samples=20, chunk_size=5, seed=0, compile=compile)
        for compile in (False, True)
    )
    assert compiled.path == "compiled"
    torch.testing.assert_close(compiled.log_prob, eager.log_prob, rtol=1e-5, atol=1e-5)
