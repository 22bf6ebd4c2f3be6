"""Mean gradients against exact ones: every objective on every pair, for theta and phi.

One call yields R independent gradients, for every parameter is given once per repetition. Each mean is compared with
its exact value by its own standard error; the limit ``Z_LIMIT`` keeps the suite's false-alarm rate at 1e-6 in all.
"""

import pytest
import torch

import pyrovae as pv
from tests.laws.gradients import draws, exact
from tests.laws.objectives import OBJECTIVES
from tests.laws.pairs import PAIRS

REPETITIONS = 20_000


def applies(row, pair):
    """stl and dreg need reparameterised sites; the best of equal particles (VRMax at the posterior) is anyone's."""
    tied = row.make is pv.VRMax and not row.weighted and pair.posterior
    return not tied and (row.gradient == "total" or pair.reparameterised)


CASES = [(row, pair) for row in OBJECTIVES for pair in PAIRS if applies(row, pair)]


def case_id(value):
    return value.name


@pytest.mark.parametrize(("row", "pair"), CASES, ids=case_id)
def test_mean_gradient_is_exact(row, pair, agree):
    truth = exact(row, pair, path_only=row.biased)
    found = draws(row.objective(), pair, REPETITIONS)
    for name in pair.theta | pair.phi:
        agree(row.name, pair.name, f"d/d{name}", found[name], truth[name])


@pytest.mark.parametrize("row", [row for row in OBJECTIVES if row.biased], ids=case_id)
def test_stl_is_biased_for_nonlinear_bounds_by_the_known_amount(row, agree):
    # Its mean is the path part alone (above); here, that this is not the bound's gradient, beyond any chance.
    pair = PAIRS[0]
    truth, path = exact(row, pair), exact(row, pair, path_only=True)
    found = draws(row.objective(), pair, REPETITIONS)
    seen = {n: (found[n].mean() - truth[n]) / (found[n].std() / REPETITIONS**0.5) for n in pair.phi}
    assert max(abs(z) for z in seen.values()) > 10
    assert max(abs(truth[n] - path[n]) for n in pair.phi) > 0.01
    for name in pair.phi:
        agree(row.name, pair.name, f"stl bias of d/d{name}", found[name] - truth[name], path[name] - truth[name])


def test_linear_bounds_leave_stl_unbiased():
    # The identity behind it: E of the score is zero, so the path part is the whole gradient.
    for pair in PAIRS:
        if pair.reparameterised:
            row = next(r for r in OBJECTIVES if r.name == "ELBO(num_particles=3, gradient='stl')")
            whole, path = exact(row, pair), exact(row, pair, path_only=True)
            assert all(torch.allclose(whole[n], path[n], atol=1e-8) for n in whole)
