"""All of a datum, and all data that share latents: evaluations of pairs that subsample, or whose weights are joint.

Everywhere the guide is the posterior, so that every weight, bound and chain is log p(x), without any noise.
"""

import math
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyrovae as pv
from pyrovae.data.feed import Feed
from pyrovae.evaluate import active_units, information, posterior_gap
from pyrovae.train.monitor import Monitor, Validation, look_on
from tests.state import refused

pytestmark = pytest.mark.double(23)

X = torch.linspace(-1.0, 3.0, 150, dtype=torch.float64)
FAST = {"num_temperatures": 2, "num_chains": 2, "leapfrog_steps": 1, "seed": 0, "compile": False}


def log_prob_of_row(x):
    """Of observations N(z, 1) that share z ~ N(0, 1)."""
    n = x.shape[-1]
    return dist.MultivariateNormal(torch.zeros(n), torch.ones(n, n) + torch.eye(n)).log_prob(x)


def posterior_of_row(x):
    n = x.shape[-1]
    return dist.Normal(x.sum(-1) / (1 + n), (1 / (1 + n)) ** 0.5)


EVALUATIONS = {
    "likelihood": lambda *pair_and_x, **o: pv.log_likelihood(*pair_and_x, num_samples=20, **o).log_prob,
    "compiled": lambda *pair_and_x, **o: pv.log_likelihood(*pair_and_x, num_samples=20, compile=True, **o).log_prob,
    "annealing": lambda model, guide, *x, **o: pv.ais_log_likelihood(model, *x, guide=guide, **FAST, **o).log_prob,
    "gap": lambda *pair_and_x, **o: posterior_gap(*pair_and_x, num_samples=20, num_particles=5, **o)[:2],
}  # fmt: skip
each = pytest.mark.parametrize("evaluate", EVALUATIONS.values(), ids=EVALUATIONS)


def check(found, exact):
    """The log-likelihoods, or a gap's L_K and log p of a mean datum."""
    exact = torch.full((2,), exact.mean().item()) if isinstance(found, tuple) else exact
    torch.testing.assert_close(torch.as_tensor(found), exact)


# --- joint weights are never cut -------------------------------------------------------------------------------------


def shared(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def shared_posterior(x):
    pyro.sample("z", posterior_of_row(x))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


@each
@pytest.mark.parametrize(
    "data", [X, TensorDataset(X), pv.data.Images(X), DataLoader(TensorDataset(X), batch_size=150)],
    ids=["tensor", "Dataset", "Images", "DataLoader"],
)  # fmt: skip
def test_data_that_share_a_latent_come_whole(evaluate, data, interpreted):
    check(evaluate(shared, shared_posterior, data), log_prob_of_row(X))


@each
@pytest.mark.parametrize(
    ("data", "options"),
    [
        (X, {"batch_size": 100}), (TensorDataset(X), {"batch_size": 100}), (DataLoader(TensorDataset(X), 50), {}),
        (Stream(), {}),
    ],
    ids=["tensor", "Dataset", "DataLoader", "stream"],
)  # fmt: skip
def test_or_are_refused_where_somebody_else_cuts_them(evaluate, data, options):
    refused(ValueError, "cannot come in batches", evaluate, shared, shared_posterior, data, **options)


def local_beside_shared(x, scale=3.0):
    z = pyro.sample("z", dist.Normal(torch.zeros(()), scale))
    with pyro.plate("data", len(x)):
        pyro.sample("u", dist.Normal(z + 0 * x, 1.0))


def test_what_a_shared_draw_moves_in_each_batch_is_no_active_unit():
    x = torch.zeros(1200)  # three batches, if they were cut
    assert active_units(local_beside_shared, x)["u"].variances < 1e-12
    refused(ValueError, "cannot come in batches", active_units, local_beside_shared, x, batch_size=600)


def test_information_of_part_of_the_data_is_refused():
    assert information(local_beside_shared, local_beside_shared, X)["u"].kl.item() == pytest.approx(0.0)
    refused(ValueError, "cannot come in batches", information, local_beside_shared, local_beside_shared, X, num_data=50)


@each
def test_data_are_cut_along_their_own_plate_only(evaluate, interpreted):
    """Rows of a plate around every site that are not the data's first axis."""

    def model(x):
        with pyro.plate("columns", x.shape[1]):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("rows", len(x), dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("columns", x.shape[1]):
            pyro.sample("z", posterior_of_row(x.T))

    x = X.reshape(50, 3)
    check(evaluate(model, guide, x), log_prob_of_row(x.T))
    refused(ValueError, "cannot come in batches", evaluate, model, guide, x, batch_size=20)


# --- plates that subsample -------------------------------------------------------------------------------------------


def plate(name, size, kind, part, **options):
    """A plate that takes ``part`` of its range, drawn at random or given; or all."""
    kinds = {"random": {"subsample_size": part}, "given": {"subsample": torch.arange(part)}, "whole": {}}
    return pyro.plate(name, size, **kinds[kind], **options)


def pixels(x, kind):
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        with plate("pixels", x.shape[1], kind, 4, dim=-1) as index:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, index])


def pixels_posterior(x):
    with pyro.plate("data", len(x), dim=-2):
        fn = posterior_of_row(x)
        pyro.sample("z", dist.Normal(fn.loc.unsqueeze(-1), fn.scale.unsqueeze(-1)))


def pixels_prior(x):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))


def part_of_data(x, kind, full=40, by="index"):
    z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    if by == "sequence":
        for i in plate("data", full, kind, 10):
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])
        return
    with plate("data", full, kind, min(10, len(x))) as index:
        x = x if by == "none" else x[index] if by == "index" else pyro.subsample(x, event_dim=0)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local(x, kind, observe, full=40):
    with plate("data", full, kind, 10) as index:
        x = x[index] if kind == "random" and len(x) >= full else x
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0) if observe else dist.Normal(x / 2, 0.5**0.5))
        if observe:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@each
@pytest.mark.parametrize("kind", ["random", "whole"])
def test_a_plate_inside_a_datum_is_taken_whole(evaluate, kind, interpreted):
    x = X[:40].reshape(5, 8)
    check(evaluate(partial(pixels, kind=kind), pixels_posterior, x), log_prob_of_row(x))


@each
@pytest.mark.parametrize("by", ["index", "subsample", "sequence"])
@pytest.mark.filterwarnings("ignore:cannot compile")
def test_data_that_a_plate_draws_from_come_whole_where_they_share_a_latent(evaluate, by, interpreted):
    check(evaluate(partial(part_of_data, kind="random", by=by), shared_posterior, X[:40]), log_prob_of_row(X[:40]))


@each
def test_so_they_do_where_latents_are_local(evaluate, interpreted):
    pair = (partial(local, kind="random", observe=observe) for observe in (True, False))
    check(evaluate(*pair, X[:40]), dist.Normal(0.0, 2**0.5).log_prob(X[:40]))


@each
@pytest.mark.parametrize("kind", ["random", "given"])
def test_the_plate_of_the_batch_itself_stays_and_its_scale_is_ignored(evaluate, kind, interpreted):
    pair = (partial(local, kind=kind, observe=observe) for observe in (True, False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(evaluate(*pair, X[:10]), dist.Normal(0.0, 2**0.5).log_prob(X[:10]))


@each
@pytest.mark.parametrize(
    ("model", "guide", "x", "match"),
    [
        (partial(pixels, kind="given"), pixels_posterior, X[:40].view(5, 8), r'"pixels" is subsampled \(4 of 8\)'),
        (partial(part_of_data, kind="given"), shared_posterior, X[:10], r'plate "data" is subsampled \(10 of 40\)'),
        (partial(part_of_data, kind="random", by="none"), shared_posterior, X[:10], r'plate "data" \(10 at a time\)'),
        (partial(part_of_data, kind="random", by="none"), shared_posterior, X[:1], "observes 1 of 40"),
    ],
    ids=["given pixels", "given data", "data that follow no index", "one that would be repeated"],
)  # fmt: skip
def test_what_cannot_be_taken_whole_is_refused(evaluate, model, guide, x, match):
    refused(ValueError, match, evaluate, model, guide, x)


def test_units_are_measured_on_all_data_that_a_plate_draws_from():
    guide = partial(local, kind="random", observe=False)
    found = active_units(guide, X[:40])["z"].variances
    torch.testing.assert_close(found, (X[:40] / 2).var())
    pair = partial(local, kind="random", observe=True), guide
    exact = torch.distributions.kl_divergence(dist.Normal(X[:40] / 2, 0.5**0.5), dist.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(information(*pair, X[:40])["z"].kl, exact.reshape(1))


def test_a_guide_is_refined_on_the_whole_of_a_datum():
    """From the prior, along a straight path: the posterior of eight pixels is not that of four."""
    x = X[:40].view(5, 8)
    refined = pv.refine(partial(pixels, kind="random"), pixels_prior, x, steps=300, lr=0.1, seed=0)
    with pyro.poutine.trace() as found:
        refined(x)
    fn = found.trace.nodes["z"]["fn"]
    loc = fn.transforms[0].loc.squeeze(-1)
    assert (loc - posterior_of_row(x).loc).abs().max() < 0.02


def test_data_simulated_from_a_plate_that_subsamples_are_all_there():
    found = pv.bdmc(partial(local, kind="random", observe=True), 40, like=X[:1], **FAST)
    assert found.lower.log_prob.shape == found.upper.log_prob.shape == (40,)
    found = pv.bdmc(partial(part_of_data, kind="random"), 40, like=X[:1], **FAST | {"num_temperatures": 30})
    assert max(found.lower.log_prob, found.upper.log_prob) < -40  # of forty, not of ten


def test_pyros_plates_are_as_they_were_afterwards():
    def drawn():
        return pyro.plate("data", 40, subsample_size=10).subsample_size

    for bad in (False, True):
        x = X[:10].reshape(2, 5) if bad else X[:40]
        try:
            pv.log_likelihood(partial(part_of_data, kind="random"), shared_posterior, x, num_samples=3)
        except ValueError:
            assert bad
        assert drawn() == 10


def test_particles_are_not_folded_into_a_plate_of_fixed_size():
    """Twice forty rows, of which a plate of forty would take the first: two particles of twenty data."""
    pair = [partial(local, kind="random", observe=observe) for observe in (True, False)]
    match = "what was folded has 80 rows, but its data plate has size 40"
    refused(ValueError, match, pv.log_likelihood, *pair, X[:40], num_samples=2, fold_particles=True)
    assert math.isfinite(pv.log_likelihood(*pair, X[:40], num_samples=2).nll)


# --- what is logged of a training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [X, DataLoader(TensorDataset(X), 50)], ids=["tensor", "DataLoader"])
def test_validation_data_that_share_a_latent_come_whole(data):
    found = Validation(shared, shared_posterior, Feed(data, 50, torch.device("cpu")), pv.IWAE(3))()
    assert found == pytest.approx(log_prob_of_row(X).item() / 150)


def monitored(model, guide, x, batch_size):
    feed = Feed(x, batch_size, torch.device("cpu"))
    return Monitor(model, guide, look_on(feed, model, guide), feed)()


def test_kl_beside_a_shared_latent_is_per_datum_for_local_ones():
    def model(x, mean=0.0):
        z = pyro.sample("z", dist.Normal(3 * mean, 1.0))
        with pyro.plate("data", 150, subsample=torch.arange(len(x))):
            u = pyro.sample("u", dist.Normal(x.new_tensor(mean), 1.0))
            if not mean:
                pyro.sample("x", dist.Normal(z + u, 1.0), obs=x)

    found = monitored(model, partial(model, mean=0.5), X, 50)  # on 100 of the 150
    assert found["kl_per_unit"] == {"z": pytest.approx([1.5**2 / 2]), "u": pytest.approx([0.125])}
    assert found["kl"] == pytest.approx(1.5**2 / 2 / 150 + 0.125)


def test_the_reconstruction_is_that_of_the_whole_of_a_datum():
    x = X[:40].view(5, 8)
    found = monitored(partial(pixels, kind="random"), pixels_posterior, x, 5)
    assert found["reconstruction"] - found["kl"] == pytest.approx(log_prob_of_row(x).mean().item(), abs=0.5)
