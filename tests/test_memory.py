"""What a step will take in memory is foretold from a trace on few data."""

import pytest
import torch

import pyrovae as pv
from pyrovae.memory import PeakBytes, bytes_at_peak

PAIRS = {
    "dense": lambda: pv.models.VAE((1, 8, 8), latent_dim=5, hidden=(40, 40)),
    "convolutional": lambda: pv.models.VAE((1, 8, 8), latent_dim=5, hidden=(20,), network="conv"),
    "hierarchical": lambda: pv.models.HierarchicalVAE((1, 8, 8), latent_dims=(5, 3)),
}


@pytest.mark.parametrize("k", [1, 7])
@pytest.mark.parametrize("name", PAIRS)
def test_the_peak_of_a_step_is_foretold_from_few_data(name, k):
    vae, objective = PAIRS[name](), pv.IWAE(k)
    x = torch.zeros(300, 1, 8, 8)

    def step(n):
        return torch.autograd.grad(objective.differentiable_loss(vae.model, vae.guide, x[:n]), list(vae.parameters()))

    foretold = [bytes_at_peak(step, n) for n in (3, 30, 300)]
    for n, expected in zip((3, 30, 300), foretold, strict=True):
        with PeakBytes() as used:
            step(n)
        assert used.peak == pytest.approx(expected, rel=0.02)
    assert foretold[2] > 3 * foretold[0]


def test_operations_that_depend_on_the_size_are_foretold_by_their_peaks():
    assert bytes_at_peak(lambda n: [torch.zeros(n)] + [torch.zeros(1) for _ in range(n)], 100) == pytest.approx(800)


def test_steps_that_fit_are_let_pass(monkeypatch):
    vae, x = pv.models.VAE((4,), latent_dim=1, hidden=()), torch.zeros(50, 4)
    for free, fits in ((1e9, True), (1e5, True), (1e3, False)):
        for place in ("memory", "train.checks"):
            monkeypatch.setattr(f"pyrovae.{place}.free_memory", lambda free=free: free)

        def fit():
            return pv.fit(vae.model, vae.guide, x, objective=pv.IWAE(3), epochs=1, batch_size=50, compile=False)

        if fits:
            assert len(fit().history) == 1
        else:
            with pytest.raises(pv.errors.ResourceError, match="a training step of 50 data with 3 particles"):
                fit()
