"""Parameters that only some batches reach, and those of lazy modules: trained as Pyro's SVI does, and kept by runs."""

import copy
import warnings
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pyro.infer as infer
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

import pyrovae as pv
from pyrovae import runs
from pyrovae.engine.probe import look
from pyrovae.engine.programs import evaluating, new_leaves
from pyrovae.engine.randomness import isolated_rng
from pyrovae.train import late, loop
from pyrovae.train import step as stepping
from tests.pairs import guide_of
from tests.training import dying_at, rows

pytestmark = pytest.mark.seed(41)

# x ~ N(mu_k, 1) with k of the batch: two means that never share a batch, and nothing random.
X, K = torch.arange(12.0), (torch.arange(12) >= 6).long()
LOADER = DataLoader(TensorDataset(X, K), batch_size=3)


def nothing(x, k):
    """The guide."""


def observe(x, mu):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def by_hand(epochs, rate, momentum=0.0, clip=float("inf")):
    """The means after so many epochs of SGD on the loss per datum, the rate a function of the step."""
    mu, speed = [0.0, 0.0], [0.0, 0.0]
    for step in range(4 * epochs):
        x, k = X[3 * (step % 4) :][:3], step % 4 // 2
        gradient = max(-clip, min(clip, mu[k] - x.mean().item()))
        speed[k] = momentum * speed[k] + gradient
        mu[k] -= rate(step) * speed[k]
    return mu


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.mu.expand(len(x))


def stored():
    def model(x, k):
        observe(x, pyro.param(f"mu{k[0]}", torch.zeros(())))

    return model, lambda: [pyro.param(f"mu{k}") for k in (0, 1)]


def leaves():
    mu = [torch.zeros((), requires_grad=True) for _ in range(2)]
    return lambda x, k: observe(x, mu[k[0]]), lambda: mu


def modules():
    nets = [Shift(), Shift()]
    return lambda x, k: observe(x, nets[k[0]](x)), lambda: [net.mu for net in nets]


def registered():
    nets = [Shift(), Shift()]

    def model(x, k):
        observe(x, pyro.module(f"net{k[0]}", nets[k[0]])(x))

    return model, lambda: [net.mu for net in nets]


def made_when_reached():
    nets = {}

    def model(x, k):
        observe(x, nets.setdefault(int(k[0]), Shift())(x))

    return model, lambda: [nets[k].mu for k in (0, 1)]


def lazy_attributes():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.mu0, self.mu1 = (PyroParam(lambda: torch.zeros(())) for _ in range(2))

        def forward(self, x, k):
            observe(x, getattr(self, f"mu{k[0]}"))

    model = Model()
    return model, lambda: [model.mu0, model.mu1]


def lazy_modules():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList(nn.LazyConv1d(1, 1) for _ in range(2))

        def forward(self, x, k):
            observe(x, self.nets[k[0]](torch.zeros(len(x), 1, 1)).squeeze())

    model = Model()
    return model, lambda: [net.bias for net in model.nets]


def hidden():
    """The new one beside the old one, as many calls as before: neither what is used nor how much of it tells."""
    nets = [Shift(), Shift()]
    return lambda x, k: observe(x, nets[0](x).detach() + nets[k[0]](x)), lambda: [net.mu for net in nets]


def beside_passing_ones():
    """Among tensors that the model makes anew at each call, which are nobody's parameters."""
    mu = [torch.zeros((), requires_grad=True) for _ in range(2)]

    def model(x, k):
        own, net = torch.zeros((), requires_grad=True), nn.Linear(1, 1, bias=False)
        observe(x, mu[k[0]] + own + 0 * net(x[:1]))

    return model, lambda: mu


def two_at_once():
    mu = [torch.zeros((), requires_grad=True) for _ in range(3)]
    return lambda x, k: observe(x, mu[1] + 2 * mu[2] if k[0] else mu[0]), lambda: mu


KINDS = [stored, leaves, modules, registered, made_when_reached, lazy_attributes, lazy_modules, beside_passing_ones]
OBJECTIVES = {
    "ELBO": pv.ELBO(), "IWAE": pv.IWAE(3, gradient="dreg"), "RWS": pv.RWS(2), "Trace": infer.Trace_ELBO(),
    "Renyi": infer.RenyiELBO(num_particles=2), "TraceGraph": infer.TraceGraph_ELBO(),
}  # fmt: skip


def train(model, **options):
    settings = {"objective": pv.ELBO(), "epochs": 3, "optimizer": lambda p: SGD(p, lr=0.1), "compile": False}
    return pv.fit(model, nothing, LOADER, **settings | options)


def means(read):
    return [mu.item() for mu in read()]


def close(values):
    return pytest.approx(values, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("make", KINDS, ids=lambda f: f.__name__)
def test_what_only_some_batches_reach_is_trained(make, name, monkeypatch):
    model, read = make()
    monkeypatch.setattr(nn.LazyConv1d, "reset_parameters", lambda self: [p.data.zero_() for p in self.parameters()])
    if make is lazy_modules:
        with torch.no_grad():
            pv.ELBO().loss(model, nothing, X[:3], K[:3])
    train(model, objective=OBJECTIVES[name])
    assert means(read) == close(by_hand(3, lambda step: 0.1))


@pytest.mark.parametrize("name", ["ELBO", "IWAE", "Renyi"])
def test_what_a_run_makes_for_itself_is_not_kept(name, tmp_path):
    """But for what the look before the first step made; nor are the copies of samples on which a model may run."""

    def model(x, k):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + mu[k[0]] + torch.zeros((), requires_grad=True), 1.0), obs=x)

    mu = [torch.zeros((), requires_grad=True) for _ in range(2)]
    options = {"objective": OBJECTIVES[name], "epochs": 3, "lr": 0.1, "compile": False, "run_dir": tmp_path / "run"}
    pv.fit(model, guide_of(lambda x: dist.Normal(x / 2, 0.7)), LOADER, **options)
    assert mu[1].item() != 0
    assert len(runs.Run(tmp_path / "run").weights()) == 3


def test_an_ordinary_pair_is_not_looked_at_again(monkeypatch):
    """Nor where a model runs on copies of the samples, which are leaves as parameters are."""
    monkeypatch.setattr(late, "look", None)
    mu = torch.zeros((), requires_grad=True)

    def model(x, k):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    for objective in (pv.RWS(2), pv.IWAE(2, gradient="dreg"), pv.TVO(2)):
        guide = guide_of(lambda x: dist.Normal(mu + x / 2, 0.7))
        pv.fit(model, guide, LOADER, objective=objective, epochs=1, compile=False)
    assert mu.item() != 0


def test_it_is_trained_as_svi_trains_it():
    def guide(x, k):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param(f"m{k[0]}", torch.zeros(())), 1.0))

    def model(x, k):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param(f"mu{k[0]}", torch.zeros(())), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    results = []
    for ours in (False, True):
        pyro.clear_param_store()
        if ours:
            objective = infer.TraceMeanField_ELBO()
            pv.fit(model, guide, LOADER, objective=objective, epochs=3, optimizer=lambda p: SGD(p, lr=0.03), seed=7)
        else:
            pyro.set_rng_seed(7)
            next(iter(LOADER))  # as a look at the first batch does, this draws a seed
            svi = infer.SVI(model, guide, pyro.optim.SGD({"lr": 0.01}), infer.TraceMeanField_ELBO())  # sums 3 data
            for _ in range(3):
                for batch in LOADER:
                    svi.step(*batch)
        results.append({name: p.item() for name, p in pyro.get_param_store().items()})
    assert results[1] == pytest.approx(results[0], rel=1e-4)
    assert len(results[0]) == 4


def test_neither_the_parameters_in_use_nor_the_size_of_the_graph_must_tell():
    for objective in (pv.ELBO(), infer.RenyiELBO(num_particles=2)):
        model, read = hidden()
        train(model, objective=objective)
        assert read()[1].item() != 0


def test_after_many_steps_only_some_are_watched(monkeypatch):
    monkeypatch.setattr(stepping, "WATCHED", 4)
    seen, walk = [], stepping.new_leaves
    monkeypatch.setattr(stepping, "new_leaves", lambda *a: seen.append(a) or walk(*a))
    nets, branch = [Shift(), Shift()], SimpleNamespace(steps=0)

    def model(x, k):
        branch.steps += 1
        observe(x, nets[branch.steps > 40](x))

    train(model, epochs=20)
    assert nets[1].mu.item() != 0
    assert len(seen) == 4 + 80 // 8


def test_each_particle_of_pyros_counts_where_one_is_reached_first():
    results = []
    for number in (1, 3):
        model, read = leaves()
        train(model, objective=infer.TraceGraph_ELBO(number))
        results.append(means(read))
    assert results[0] == close(results[1])


def test_a_branch_that_chance_decides_is_trained():
    nets, taken = [Shift(), Shift()], []

    def model(x, k):
        taken.append(int(torch.rand(()) < 0.05))
        observe(x, nets[taken[-1]](x))

    train(model, epochs=30)
    assert nets[1].mu.item() != 0


def test_it_joins_under_the_rate_of_that_step():
    model, read = stored()
    train(model, schedule="linear")
    assert means(read) == close(by_hand(3, lambda step: 0.1 * pv.schedules.make_schedule("linear")(step / 12)))


def test_it_is_clipped_and_has_the_options_of_its_group():
    model, read = leaves()
    result = train(model, clip_norm=0.5, optimizer=lambda p: SGD(p, lr=0.1, momentum=0.9))
    assert means(read) == close(by_hand(3, lambda step: 0.1, momentum=0.9, clip=0.5))
    assert result.history[-1]["grad_norm"] == pytest.approx(0.5, rel=1e-3)


def test_a_maker_of_several_groups_says_where_it_belongs():
    """By what the maker does with all parameters together: a group of its own for large ones, none for frozen ones."""
    wide, frozen = torch.zeros(3, requires_grad=True), torch.zeros((), requires_grad=True)
    mu = torch.zeros((), requires_grad=True)

    def model(x, k):
        observe(x, mu + (wide + frozen if k[0] else 0.0))

    def make(parameters):
        kept = [p for p in parameters if p is not frozen]
        groups = [{"params": [p for p in kept if p.dim() == d], "lr": 0.1 / (1 + d)} for d in (0, 1)]
        return SGD([group for group in groups if group["params"]])

    def of(parameters):
        made.append(make(parameters))
        return made[-1]

    made = []
    train(model, optimizer=of, epochs=1, schedule=lambda progress: 1.0 if progress < 0.5 else 0.5)
    assert [(len(g["params"]), g["lr"]) for g in made[0].param_groups] == [(1, 0.05), (1, 0.025)]
    exact, own = 0.0, torch.zeros(3)
    for x, second in zip(X.split(3), (0, 0, 1, 1), strict=True):
        error = (exact + second * own - x) / 3
        exact -= (0.05 if second else 0.1) * error.sum().item()
        own -= 0.025 * second * error
    assert mu.item() == close(exact)
    torch.testing.assert_close(wide.detach(), own)
    assert frozen.item() == 0


def test_networks_reached_late_stay_in_their_modes():
    nets, modes = [Shift(), Shift().eval()], []

    def model(x, k):
        modes.append(nets[1].training)
        observe(x, nets[k[0]](x))

    with pytest.warns(UserWarning, match="Shift stay in eval mode"):
        train(model)
    assert not nets[1].training
    assert not any(modes)


# --- runs ------------------------------------------------------------------------------------------------------------


RESUMED = [stored, leaves, modules, made_when_reached, lazy_attributes, two_at_once]


@pytest.mark.parametrize("make", RESUMED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("call", [2, 4])
def test_a_run_goes_on_with_what_its_first_batch_does_not_reach(make, call, tmp_path):
    def trained(resume=False, **options):
        pyro.clear_param_store()
        model, read = make()
        result = train(model, epochs=5, optimizer=lambda p: Adam(p, lr=0.1), resume=resume, **options)
        return means(read), rows(result.history)

    folder = tmp_path / "run"
    dying_at(loop, "run_epoch", call, lambda: trained(run_dir=folder))
    assert trained(run_dir=folder, resume=True) == trained()


@pytest.mark.parametrize("make", [Adam, SGD])
def test_what_is_not_reached_again_waits_in_the_checkpoint(make, tmp_path):
    """A branch that Python's state decides: the process that goes on takes it later."""
    folder, branch = tmp_path / "run", SimpleNamespace(on=True)

    def trained(**options):
        pyro.clear_param_store()

        def model(x, k):
            observe(x, pyro.param(f"mu{int(branch.on and k[0])}", torch.zeros(())))

        return train(model, optimizer=lambda p: make(p, lr=0.1), run_dir=folder, **options)

    dying_at(loop, "run_epoch", 3, lambda: trained(epochs=4))
    then = runs.Run(folder).weights()["param.mu1"]
    assert then != 0
    branch.on = False
    dying_at(loop, "run_epoch", 2, lambda: trained(epochs=4, resume=True))
    kept = runs.Run(folder)
    assert torch.equal(kept.weights()["param.mu1"], then)
    branch.on = True
    before = kept.state()
    trained(epochs=4, resume=True)
    after = kept.state()
    if make is Adam:
        steps = [state["optimizer"]["state"][1]["step"].item() for state in (before, after)]
        assert steps == [4, 6]
    now, exact = kept.weights()["param.mu1"].item(), then.item()
    if make is SGD:
        for x in X[6:].split(3):
            exact -= 0.1 * (exact - x.mean().item())
        assert now == close(exact)
    assert abs(now - then.item()) < 0.5 if make is Adam else True


# --- compiled steps and replicas -------------------------------------------------------------------------------------


def grouped(sizes=(4, 4, 2)):
    """Batches whose size says which parameters they reach."""
    return DataLoader(TensorDataset(torch.arange(10.0)), batch_sampler=[range(0, 4), range(4, 8), range(8, 10)])


def by_size():
    nets = {4: Shift(), 2: Shift()}
    return (lambda x: observe(x, nets[len(x)](x))), lambda: [net.mu for net in nets.values()]


def test_a_compiled_training_reaches_them_too(interpreted):
    results = []
    for compile in (False, True):
        model, read = by_size()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = pv.fit(
                model, lambda x: None, grouped(), objective=pv.ELBO(), epochs=3, lr=0.1, compile=compile, clip_norm=1.0
            )
        results.append(means(read))
    assert result.timings["path"] == "compiled"
    assert results[1] == close(results[0])
    assert 0 not in results[0]


def test_a_step_with_more_particles_than_the_look_reaches_more(interpreted):
    for compile in (False, True):
        nets = [Shift(), Shift()]

        def model(x, nets=nets):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z + nets[z.dim() - 1](x), 1.0), obs=x)

        guide = guide_of(lambda x: dist.Normal(x / 2, 0.5**0.5))
        pv.fit(model, guide, X, objective=pv.IWAE(3), epochs=3, batch_size=4, lr=0.1, compile=compile)
        assert nets[1].mu.item() != 0


def test_replicas_reach_them_too_each_its_own(interpreted):
    def trained(pairs, **options):
        return pv.fit_replicas(pairs, grouped(), objective=pv.ELBO(), epochs=3, lr=0.1, **options)

    made = [by_size() for _ in range(2)]
    trained([(model, lambda x: None) for model, _ in made])
    alone, read = by_size()
    pv.fit(alone, lambda x: None, grouped(), objective=pv.ELBO(), epochs=3, lr=0.1, compile=False)
    for _, each in made:
        assert means(each) == close(means(read))

    shared = Shift()

    def sharing():
        own = Shift()
        return (lambda x: observe(x, (own if len(x) == 4 else shared)(x))), lambda x: None

    with pytest.raises(ValueError, match="replicas share a parameter"):
        trained([sharing(), sharing()])


# --- lazy modules ----------------------------------------------------------------------------------------------------


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(2))
        self.decoder = nn.LazyLinear(5)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


FIVE = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
USES = {
    "look": lambda pair: look(pair.model, pair.guide, (FIVE,)),
    "loss": lambda pair: pv.ELBO().loss(pair.model, pair.guide, FIVE),
    "log_weights": lambda pair: pv.log_weights(pair.model, pair.guide, FIVE),
    "likelihood": lambda pair: pv.log_likelihood(pair.model, pair.guide, FIVE, num_samples=4),
}


@pytest.mark.parametrize("what", USES)
def test_lazy_modules_come_into_being_as_without_us(what):
    """With the parameters that a plain run of the pair gives them, their draws spent, and no data in their buffers."""
    torch.manual_seed(3)
    plain = Lazy()
    guided = pyro.poutine.trace(plain.guide).get_trace(FIVE)
    pyro.poutine.replay(plain.model, trace=guided)(FIVE)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    lazy = Lazy()
    norm = lazy.encoder[1]
    with nullcontext() if what == "loss" else evaluating(lazy):
        USES[what](lazy)
    for (name, ours), (_, theirs) in zip(lazy.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    seen = int(what == "loss")  # one run counts, the look before it does not
    assert norm.num_batches_tracked == seen
    if not seen:
        assert torch.equal(norm.running_mean, torch.zeros(8))
    if what == "look":
        assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("compile", [False, True])
def test_lazy_pairs_train_as_those_of_known_sizes(compile, interpreted):
    def trained(make):
        torch.manual_seed(3)
        pair = make()
        pv.fit(
            pair.model, pair.guide, FIVE, objective=pv.ELBO(), epochs=2, batch_size=10, compile=compile,
            optimizer=lambda p: SGD(p, lr=0.01),
        )  # fmt: skip
        return pair.state_dict()

    begun = Lazy()
    with isolated_rng(0):  # the seed of fit
        look(begun.model, begun.guide, (FIVE[:10],))
        spent = torch.get_rng_state()
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "isolated_rng", from_state(spent))
        expected = trained(lambda: copy.deepcopy(begun))
    lazily = trained(Lazy)
    assert expected.keys() == lazily.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(lazily[name], tensor, msg=name)


def from_state(state):
    """A generator that begins here, in the place of a seed's."""

    @contextmanager
    def isolated(seed=None):
        with isolated_rng(seed):
            if seed is not None:
                torch.set_rng_state(state)
            yield

    return isolated


def test_a_lazy_pair_is_loaded_before_it_ever_ran(tmp_path):
    pair, folder = Lazy(), tmp_path / "run"
    pv.fit(pair.model, pair.guide, FIVE, objective=pv.ELBO(), epochs=1, run_dir=folder)
    again = pv.load(folder, pair=Lazy())
    bounds = [pv.log_likelihood(p.model, p.guide, FIVE, num_samples=10, seed=0).log_prob for p in (pair.eval(), again)]
    assert torch.equal(*bounds)


@pytest.mark.parametrize("objective", [pv.IWAE(3, gradient="dreg"), pv.PIWAE(2, 2), pv.PIWAE(2, 2, gradient="stl")])
def test_a_loss_has_no_leaves_but_the_pairs_parameters(objective):
    vae = pv.models.VAE((4,), latent_dim=2, hidden=())
    loss = objective.differentiable_loss(vae.model, vae.guide, torch.zeros(5, 4))
    assert not new_leaves(loss, set(map(id, vae.parameters())))
