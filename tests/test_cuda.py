"""What must hold on a CUDA device; run with ``pytest -m cuda``. Skipped, visibly, where there is none."""

import gc
import math
import threading
import warnings
from contextlib import contextmanager, nullcontext
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import TensorDataset

import pyrovae as pv
from pyrovae.compile.noise import rewritten
from pyrovae.compile.recording import Replays
from pyrovae.data.feed import Feed
from pyrovae.engine.probe import look
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.updates import Update
from pyrovae.errors import NumericalError
from pyrovae.evaluate.hmc import HMC
from pyrovae.schedules import cosine
from pyrovae.train import loop
from pyrovae.train.compiled import Compiled
from pyrovae.train.monitor import look_on
from pyrovae.train.step import Eager, Recorded, Step
from tests.state import unwaiting
from tests.training import dying_at

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

OBJECTIVES = [
    pv.ELBO(4), pv.ELBO(4, free_bits=0.1), pv.IWAE(4), pv.IWAE(4, gradient="stl"), pv.IWAE(4, gradient="dreg"),
    pv.Renyi(0.5, 4), pv.VRMax(4), pv.MIWAE(2, 3), pv.PIWAE(2, 3), pv.CIWAE(0.3, 4),
]  # fmt: skip


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return pv.models.VAE((1, 8, 8), latent_dim=5, hidden=(32,)).double()


@pytest.fixture
def x():
    return torch.bernoulli(torch.full((20, 1, 8, 8), 0.3, dtype=torch.float64))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_same_noise_gives_the_same_loss_and_gradients_as_on_the_cpu(objective, vae, x, monkeypatch):
    def standard_normal(shape, dtype, device):
        return torch.randn(shape, dtype=dtype, device="cpu").to(device)

    monkeypatch.setattr("torch.distributions.normal._standard_normal", standard_normal)
    results = []
    for device in ("cpu", "cuda"):
        vae.to(device).zero_grad()
        torch.manual_seed(1)
        loss = objective.differentiable_loss(vae.model, vae.guide, x.to(device))
        loss.backward()
        results.append([loss.detach().cpu(), *(p.grad.cpu().clone() for p in vae.parameters())])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-9, atol=1e-9)


def test_a_step_never_waits_for_the_device(vae, x):
    vae, x = vae.cuda(), x.cuda()
    objective = pv.IWAE(4, gradient="dreg")
    objective.differentiable_loss(vae.model, vae.guide, x).backward()  # the first call checks the pair
    with unwaiting():
        objective.differentiable_loss(vae.model, vae.guide, x).backward()


def test_fit_moves_pair_and_data_and_the_likelihoods_agree_with_the_cpu(x):
    vae = pv.models.VAE((1, 8, 8), latent_dim=5, hidden=(32,))
    data = pv.data.Images(x.float())
    result = pv.fit(vae.model, vae.guide, data, objective=pv.IWAE(5), epochs=3, device="cuda")
    assert result.timings["device"].startswith("cuda")
    assert next(vae.parameters()).is_cuda
    on_cuda = pv.log_likelihood(vae.model, vae.guide, data, num_samples=2000, seed=0)
    on_cpu = pv.log_likelihood(vae.cpu().model, vae.guide, data, num_samples=2000, seed=0)
    error = (on_cuda.std_error.cpu() ** 2 + on_cpu.std_error**2).sqrt()
    # 20 comparisons, |z| < 6: false alarm below 1e-6
    assert ((on_cuda.log_prob.cpu() - on_cpu.log_prob).abs() < 6 * error).all()


def plain_functions():
    """A pair that closes over two networks, with numbers for its prior and for its noise."""
    torch.manual_seed(0)
    encoder, decoder = torch.nn.Linear(64, 4), torch.nn.Linear(2, 64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z).unflatten(-1, (1, 8, 8)), 0.5).to_event(3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            mean, log_scale = encoder(x.flatten(1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))

    return model, guide


@pytest.mark.parametrize("compile", [False, True])
def test_plain_functions_move_and_are_found_again(compile, x):
    model, guide = plain_functions()
    data = pv.data.Images(x.float())
    settings = {"objective": pv.ELBO(), "epochs": 2, "device": "cuda", "compile": compile, "validation": data}
    result = pv.fit(model, guide, data, **settings)
    assert result.timings["path"] == ("cuda graph" if compile else "eager")
    assert math.isfinite(result.history[-1]["kl"])
    for given in (data, data.x):
        assert pv.log_likelihood(model, guide, given, num_samples=10, compile=compile).log_prob.is_cuda
        assert pv.sample(model, 3, like=given).is_cuda
        options = {"num_chains": 2, "num_temperatures": 3, "compile": compile}
        assert pv.ais_log_likelihood(model, given, **options).log_prob.shape == (20,)
        assert math.isfinite(pv.posterior_gap(model, guide, given, num_particles=2, num_samples=4).gap)


def test_a_step_with_numbers_for_parameters_never_waits(x):
    model, guide = plain_functions()
    x = x.float()
    pv.fit(model, guide, x, objective=pv.ELBO(), epochs=1, device="cuda", compile=False)
    objective, x = pv.IWAE(4), x.cuda()
    objective.differentiable_loss(model, guide, x).backward()
    with unwaiting():
        objective.differentiable_loss(model, guide, x).backward()


def test_the_pair_of_a_cuda_run_loads_on_the_cpu(tmp_path, x):
    vae = pv.models.VAE((1, 8, 8), latent_dim=5, hidden=(32,))
    pv.fit(vae.model, vae.guide, x.float(), objective=pv.ELBO(), epochs=1, device="cuda", run_dir=tmp_path / "run")
    loaded = pv.load(tmp_path / "run")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, vae.state_dict()[name].cpu())


# --- compiled steps, recorded as CUDA graphs -------------------------------------------------------------------------

BATCH = 50


@pytest.fixture
def digits():
    return pv.data.load("digits", binarization="dynamic").train.subset(slice(0, 520))  # the last batch has 20


def make_vae(seed=0, **variant):
    torch.manual_seed(seed)
    return pv.models.VAE((1, 8, 8), **{"latent_dim": 5, "hidden": (32,)} | variant)


def fitted(vae, data, **options):
    """A fit on the device; a warning that something was not compiled is an error."""
    settings = {"objective": pv.IWAE(3), "epochs": 20, "batch_size": BATCH, "lr": 3e-3, "device": "cuda"} | options
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "cannot")
        return pv.fit(vae.model, vae.guide, data, **settings)


def last_bound(result, key="bound"):
    """The mean over five epochs of 520 data with a standard deviation of 5 nats: its error is 0.1 nats."""
    return sum(row[key] for row in result.history[-5:]) / 5


def recorded(vae, data, make=lambda p: torch.optim.Adam(p, lr=1e-2), *, anneals=False, clip_norm=None):
    """A step on the device that takes the indices of its batches, and those of an epoch."""
    feed = Feed(data, BATCH, torch.device("cuda"))
    seen = look_on(feed, vae.model, vae.guide)
    seen.state.to(feed.device)
    eager = Eager(vae.model, vae.guide, seen, feed.first())
    step = Step(Compiled(eager, anneals=anneals), [make(eager.parameters)], clip_norm)
    return Recorded(step, feed.images), list(feed.indices())


def weights(vae):
    return [p.detach().clone() for p in vae.parameters()]


@pytest.mark.parametrize("objective", [pv.ELBO(4), pv.IWAE(4, gradient="dreg"), pv.ELBO(4, free_bits=0.1)], ids=repr)
def test_the_compiled_gradients_are_the_eager_ones_on_the_same_noise(objective, vae, digits):
    vae = vae.cuda()
    x = digits.fixed().x[:BATCH].double().cuda()
    eager = Eager(vae.model, vae.guide, look(vae.model, vae.guide, (x,)), (x,))
    compiled = Compiled(eager)
    assert compiled.static(objective) is not None
    results = []
    for gradients in (eager, compiled):
        with isolated_rng(3), rewritten():
            results.append([*gradients(objective, (x,)), *(p.grad for p in vae.parameters())])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)


STREAMED = "a data set that is not held on the device"
JOBS = {
    "default": {},
    "SGD": {"lr": None, "optimizer": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9)},
    "clipped": {"clip_norm": 20.0},
    "stages": {"particles": (1, 3), "kl_warmup": 3, "schedule": "cosine"},
    STREAMED: {"num_workers": 0},
}


@pytest.mark.parametrize("job", JOBS)
def test_a_recorded_training_learns_as_much_as_an_eager_one(job, digits):
    """Seeds differ by some tenths of a nat, the start is 20 nats away: 1 nat."""
    data = TensorDataset(digits.fixed().x, torch.zeros(520)) if job == STREAMED else digits
    results = {}
    for compile in (False, True):
        vae = make_vae()
        if job == STREAMED:
            vae.model, vae.guide = (lambda x, _, run=run: run(x) for run in (vae.model, vae.guide))
        results[compile] = fitted(vae, data, compile=compile, **JOBS[job])
    assert [results[c].timings["path"] for c in (False, True)] == ["eager", "cuda graph"]
    assert last_bound(results[True]) == pytest.approx(last_bound(results[False]), abs=1.0)
    assert last_bound(results[True]) > results[True].history[0]["bound"] + 3
    assert results[True].timings["steps"] == 20 * 11
    for row, other in zip(results[True].history, results[False].history, strict=True):
        assert row.keys() == other.keys()
        for key in ("learning_rate", "kl_weight", "num_particles"):
            assert row[key] == pytest.approx(other[key], rel=1e-6)


def test_the_likelihood_after_a_recorded_training_is_that_after_an_eager_one(digits):
    """Of held-out data, by importance sampling; two trainings of one law differ by some tenths of a nat."""
    test = pv.data.load("digits", binarization="dynamic").test
    nlls = []
    for compile in (False, True):
        vae = make_vae()
        fitted(vae, digits, compile=compile, epochs=60)
        nlls.append(pv.log_likelihood(vae.model, vae.guide, test, num_samples=500, seed=0).nll)
    assert nlls[1] == pytest.approx(nlls[0], abs=0.6)


def test_the_same_seed_gives_the_same_recorded_training(digits):
    """Up to the order in which a device may add."""
    results = []
    for seed in (0, 0, 1):
        vae = make_vae()
        fitted(vae, digits, compile=True, epochs=2, seed=seed)
        results.append(torch.cat([p.flatten() for p in weights(vae)]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)
    assert (results[0] - results[2]).abs().max() > 1e-3


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, partial(torch.optim.AdamW, weight_decay=0.1, amsgrad=True)])
def test_parameters_move_in_slices_to_the_same_bits(optimizer):
    """Also where one step is withheld; of a network whose weights are several slices and a part of one."""
    results = []
    for sliced in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(300, 77), torch.nn.Linear(77, 3)).cuda()
        made = optimizer(net.parameters(), lr=torch.tensor(1e-2, device="cuda"), fused=True, capturable=True)
        for i in range(4):
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).cuda()
            made.found_inf = torch.tensor(float(i == 2), device="cuda")
            if not (sliced and i and Update(made).in_slices(made.found_inf)):
                assert not sliced or i == 0
                made.step()
        results.append([*net.parameters(), *(t for state in made.state.values() for t in state.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_every_replay_draws_new_noise(digits):
    vae = make_vae().cuda()
    x = digits.fixed().x[:BATCH].cuda()
    state = torch.cuda.get_rng_state()
    step = pv.training_step(vae.model, vae.guide, pv.ELBO(), torch.optim.SGD(vae.parameters(), lr=0.0), x)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    losses = torch.stack([step(x) for _ in range(200)])
    assert len(losses.unique()) > 190
    eager = torch.tensor(
        [float(pv.ELBO().loss(vae.model, vae.guide, x)) / BATCH for _ in range(200)], device=losses.device
    )
    error = (losses.var() / 200 + eager.var() / 200).sqrt()
    assert (losses.mean() - eager.mean()).abs() < 6 * error  # false alarm 2e-9


def test_every_replay_draws_a_new_binarisation():
    """A pair without latents, at fixed logits 1: the bound is the share of ones less a constant, and nothing else."""
    logits = torch.ones(64, device="cuda", requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    grey = pv.data.Images(torch.full((BATCH, 64), 0.3), binarization="dynamic")
    result = pv.fit(
        model, lambda x: None, grey, objective=pv.ELBO(), epochs=50, batch_size=BATCH, device="cuda", compile=True,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
    )  # fmt: skip
    assert result.timings["path"] == "cuda graph"
    bounds = torch.tensor([row["bound"] for row in result.history])
    share = bounds / 64 + math.log1p(math.e)
    assert len(bounds.unique()) > 20  # of counts with a standard deviation of 26, 39 on average
    ratio = share.var() / (0.3 * 0.7 / (BATCH * 64))
    assert 0.25 < ratio < 2.4  # a chi-squared over its 49 degrees of freedom: false alarm 1e-6
    assert abs(float(share.mean()) - 0.3) < 6 * math.sqrt(0.3 * 0.7 / (50 * BATCH * 64))


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_a_replay_never_waits_for_the_device(optimizer, digits):
    """Not even where learning rate and kl_weight change, nor where the gradient is clipped."""
    objective = pv.IWAE(3, kl_weight=0.5)
    step, batches = recorded(make_vae(), digits, optimizer, anneals=True, clip_norm=10.0)
    for batch in batches[:2]:
        step(objective, batch)
    losses = []
    with unwaiting():
        for i, batch in enumerate(batches[2:-1]):
            step.set_lr(1.0 / (i + 1))
            objective.kl_weight = 0.1 * i
            losses.append(step(objective, batch).losses)
    assert all(torch.isfinite(loss) for loss in losses)
    assert len({float(loss) for loss in losses}) == len(losses)  # each is its own tensor


def test_the_learning_rate_of_a_recorded_step_may_change(digits):
    vae = make_vae()
    step, (batch, *_) = recorded(vae, digits)
    moved = []
    for factor in (1.0, 1.0, 0.0, 0.01, 1.0):
        before = weights(vae)
        step.set_lr(factor)
        step(pv.ELBO(), batch)
        moved.append(max(float((p - b).abs().max()) for p, b in zip(weights(vae), before, strict=True)))
        assert step.metrics()["learning_rate"] == pytest.approx(1e-2 * factor)
    assert len(step.recorded) == 1
    assert moved[0] == pytest.approx(1e-2, rel=1e-3)  # Adam's first step: the recording left no trace in its state
    assert moved[2] == 0
    assert 0 < moved[3] < 1e-3 < moved[4]


CHANGES = {
    "learning rate": lambda optimizer: optimizer.param_groups[0].update(lr=1e-4),
    "weight decay": lambda optimizer: optimizer.param_groups[0].update(weight_decay=10.0),
    "betas": lambda optimizer: optimizer.param_groups[0].update(betas=(0.0, 0.0)),
    "state": lambda optimizer: optimizer.load_state_dict(
        {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}
    ),
    "schedule": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1).step(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
def test_a_recorded_step_follows_its_optimizer(change, digits):
    """To rounding what an eager one does on the same noise, which each change makes visible."""
    x, results = digits.fixed().x[:BATCH].cuda(), []
    for recording, changes in ((False, True), (True, True), (True, False)):
        vae = make_vae().double().cuda()
        optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2, fused=True)
        seen = look(vae.model, vae.guide, (x.double(),))
        eager = Eager(vae.model, vae.guide, seen, (x.double(),))
        step = Step(Compiled(eager) if recording else eager, [optimizer])
        run = Recorded(step) if recording else step
        for i in range(6):
            if i == 3 and changes:
                CHANGES[change](optimizer)
            with isolated_rng(i), rewritten():
                run(pv.ELBO(), (x.double(),))
        results.append(torch.cat([p.flatten() for p in weights(vae)]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)
    assert (results[2] - results[1]).abs().max() > 1e-3


class Observed(pv.models.VAE):
    """With noise of its own, of a standard deviation of 10, in the mean; drawn on the CPU, moved or not."""

    def __init__(self, noise):
        super().__init__((1, 8, 8), latent_dim=2, hidden=())
        self.noise, self.factor = noise, torch.nn.Parameter(torch.eye(64))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            mean = self.decode(z).flatten(-3) + self.noise(x)
            covariance = self.factor @ self.factor.mT if self.noise is nothing else torch.eye(64)
            pyro.sample("x", dist.MultivariateNormal(mean, covariance_matrix=covariance), obs=x.flatten(1))


def nothing(x):
    return 0.0


NOISES = {
    "noise on the CPU": lambda x: 10 * torch.randn((), device="cpu"),
    "noise that is moved": lambda x: 10 * torch.randn(1, device="cpu").to(x.device),
}


@pytest.mark.parametrize("noise", NOISES)
def test_a_step_that_cannot_be_recorded_runs_compiled_after_one_warning(noise, x):
    torch.manual_seed(0)
    pair = Observed(NOISES[noise])
    settings = {"objective": pv.ELBO(), "epochs": 5, "batch_size": 20, "device": "cuda", "lr": 1e-6}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = pv.fit(pair.model, pair.guide, x.float(), compile=True, **settings)
    assert [str(w.message).startswith("cannot record the step: it ") for w in said] == [True]
    assert result.timings["path"] == "compiled"
    bounds = [row["bound"] for row in result.history]
    assert len(set(bounds)) == 5
    assert max(bounds) - min(bounds) > 100  # of draws with a standard deviation of some thousand
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.isfinite(torch.randn(3, device="cuda")).all()


def test_a_cholesky_decomposition_is_recorded_where_it_does_not_wait(x):
    """Which is for the library to say that makes it."""
    torch.manual_seed(0)
    pair, bounds = Observed(nothing), []
    for compile in (False, True):
        settings = {"objective": pv.ELBO(200), "epochs": 3, "batch_size": 20, "device": "cuda", "lr": 1e-6}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            result = pv.fit(pair.model, pair.guide, x.float(), compile=compile, **settings)
        bounds.append(sum(row["bound"] for row in result.history) / 3)
    assert (result.timings["path"], len(said)) in {("cuda graph", 0), ("compiled", 1)}
    assert bounds[1] == pytest.approx(bounds[0], abs=0.5)


@pytest.mark.parametrize("layer", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_recurrent_layers_are_compiled_and_recorded(layer):
    """With dropout between two of them."""
    torch.manual_seed(0)
    encoder, head, decoder = layer(2, 8, 2, dropout=0.2), torch.nn.Linear(8, 4), torch.nn.Linear(2, 10)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z).unflatten(-1, (5, 2)), 0.5).to_event(2), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            mean, log_scale = head(encoder(x.transpose(0, 1))[0][-1]).chunk(2, -1)
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))

    x = torch.randn(60, 5, 2).cumsum(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "cannot")
        result = pv.fit(
            model, guide, x, objective=pv.ELBO(), epochs=30, batch_size=30, lr=1e-2, device="cuda", compile=True
        )
    assert result.timings["path"] == "cuda graph"
    assert result.history[-1]["bound"] > result.history[0]["bound"] + 3


@contextmanager
def meanwhile(act):
    """Another thread that does nothing else; the errors that it met."""
    done, failed = threading.Event(), []

    def busy():
        while not done.is_set():
            try:
                act()
            except Exception as error:
                failed.append(error)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        yield failed
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("compile", [False, True])
def test_other_threads_may_read_from_the_device_meanwhile(compile, digits):
    with meanwhile(lambda: torch.ones(5, device="cuda").sum().item()) as failed:
        result = fitted(make_vae(), digits, compile=compile, epochs=2)
    assert not failed
    assert result.timings["path"] == ("cuda graph" if compile else "eager")


@pytest.mark.filterwarnings("ignore:cannot record")
def test_a_recording_that_others_spoil_leaves_all_in_order(digits):
    """CUDA allows nobody to wait for a whole device while a graph is recorded; the training goes on without one."""
    vae = make_vae()
    with meanwhile(torch.cuda.synchronize):
        pv.fit(
            vae.model, vae.guide, digits, objective=pv.IWAE(3), epochs=3, batch_size=BATCH, device="cuda", compile=True
        )
    result = fitted(make_vae(), digits, compile=True, epochs=2)
    assert result.timings["path"] == "cuda graph"
    torch.cuda.manual_seed(0)
    first = torch.rand(5, device="cuda")
    torch.cuda.manual_seed(0)
    assert torch.equal(first, torch.rand(5, device="cuda"))


def in_a_row(monkeypatch, allowed):
    """How many steps are taken in a row, if that is allowed at all."""
    original, counts = Replays.__call__, []

    def counted(self, order, rates, weights):
        counts.append(len(rates))
        return original(self, order, rates, weights)

    monkeypatch.setattr(Replays, "__call__", counted)
    monkeypatch.setattr(Recorded, "in_a_row", Recorded.in_a_row if allowed else lambda *_: None)
    return counts


ROWS = {
    "plain": {},
    "annealed": {"kl_warmup": 2, "schedule": "linear", "clip_norm": 5.0},
    "stages": {"particles": (1, 3), "schedule": "cosine"},
}


@pytest.mark.parametrize("job", ROWS)
def test_steps_in_a_row_are_those_one_by_one(job, digits):
    """To the order in which a device may add."""
    results, weights_of = {}, {}
    for allowed in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            counts, vae = in_a_row(patch, allowed), make_vae()
            results[allowed] = fitted(vae, digits, compile=True, epochs=4, **ROWS[job])
            weights_of[allowed] = torch.cat([p.flatten() for p in weights(vae)])
            assert sum(counts) == (4 * 10 - (2 if job == "stages" else 1) if allowed else 0)
    assert [r.timings["path"] for r in results.values()] == ["cuda graph"] * 2
    torch.testing.assert_close(*weights_of.values(), rtol=1e-3, atol=1e-4)
    for one, many in zip(*(r.history for r in results.values()), strict=True):
        for key in ("bound", "learning_rate", "kl_weight", "num_particles", "steps", "grad_norm"):
            assert many[key] == pytest.approx(one[key], rel=1e-3)


def unlucky():
    """A pair whose loss is no number where a datum begins with 7."""
    net = torch.nn.Linear(3, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            mean = z + 0 * x + torch.where(x[:, :1] == 7, math.nan, 0.0)
            pyro.sample("x", dist.Normal(mean, 1.0, validate_args=False).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            mean, log_scale = net(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))

    return model, guide


def test_a_step_that_fails_in_a_row_is_told_as_one_by_one(monkeypatch):
    x = torch.randn(1000, 3)
    x[700, 0] = 7.0
    settings = {"objective": pv.ELBO(), "epochs": 2, "batch_size": 10, "device": "cuda", "compile": True}
    said, counts = [], in_a_row(monkeypatch, True)
    for compile in (False, True):
        with pytest.raises(NumericalError, match=r"step \d+ of epoch 1 was not taken") as caught:
            pv.fit(*unlucky(), x, **settings | {"compile": compile})
        said.append(str(caught.value).partition(" was not")[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = pv.fit(*unlucky(), x, on_nan="skip", **settings | {"compile": compile})
        assert [row["skipped"] for row in result.history] == [1, 1]
    assert said[0] == said[1]
    assert sum(counts) > 200


several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device on this machine")


@several
@pytest.mark.parametrize("compile", [False, True])
def test_any_device_trains_as_the_first_does(compile, digits):
    results = []
    for device in ("cuda:0", "cuda:1"):
        vae = make_vae()
        result = fitted(vae, digits, device=device, compile=compile, epochs=3)
        assert result.timings["path"] == ("cuda graph" if compile else "eager")
        assert {p.device for p in vae.parameters()} == {torch.device(device)}
        assert torch.cuda.current_device() == 0
        results.append(torch.cat([p.flatten().cpu() for p in weights(vae)]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)
    assert (results[0] - torch.cat([p.flatten() for p in make_vae().parameters()])).abs().max() > 1e-3


@several
def test_a_step_of_ones_own_runs_where_its_pair_is(digits):
    vae, x = make_vae().to("cuda:1"), digits.fixed().x[:BATCH].to("cuda:1")
    step = pv.training_step(vae.model, vae.guide, pv.ELBO(), torch.optim.Adam(vae.parameters(), lr=1e-2), x)
    losses = torch.stack([step(x) for _ in range(30)])
    assert len(losses.unique()) == 30
    assert losses[-5:].mean() < losses[:5].mean() - 3


@several
def test_draws_on_any_device_are_told_apart(monkeypatch):
    """Of two latents of one shape, on a device that is not the current one."""
    parameter = torch.zeros((), device="cuda:1", dtype=torch.float64, requires_grad=True)

    def latents(x):
        return [pyro.sample(name, dist.Normal(parameter + 0 * x, 1.0)) for name in ("a", "b")]

    def guide(x):
        with pyro.plate("data", len(x)):
            latents(x)

    def model(x):
        with pyro.plate("data", len(x)):
            a, b = latents(x)
            pyro.sample("x", dist.Normal(a - b, 1.0), obs=x)

    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    eager, compiled = (pv.log_likelihood(model, guide, x, num_samples=50, seed=0, compile=how) for how in (False, True))
    assert compiled.path == "compiled"
    torch.testing.assert_close(compiled.log_prob, eager.log_prob, rtol=1e-8, atol=1e-8)


@several
@pytest.mark.parametrize("compile", [False, True])
def test_a_run_goes_on_on_another_device_of_its_kind(compile, tmp_path, digits):
    results = []
    for ended in ("cuda:1", "cuda:0"):
        settings = {"epochs": 3, "run_dir": tmp_path / ended, "compile": compile}
        dying_at(
            loop, "run_epoch", 3, lambda settings=settings: fitted(make_vae(), digits, device="cuda:1", **settings)
        )
        vae = make_vae(seed=9)
        fitted(vae, digits, device=ended, resume=True, **settings)
        results.append(torch.cat([p.flatten().cpu() for p in weights(vae)]))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("compile", [False, True])
def test_a_run_goes_on_where_there_are_fewer_devices(compile, tmp_path, digits, monkeypatch):
    began = f"cuda:{torch.cuda.device_count() - 1}"
    settings = {"epochs": 3, "run_dir": tmp_path, "compile": compile}
    dying_at(loop, "run_epoch", 3, lambda: fitted(make_vae(), digits, device=began, **settings))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = fitted(make_vae(seed=9), digits, device="cpu", resume=True, **settings)
    assert len(result.history) == 3
    assert result.history[2]["bound"] > result.history[0]["bound"]


def test_the_weight_of_the_kl_of_a_recorded_step_may_change(digits):
    vae = make_vae()
    step, (batch, *_) = recorded(vae, digits, lambda p: torch.optim.SGD(p, lr=0.0), anneals=True)
    objective, losses = pv.ELBO(20), []
    for kl_weight in (0.0, 1.0, 100.0):
        objective.kl_weight = kl_weight
        losses.append(float(step(objective, batch).losses))
    assert len(step.recorded) == 1
    kl = losses[1] - losses[0]
    assert kl > 0.1
    assert losses[2] - losses[0] == pytest.approx(100 * kl, rel=0.5)  # a batch is binarised anew: kl is not the same


def test_the_last_batch_of_another_size_is_a_step_as_well(digits):
    vae = make_vae()
    step, batches = recorded(vae, digits)
    assert [len(batch[0]) for batch in batches] == [50] * 10 + [20]
    for batch in (batches[0], batches[-1], batches[1]):
        before = weights(vae)
        loss = step(pv.ELBO(), batch).losses
        assert 10 < float(loss) < 100
        assert all((p != b).any() for p, b in zip(weights(vae), before, strict=True))
    assert len(step.recorded) == 1


PLACES = [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")]


class Rows(torch.utils.data.Dataset):
    """Pairs of rows from two tensors, which may lie on different devices."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


@pytest.mark.parametrize("make", [lambda x, y: (x, y), TensorDataset, Rows])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("places", PLACES)
def test_data_may_lie_on_a_device_already(places, device, make, digits):
    vae, x = make_vae(), digits.fixed().x[:100]
    model, guide = (lambda x, _, run=run: run(x) for run in (vae.model, vae.guide))
    data = make(*(t.to(place) for t, place in zip((x, torch.rand(100, 2)), places, strict=True)))
    result = pv.fit(model, guide, data, objective=pv.ELBO(), epochs=1, batch_size=50, device=device)
    assert result.timings["steps"] == 2


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(("began", "ended"), PLACES)
def test_a_run_goes_on_on_another_device(began, ended, compile, tmp_path, digits):
    settings = {"epochs": 4, "run_dir": tmp_path, "schedule": "cosine", "compile": compile}
    dying_at(loop, "run_epoch", 3, lambda: fitted(make_vae(), digits, device=began, **settings))
    vae = make_vae(seed=9)
    result = fitted(vae, digits, device=ended, resume=True, **settings)
    bounds = [row["bound"] for row in result.history]
    assert len(bounds) == 4
    assert bounds[3] > bounds[2] - 1 > bounds[0] - 1
    assert result.history[-1]["learning_rate"] == pytest.approx(3e-3 * cosine((3 + 10 / 11) / 4))
    assert result.timings["path"] == {("cuda", True): "cuda graph", ("cpu", True): "compiled"}.get(
        (ended, compile), "eager"
    )
    loaded = pv.load(tmp_path)
    assert all(torch.equal(v.cpu(), loaded.state_dict()[k].cpu()) for k, v in vae.state_dict().items())
    again = fitted(make_vae(seed=9), digits, device="cpu", resume=True, **settings)
    assert len(again.history) == 4  # a finished run is left as it is


def test_replicas_learn_as_much_as_alone(digits, tmp_path):
    """Seeds differ by 0.15 nats in the bound and by 0.1 in the KL, one standard deviation: false alarm 1e-4."""
    pairs, folders = [make_vae(seed) for seed in range(3)], [tmp_path / str(r) for r in range(3)]
    settings = {"objective": pv.IWAE(3), "epochs": 20, "batch_size": BATCH, "device": "cuda"}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "cannot")
        results = pv.fit_replicas(
            pairs, digits, lr=[3e-3, 0.0, 3e-3], kl_weight=[1.0, 1.0, 10.0], run_dirs=folders, **settings
        )
    alone = fitted(make_vae(), digits, compile=False)
    assert [r.timings["path"] for r in results] == ["replicas"] * 3
    assert last_bound(results[0]) == pytest.approx(last_bound(alone), abs=1.0)
    assert all(torch.equal(p.cpu(), q) for p, q in zip(pairs[1].parameters(), make_vae(1).parameters(), strict=True))
    assert len({row["bound"] for row in results[1].history}) == 20  # new noise, new bits, even where nothing learns
    heavy = fitted(make_vae(2), digits, objective=pv.IWAE(3, kl_weight=10.0), compile=False)
    for key in ("bound", "kl"):
        assert last_bound(results[2], key) == pytest.approx(last_bound(heavy, key), abs=1.0 if key == "bound" else 0.4)
    assert last_bound(results[2], "kl") < 0.85 * last_bound(results[0], "kl")
    tensors = [p for pair in pairs for p in pair.parameters()]
    assert len({p.untyped_storage().data_ptr() for p in tensors}) == len(tensors)
    for pair, folder in zip(pairs, folders, strict=True):
        loaded = pv.load(folder)
        assert all(torch.equal(v.cpu(), loaded.state_dict()[k].cpu()) for k, v in pair.state_dict().items())


def test_the_compiled_likelihood_is_the_eager_one(vae, x):
    """In float64 on the same seed, so to rounding; batches of 8, 8 and 4, chunks of 40, 40 and 20."""
    vae = vae.cuda()
    options = {"num_samples": 100, "chunk_size": 40, "batch_size": 8, "seed": 0}
    eager, compiled = (
        pv.log_likelihood(vae.model, vae.guide, x.cuda(), compile=how, **options) for how in (False, True)
    )
    assert (eager.path, compiled.path) == ("eager", "compiled")
    torch.testing.assert_close(compiled.log_prob, eager.log_prob, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(compiled.std_error, eager.std_error, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("compile", [False, True])
def test_annealing_waits_for_the_device_between_temperatures_no_more(compile, vae, x, monkeypatch):
    """After the first, which compiles."""
    transition, calls = HMC.transition, []

    def watched(self, *args):
        calls.append(args)
        with unwaiting() if len(calls) > 1 else nullcontext():
            return transition(self, *args)

    monkeypatch.setattr(HMC, "transition", watched)
    pv.ais_log_likelihood(vae.cuda(), x.cuda(), num_chains=2, num_temperatures=3, leapfrog_steps=2, compile=compile)
    assert len(calls) > 40


@pytest.fixture
def little_memory():
    """Half a GiB for this process; what others tests left in the cache is given back before and after."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**29) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("compile", [False, True])
def test_memory_that_runs_out_halves_the_chunk(compile, x, little_memory):
    """A chunk of 400,000 draws for 20 data takes 1 GiB for its hidden units alone."""
    vae, x = make_vae().cuda(), x.float()
    last = [module for module in vae.encoder.modules() if isinstance(module, torch.nn.Linear)][-1]
    torch.nn.init.zeros_(last.weight)  # draws from the prior, almost: weights without heavy tails
    options = {"num_samples": 450_000, "chunk_size": 400_000, "seed": 0, "compile": compile}
    found = pv.log_likelihood(vae.model, vae.guide, x.cuda(), **options)
    few = pv.log_likelihood(vae.cpu().model, vae.guide, x, num_samples=5000, seed=1)
    error = (found.std_error.cpu() ** 2 + few.std_error**2).sqrt()
    assert ((found.log_prob.cpu() - few.log_prob).abs() < 6 * error).all()


@pytest.mark.parametrize("compile", [False, True])
def test_training_that_runs_out_of_memory_says_what_to_lower(compile, tmp_path, digits, little_memory):
    with pytest.raises(torch.OutOfMemoryError, match=r"GiB were free\): asked for batch_size=50 with 100000 particles"):
        fitted(
            make_vae(), digits, objective=pv.IWAE(1), particles=(1, 100_000), epochs=2, compile=compile,
            run_dir=tmp_path,
        )  # fmt: skip
    assert (tmp_path / "last").is_dir()
    assert len(pv.load(tmp_path).state_dict()) > 0


@pytest.mark.parametrize("compile", [False, True])
def test_training_in_bfloat16_learns_as_much(compile, digits):
    bounds = []
    for precision in ("float32", "bfloat16"):
        result = fitted(make_vae(network="conv", channels=(8,)), digits, compile=compile, precision=precision)
        assert result.timings["precision"] == precision
        bounds.append(last_bound(result))
    assert bounds[1] == pytest.approx(bounds[0], abs=1.0)
