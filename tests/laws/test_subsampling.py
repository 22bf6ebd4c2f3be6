"""Subsampled plates: the loss and its gradient, averaged over all subsets, are those of the whole data set.

The plate holds R copies of each of the pair's four data; a subset takes some data with all their copies, so that one
call has R draws of one subset. Its expectation is exact: a factor 4/2 outside of the bound. Pyro's RenyiELBO has that
factor inside the logsumexp, and reports more than log p(x).
"""

import dataclasses
import itertools

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch

import pyrovae as pv
from tests.laws.exact import expected, simulate
from tests.laws.gradients import exact, seeded
from tests.laws.objectives import OBJECTIVES
from tests.laws.pairs import GAUSSIAN, HIERARCHY, MIXED_LIVE, NET

R = 3000
FOUR = {
    pair.name: dataclasses.replace(pair, data=torch.tensor(data, dtype=torch.float64))
    for pair, data in (
        (GAUSSIAN, [-0.4, 1.3, 0.2, -1.1]),
        (HIERARCHY, [1.1, 0.3, -0.9, -0.2]),
        (NET, [1.0, 0.0, 1.0, 1.0]),
        (MIXED_LIVE, [0.7, -0.5, 0.0, 1.2]),
    )
}
SUBSETS = list(itertools.combinations(range(4), 2))
MEMBERS = [
    row
    for row in OBJECTIVES
    if not row.weighted
    and row.objective().total_particles in (3, 6)
    and (row.make, row.kwargs.get("num_groups")) not in ((pv.MIWAE, 3), (pv.PIWAE, 3))
]


def name(value):
    return value.name


def on_subset(objective, pair, subset, params, size):
    """The loss on one subset of the data, with all copies of each."""
    index = (torch.tensor(subset) * size + torch.arange(size).unsqueeze(1)).flatten()
    x = pair.data.repeat_interleave(size)[index]
    model, guide = pair.programs({n: p[index] for n, p in params.items()}, size=4 * size, subsample=index)
    return objective.differentiable_loss(model, guide, x)


@pytest.mark.parametrize("gradient", ["total", "stl", "dreg"])
@pytest.mark.parametrize("make", [pv.ELBO, pv.IWAE, pv.PIWAE], ids=lambda make: make.__name__)
def test_a_subset_has_the_scaled_loss_and_gradient_of_its_data(make, gradient):
    # Same seed, same noise: N/B times the loss and gradients on these data alone, the guide's second run included.
    pair, subset = FOUR["hierarchy"], torch.tensor([3, 1])
    alone = dataclasses.replace(pair, data=pair.data[subset])
    loss, gradients = seeded(make(num_particles=3, gradient=gradient), alone)
    params = pair.params(grad=True)
    pyro.set_rng_seed(1)
    scaled = make(num_particles=3, gradient=gradient).loss_and_grads(
        *pair.programs(params, size=4, subsample=subset), alone.data
    )
    assert scaled == pytest.approx(2 * loss, rel=1e-12)
    for parameter, p in params.items():
        torch.testing.assert_close(p.grad, 2 * gradients[parameter], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("row", "pair"),
    [(row, pair) for row in MEMBERS for pair in FOUR.values() if row.gradient == "total" or pair.reparameterised],
    ids=name,
)
def test_average_over_all_subsets_is_the_whole(row, pair, agree):
    params = pair.params(4 * R, grad=True)
    losses = [on_subset(row.objective(), pair, subset, params, R) for subset in SUBSETS]
    (sum(losses) / len(SUBSETS)).backward()
    label = f"{pair.name}, subsampled"
    truth = exact(row, pair, path_only=row.biased)
    for parameter in params:  # each copy's gradient is an average over the three subsets that it is in
        draws = -params[parameter].grad.view(4, R).sum(0)
        agree(row.name, label, f"d/d{parameter}", draws, truth[parameter])
    bound, _ = expected(pair, row.expectation, row.particles)
    reported = -sum(loss.item() for loss in losses) / len(SUBSETS) / R
    own = row.hand(simulate(pair, row.objective().total_particles, R).log_w(1.0, 1.0)).view(R, 4).sum(1)
    agree(row.name, label, "reported bound", own - own.mean() + reported, bound)  # generous: draws are shared by 3 of 6
    if row.below:
        assert bound < pair.log_px().sum()


@pytest.mark.parametrize("make", [pv.ELBO, pv.IWAE, pv.Renyi, pv.MIWAE], ids=lambda make: make.__name__)
def test_random_subsamples_average_to_the_whole(make):
    pair = FOUR["gaussian"]

    def model(x):
        with pyro.plate("data", 4, subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            pyro.sample("x", dist.Normal(0.9 * z + 0.3, 0.8), obs=x[index])

    def guide(x):
        with pyro.plate("data", 4, subsample_size=3) as index:
            pyro.sample("z", dist.Normal(0.35 * x[index] + 0.25, 0.74))

    objective, whole = make(num_particles=3), make(num_particles=3)
    losses = torch.tensor([objective.loss(model, guide, pair.data) for _ in range(400)])
    phi = {"m": torch.full((8000,), 0.35), "c": torch.full((8000,), 0.25), "r": torch.full((8000,), 0.74).log()}
    theta = {"w": torch.full((8000,), 0.9), "a": torch.full((8000,), 0.3)}
    full = whole.loss(*pair.programs(theta | phi), pair.data.repeat(2000)) / 2000
    # 400 draws: normal enough for |z| < 6; the whole's own error is below a tenth of it.
    assert abs(losses.mean() - full) < 6 * losses.std() / 400**0.5


def test_pyros_renyi_elbo_reports_more_than_log_px_and_ours_does_not():
    pair, subset = FOUR["gaussian"], (0, 1)
    truth = 2 * float(pair.log_px()[list(subset)].sum())
    ours = -on_subset(pv.IWAE(50), pair, subset, pair.params(4 * R), R).item() / R
    index = (torch.tensor(subset) * R + torch.arange(R).unsqueeze(1)).flatten()
    model, guide = pair.programs({n: p[index] for n, p in pair.params(4 * R).items()}, size=4 * R, subsample=index)
    theirs = pyro.infer.RenyiELBO(alpha=0.0, num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    inflated = -theirs.loss(model, guide, pair.data.repeat_interleave(R)[index]) / R
    assert truth - 0.1 < ours < truth  # the gap is Var(w / p) / 2K per datum
    assert inflated > truth + 0.3  # a fault of Pyro's; were it mended, this line would say so


def global_pair(x, size):
    """A global mean g over subsampled data: only a linear bound can be subsampled."""

    def model():
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4, subsample_size=size) as index:
            pyro.sample("x", dist.Normal(g, 1.0), obs=x[index])

    def guide():
        pyro.sample("g", dist.Normal(0.2, 0.5))

    return model, guide


def test_a_global_latent_allows_subsampling_for_the_elbo_only(agree):
    x = FOUR["gaussian"].data
    q = dist.Normal(0.2, 0.5)
    kl = torch.distributions.kl_divergence(q, dist.Normal(0.0, 1.0))
    elbo = dist.Normal(x, 1.0).log_prob(torch.tensor(0.2)).sum() - 4 * 0.5 * 0.25 - kl
    draws = torch.tensor([-pv.ELBO(50).loss(*global_pair(x, 2)) for _ in range(300)])
    agree("ELBO(50)", "global", "reported bound, subsampled", draws, elbo)
    assert pv.log_weights(*global_pair(x, 4), num_particles=5).shape == (5,)
    pv.IWAE(1).loss(*global_pair(x, 2))
    pv.IWAE(5).loss(*global_pair(x, 4))
    for objective in (pv.IWAE(5), pv.Renyi(0.5, 5), pv.MIWAE(2, 2), pv.PIWAE(2, 1), pv.CIWAE(0.5, 2), pv.VRMax(2)):
        with pytest.raises(ValueError, match='"data"'):
            objective.loss(*global_pair(x, 2))
    for linear in (pv.ELBO(5), pv.Renyi(1.0, 5), pv.MIWAE(5, 1), pv.CIWAE(1.0, 5)):
        linear.loss(*global_pair(x, 2))
