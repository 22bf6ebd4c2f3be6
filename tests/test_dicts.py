"""Batches that are dicts, as loaders of tables give: as tuples, wherever they go."""

import copy
from collections import UserDict
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, StackDataset, TensorDataset

import pyrovae as pv
from pyrovae.compile import inductor
from pyrovae.data.feed import Feed
from pyrovae.errors import DataError
from tests.state import refused
from tests.training import rows

pytestmark = pytest.mark.seed(5)
X, Y = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
TABLE = {"x": X, "y": Y, "name": "a table"}
FIT = {"objective": pv.IWAE(2), "epochs": 2, "batch_size": 10, "progress": False}


class Labelled(nn.Module):
    """A pair of two tensors, which ``named`` takes from one dict."""

    def __init__(self, named=False):
        super().__init__()
        torch.manual_seed(0)
        self.decoder, self.encoder, self.named = nn.Linear(4, 2), nn.Linear(5, 2), named

    def columns(self, given):
        return (given[0]["x"], given[0]["y"]) if self.named else given

    def model(self, *given):
        x, y = self.columns(given)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            one_hot = torch.eye(3)[y].expand(*z.shape[:-1], 3)
            loc = self.decoder(torch.cat([z, one_hot], -1))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, *given):
        x, y = self.columns(given)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(torch.cat([x, torch.eye(3)[y]], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class Pairs(TensorDataset):
    """Rows (x, y) that are not known to be tensors."""


def of_class(kind, pairs):
    """A collate function that puts rows (x, y) into a mapping of this kind."""
    return kind({"x": torch.stack([x for x, _ in pairs]), "y": torch.stack([y for _, y in pairs])})


LOADERS = {
    "a dict of columns": lambda shuffle: {"x": X.numpy(), "y": Y},
    "a loader of dicts": lambda shuffle: DataLoader(StackDataset(x=X, y=Y), 10, shuffle=shuffle),
    "of a class of its own": lambda shuffle: DataLoader(
        TensorDataset(X, Y), 10, shuffle=shuffle, collate_fn=partial(of_class, UserDict)
    ),
}


@pytest.fixture
def quick_graphs(monkeypatch):
    """Graphs run operation by operation."""
    monkeypatch.setattr(inductor, "through_inductor", lambda module: module)
    monkeypatch.setattr(inductor, "_compiled", type(inductor._compiled)())


def trained(pair, data, **options):
    pyro.set_rng_seed(1)
    log = pv.fit(pair.model, pair.guide, data, **FIT | options)
    return rows(log.history), [p.detach().clone() for p in pair.parameters()]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("given", LOADERS)
def test_a_fit_is_that_of_tuples(given, compile, quick_graphs):
    options, of_pairs = {"compile": compile}, lambda shuffle: DataLoader(TensorDataset(X, Y), 10, shuffle=shuffle)
    if given == "a dict of columns":
        options, of_pairs = {"compile": compile, "num_workers": 0}, lambda shuffle: Pairs(X, Y)
    expected = trained(Labelled(), of_pairs(True), validation=of_pairs(False), **options)
    found = trained(Labelled(named=True), LOADERS[given](True), validation=LOADERS[given](False), **options)
    assert found[0] == expected[0]
    assert all(map(torch.equal, found[1], expected[1]))


@pytest.mark.parametrize("size", [None, 7])
@pytest.mark.parametrize("compile", [False, True])
def test_log_likelihood_cuts_a_dict_as_it_cuts_tuples(size, compile, quick_graphs):
    one, other = Labelled(), Labelled(named=True)
    options = {"num_samples": 20, "seed": 3, "batch_size": size, "compile": compile}
    expected = pv.log_likelihood(one.model, one.guide, X, Y, **options)
    sizes = []
    counted = lambda given: (sizes.append(len(given["x"])), other.model(given))[1]  # noqa: E731
    found = pv.log_likelihood(counted, other.guide, TABLE, **options)
    assert torch.equal(found.log_prob, expected.log_prob)
    assert set(sizes) == ({30} if size is None else {7, 2})


MEASURES = {
    "weights of folded particles": lambda p, *a: (
        pyro.set_rng_seed(2), pv.log_weights(p.model, p.guide, *a, num_particles=3, fold_particles=True)
    )[1],
    "active units": lambda p, *a: pv.active_units(p.guide, a if len(a) > 1 else a[0])["z"].variances,
    "annealing": lambda p, *a: pv.ais_log_likelihood(
        p.model, *a, num_chains=2, num_temperatures=2, leapfrog_steps=1, seed=0, batch_size=11
    ).log_prob,
    "information": lambda p, *a: pv.information(p.model, p.guide, *a, num_data=10, seed=0)["z"].mutual_information,
    "a step": lambda p, *a: pv.training_step(
        p.model, p.guide, pv.IWAE(2), torch.optim.SGD(p.parameters(), 0.1), *a
    )(*a),
}  # fmt: skip


@pytest.mark.parametrize("measure", MEASURES)
def test_what_else_is_measured_is_that_of_tuples(measure, quick_graphs):
    found = []
    for named, given in ((False, (X, Y)), (True, ({"x": X, "y": Y},))):
        pyro.set_rng_seed(4)
        found.append(torch.as_tensor(MEASURES[measure](Labelled(named), *given)))
    assert torch.equal(*found)


def test_a_run_goes_on_with_dicts(tmp_path):
    loader = LOADERS["a loader of dicts"]
    whole = trained(Labelled(named=True), loader(True))
    trained(Labelled(named=True), loader(True), run_dir=tmp_path / "run", epochs=1)
    found = trained(Labelled(named=True), loader(True), run_dir=tmp_path / "run", resume=True)
    assert found[0] == whole[0]
    assert all(map(torch.equal, found[1], whole[1]))


def test_what_a_dict_holds_is_checked_and_named():
    pair, bad = Labelled(named=True), X.clone()
    bad[4, 1] = torch.nan
    refused(DataError, r'data\[4, 1\] = nan at site "x"', trained, pair, {"x": bad, "y": Y})
    refused(DataError, "must have one length", Feed, {"x": X, "y": Y[:4]}, 10, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"got a dict: .*lambda x: model"):
        pv.sample(pair.model, 3, like={"x": X, "y": Y})
    kept = copy.deepcopy(TABLE)
    pv.log_likelihood(pair.model, pair.guide, TABLE, num_samples=2, batch_size=7)
    assert all(np.array_equal(kept[name], TABLE[name]) for name in TABLE)
