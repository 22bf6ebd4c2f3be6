"""What a program is made of: modules, randomness, buffers and parameters, wherever they live."""

import random
import warnings
from contextlib import suppress
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import config_enumerate
from torch import nn

from pyrovae import ELBO
from pyrovae.engine.probe import look
from pyrovae.engine.programs import (
    evaluating,
    graph_leaves,
    in_modes,
    protected_buffers,
    reached_modules,
    roots,
    training_modes,
)
from pyrovae.engine.randomness import isolated_rng, replayed_rng, rng_state

pytestmark = pytest.mark.seed(3)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
        self.bias = nn.Parameter(torch.zeros(2))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + self.bias, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), 1.0).to_event(1))


PAIR = Pair()
X = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (PAIR, [PAIR]),
        (PAIR.model, [PAIR]),
        (partial(partial(PAIR.model)), [PAIR]),
        (partial(lambda net, x: net(x), PAIR.net), [PAIR.net]),
        (poutine.scale(PAIR.model, scale=0.5), [PAIR]),
        (poutine.block(poutine.scale(PAIR.model, scale=0.5), hide=["z"]), [PAIR]),
        (config_enumerate(PAIR.model), [PAIR]),
        (lambda x: x, []),
        (print, []),
    ],
)
def test_roots_look_through_whatever_wraps_a_program(program, expected):
    assert roots(program) == expected


def everything_random():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


@pytest.mark.parametrize("seed", [None, 0, 2**40, -1])
def test_isolation_leaves_every_generator_and_seeds_inside(seed):
    def inside():
        with isolated_rng(seed):
            return everything_random()

    with isolated_rng():
        expected = everything_random()
    first, second = inside(), inside()
    assert first == second
    assert (first == expected) == (seed is None)
    with suppress(KeyError), isolated_rng(seed):
        everything_random()
        raise KeyError
    assert everything_random() == expected


def test_replay_draws_the_same_again_and_goes_on():
    states = rng_state()
    first = torch.rand(3)
    with replayed_rng(*states):
        again = torch.rand(3)
    after = torch.rand(3)
    assert torch.equal(first, again)
    torch.manual_seed(0), torch.set_rng_state(states[0])
    assert torch.equal(torch.rand(6)[3:], after)


def test_buffers_come_back_bit_for_bit():
    net = nn.BatchNorm1d(2)
    before, identities = {k: v.clone() for k, v in net.state_dict().items()}, [id(b) for b in net.buffers()]
    with protected_buffers():
        net(X)
        assert not torch.equal(net.running_mean, before["running_mean"])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [id(b) for b in net.buffers()] == identities


class Counting(Pair):
    """Its methods count their runs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))
        self.register_buffer("anew", torch.zeros(()))

    def count(self):
        self.runs += 1
        self.anew = self.anew + 1

    def model(self, x):
        self.count()
        super().model(x)

    def guide(self, x):
        self.count()
        super().guide(x)


class Around:
    def __init__(self, held):
        self.held = held

    def model(self, x):
        return pair_in(self.held).model(x)

    def __call__(self, x):
        return pair_in(self.held).guide(x)


def pair_in(held):
    return next(iter(held)) if isinstance(held, list | set) else held["pair"] if isinstance(held, dict) else held


NAMED = Counting()
WAYS = {
    "methods": lambda pair: (pair.model, pair.guide),
    "closures": lambda pair: (lambda x: pair.model(x), lambda x: [pair.guide(x) for _ in range(1)]),
    "handlers": lambda pair: tuple(poutine.scale(program, scale=1.0) for program in (pair.model, pair.guide)),
    "arguments": lambda pair: tuple(partial(getattr(Counting, name), pair) for name in ("model", "guide")),
    "an object": lambda pair: (Around(pair).model, Around(pair)),
    "a list": lambda pair: (Around([pair]).model, Around([pair])),
    "a dict": lambda pair: (Around({"pair": pair}).model, Around({"pair": pair})),
    "a name": lambda pair: (lambda x: NAMED.model(x), lambda x: [NAMED.guide(x) for _ in range(1)]),
}


@pytest.mark.parametrize("way", WAYS)
def test_buffers_that_methods_move_are_moved_by_steps_alone(way):
    pair = NAMED if way == "a name" else Counting()
    model, guide = WAYS[way](pair)
    look(model, guide, (X,))
    with evaluating(model, guide):
        model(X), guide(X)
        assert pair.runs == 2
    assert pair.runs == pair.anew == 0
    ELBO(2).differentiable_loss(model, guide, X)
    assert pair.runs == pair.anew == 2


class Chain(Counting):
    """A draw depends on another, so that its density at fixed draws takes a second run of the guide."""

    calls = 0

    def model(self, x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(0.0, 1.0))
        super().model(x)

    def guide(self, x):
        self.calls += 1
        with pyro.plate("rows", len(x)):
            y = pyro.sample("y", dist.Normal(self.bias[0], 1.0))
        super().guide(x + y.unsqueeze(-1))


def test_the_second_run_of_a_guide_moves_no_buffers_of_its_methods():
    chain, objective = Chain(), ELBO(gradient="stl")
    look(chain.model, chain.guide, (X,))
    objective.differentiable_loss(chain.model, chain.guide, X)
    chain.calls = 0
    chain.runs.zero_()
    objective.differentiable_loss(chain.model, chain.guide, X)
    assert (chain.calls, chain.runs) == (2, 2), "of guide and model, but not of the guide's second"


def test_what_is_not_written_to_is_not_copied():
    net = nn.Module()
    net.register_buffer("large", torch.zeros(1000))
    there = net.large.data_ptr()
    with protected_buffers(net):
        assert torch._C._data_address(net.large) == there
        net.large += 1
        assert torch._C._data_address(net.large) != there
    assert not net.large.any()
    assert net.large.data_ptr() == there


def test_buffers_in_memory_of_numpy_come_back():
    net = nn.Module()
    net.register_buffer("mean", torch.from_numpy(held := np.zeros(3)))
    with protected_buffers(net):
        net.mean += 1
    assert net.mean.data_ptr() == held.ctypes.data
    assert not held.any()


def test_the_buffers_of_scripted_modules_come_back():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        norm = torch.jit.script(nn.BatchNorm1d(2))
    with protected_buffers():
        norm(X)
        assert norm.num_batches_tracked == 1
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("training", [True, False])
def test_what_is_frozen_stays_in_eval_mode_unless_all_is_in_it(training):
    pair = Pair().train(training)
    pair.net[1].eval()
    pair.net[2].train()
    with in_modes(training_modes(pair.model)):
        assert [m.training for m in pair.net] == [True, not training, True]
        assert (pair.training, pair.net.training) == (True, True)
        pair.net[0].eval()
    assert [m.training for m in pair.net] == [training, False, True]
    assert (pair.training, pair.net.training) == (training, training)


def test_a_program_below_another_is_no_root_of_its_own():
    pair = Pair()
    pair.net.eval()
    modes = training_modes(pair.model, pair.net)
    assert [modes[module] for module in (pair, pair.net, *pair.net)] == [True] + [False] * 4


def test_evaluating_reaches_modules_that_a_closure_calls():
    net = nn.Sequential(nn.Dropout(0.5))
    with evaluating(lambda x: net(x)):
        assert torch.equal(net(X), X)
    assert net.training
    assert net[0].training


def test_reached_modules_are_those_that_ran():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    with reached_modules(lambda x: first(x)) as found:
        first(X)
    second(X)
    assert list(found) == [first]


def test_graph_leaves_are_found_once_each():
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    leaves = graph_leaves((a * b + a.exp()).sum())
    assert {id(leaf) for leaf in leaves} == {id(a), id(b)}
    assert len(leaves) == 2
    assert graph_leaves((c * 2).detach()) == []


def test_a_pair_reaches_its_own_tensors_not_copies():
    pair = Pair()
    before = {k: v.clone() for k, v in pair.state_dict().items()}
    found = look(pair.model, pair.guide, (X,)).state
    own = pair.state_dict(keep_vars=True)
    assert found.tensors.keys() == own.keys()
    assert all(found.tensors[name] is own[name] for name in own)
    assert found.parameters.keys() == dict(pair.named_parameters()).keys()
    assert all(torch.equal(v, before[k]) for k, v in pair.state_dict().items())
    pair.net[1].running_mean = torch.full((2,), 7.0)  # a module may put another tensor in its buffer's place
    assert found.tensors["net.1.running_mean"] is pair.net[1].running_mean


def test_frozen_and_tied_parameters():
    pair = Pair()
    pair.bias.requires_grad_(False)
    pair.tied = pair.net[0].weight
    found = look(pair.model, pair.guide, (X,)).state
    assert "bias" in found.tensors
    assert "bias" not in found.parameters
    assert len({id(p) for p in found.parameters.values()}) == len(found.parameters) == 4
    assert {"tied", "net.0.weight"} <= found.tensors.keys()


def test_parameters_of_the_store_are_unconstrained_and_leaves_are_named():
    loose = torch.zeros(2, requires_grad=True)

    def model(x):
        scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loose, scale).to_event(1), obs=x)

    found = look(model, lambda x: None, (X,)).state
    assert found.parameters.keys() == {"param.scale", "leaf.0"}
    assert found.parameters["leaf.0"] is loose
    assert found.parameters["param.scale"].item() == pytest.approx(torch.tensor(2.0).log().item())


def test_moving_a_pair_moves_buffers_that_no_checkpoint_holds():
    pair = Pair()
    pair.net.register_buffer("mask", torch.ones(2), persistent=False)
    found = look(pair.model, pair.guide, (X,)).state
    found.to(torch.device("meta"))
    assert {t.device.type for t in (*pair.parameters(), *pair.buffers())} == {"meta"}
