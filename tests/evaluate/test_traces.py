"""What evaluations leave behind: nothing, whatever they are."""

from functools import partial

import pytest
import torch

import pyrovae as pv
from tests.pairs import Noisy

pytestmark = pytest.mark.seed(5)

X = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)).round()
FAST = {"num_temperatures": 5, "leapfrog_steps": 2, "seed": 1}


def likelihood(model, guide, x=X, **options):
    found = pv.log_likelihood(model, guide, x, num_samples=20, seed=3, **options)
    assert found.path == ("compiled" if options else "eager")
    return [found.log_prob, found.std_error, found.ess, found.pareto_k]


EVALUATIONS = {
    "log_likelihood": likelihood,
    "of one datum": lambda model, guide: likelihood(model, guide, X[:1]),
    "compiled": partial(likelihood, compile=True),
    "ais": lambda model, guide: pv.ais_log_likelihood(model, X, compile=False, **FAST).log_prob,
    "refine": lambda model, guide: pv.refine(model, guide, X, steps=3, seed=1).shifts["z"],
    "active_units": lambda model, guide: pv.active_units(guide, X, batch_size=4)["z"].variances,  # the last has one
    "sample": lambda model, guide: pv.sample(model, 5, like=X, seed=7),
}


@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("name", EVALUATIONS)
def test_networks_run_in_eval_mode_and_nothing_changes(name, closure, interpreted):
    """Twice alike, whatever the modes before; generators, modes, buffers, parameters and gradients stay."""
    pair = Noisy()
    pair.encoder[0].eval()
    programs = (lambda x: pair.model(x), lambda x: pair.guide(x)) if closure else (pair.model, pair.guide)
    before, modes = {k: v.clone() for k, v in pair.state_dict().items()}, [m.training for m in pair.modules()]
    generator = torch.get_rng_state()
    first, again = (EVALUATIONS[name](*programs) for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [m.training for m in pair.modules()] == modes
    torch.testing.assert_close(pair.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in pair.parameters())
    pair.eval()
    torch.testing.assert_close(EVALUATIONS[name](*programs), first, rtol=0, atol=0)
