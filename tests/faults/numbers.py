"""What is no number: losses, gradients, bounds of -inf, weights; and what it must leave as it was."""

import math
import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyrovae as pv
from tests.faults.matrix import fault, small_run

INF, NAN, SIZE = math.inf, math.nan, 10  # the batches' size
X = torch.arange(160.0).reshape(40, 4).sin()
FORBIDDEN = X[[17, 21]]
COMPILE = {"eager": False, "compiled": True}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}
OURS = {
    "elbo": pv.ELBO(), "iwae": pv.IWAE(3), "dreg": pv.IWAE(3, gradient="dreg"), "stl": pv.ELBO(2, gradient="stl"),
    "renyi": pv.Renyi(0.5, 3), "rws": pv.RWS(3), "tvo": pv.TVO(3), "free_bits": pv.ELBO(free_bits=0.1),
}  # fmt: skip


class Mean(nn.Module):
    """x ~ N(m, 1) without latents, so that all is known: the gradient is the mean of m - x.

    A column c of each datum makes it bad: NaN gives its log-probability, -inf or inf its bound, and 1 its gradient.
    """

    def __init__(self, danger: bool = True) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.zeros(4))
        self.register_buffer("danger", torch.tensor(danger))

    def guide(self, x, c):
        pass

    def model(self, x, c):
        c = torch.where(self.danger, c, 0.0)
        good = (c != 1).to(x)
        nothing = (self.m[0] * 0 + good).sqrt() - good  # whose derivative is 0 * inf where c is 1
        with pyro.plate("data", len(x)):
            loc = self.m + torch.where(c.isnan(), c, nothing).unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)
            pyro.factor("f", torch.where(c.abs() == INF, c, 0.0))


class Latent(nn.Module):
    """A pair with batch normalisation, whose encoder adds c to what it gives."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encoder, self.norm, self.decoder = nn.Linear(4, 2), nn.BatchNorm1d(4), nn.Linear(2, 4)
        self.sick = False

    def guide(self, x, c):
        loc = self.encoder(self.norm(x + c.unsqueeze(-1))) * (NAN if self.sick else 1.0)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    def model(self, x, c):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)


def marks(*bad: float, at: int = 17) -> torch.Tensor:
    """c of all data, bad at one row after the other."""
    c = torch.zeros(len(X))
    c[at : at + len(bad)] = torch.tensor(bad)
    return c


def loader(c: torch.Tensor, rows: slice = slice(None)) -> DataLoader:
    return DataLoader(TensorDataset(X[rows], c[rows]), SIZE)


def trained(pair, data, **options):
    """One epoch if nothing else is said."""
    options = {"objective": pv.ELBO(), "epochs": 1, "device": "cpu", "progress": False} | options
    return pv.fit(pair.model, pair.guide, data, **options)


def weights(pair) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in pair.state_dict().items()}


def same(pair, expected) -> None:
    for name, tensor in pair.state_dict().items():
        assert torch.equal(tensor, expected[name]), (name, tensor, expected[name])


GOOD = torch.cat([torch.arange(10), torch.arange(20, 40)])  # all batches but the second
BAD = {
    "nan": (NAN, r"the data \(argument 1\) are nan in row 7 of the batch"),
    "infinite bound": (INF, r"the data \(argument 1\) are inf in row 7 of the batch"),
    "gradient": (1.0, r'the gradient in parameter "m" is nan'),
}


# --- a step is not taken ---------------------------------------------------------------------------------------------


@fault("A10", "fit", 5, r"^step 2 of epoch 1 was not taken, because .*last good weights$", each={
    f"{bad}, {how}": (bad, how) for bad in BAD for how in COMPILE
})  # fmt: skip
def a_bad_step_ends_training_where_it_was_good(folder: Path, case):
    bad, how = case
    pair, alone = Mean(), Mean()
    trained(alone, loader(marks(), slice(10)), compile=COMPILE[how])
    outcome = yield lambda: trained(pair, loader(marks(BAD[bad][0])), compile=COMPILE[how])
    assert re.search(BAD[bad][1], outcome.message), outcome.message
    same(pair, weights(alone))
    assert pair.m.abs().sum() > 0


@fault("A10", "fit", 0, 'step 2 of epoch 1 was skipped, because .*counts such steps as "skipped"', each={
    f"{bad}, {how}, {optimizer}": (bad, how, optimizer)
    for bad, how, optimizer in [
        *((bad, how, "fused") for bad in BAD for how in COMPILE), *(("nan", "eager", name) for name in OPTIMIZERS),
    ]
})  # fmt: skip
def a_skipped_step_leaves_no_trace(folder: Path, case):
    """Without latents there is no noise: what follows is what it would be without the batch."""
    bad, how, optimizer = case
    options = {"compile": COMPILE[how], "optimizer": OPTIMIZERS[optimizer], "epochs": 3}
    pair, without = Mean(), Mean()
    expected = trained(without, DataLoader(TensorDataset(X[GOOD], marks()[GOOD]), SIZE), **options)
    outcome = yield lambda: trained(pair, loader(marks(BAD[bad][0])), on_nan="skip", **options)
    same(pair, weights(without))
    for row, other in zip(outcome.value.history, expected.history, strict=True):
        assert (row["skipped"], other["skipped"], row["left_out"]) == (1, 0, 0)
        assert math.isclose(row["bound"], other["bound"], rel_tol=1e-6)


@fault("A10", "fit_replicas", 0, "step 2 of epoch 1 was skipped, because the data", each=COMPILE)
def only_the_bad_replica_is_withheld_its_step(folder: Path, stay_batched):
    pairs, alone = [Mean(False), Mean()], [Mean(), Mean()]
    options = {"optimizer": OPTIMIZERS["fused"], "epochs": 2}
    trained(alone[0], loader(marks()), **options)
    trained(alone[1], DataLoader(TensorDataset(X[GOOD], marks()[GOOD]), SIZE), **options)
    data = loader(marks(NAN))
    if not stay_batched:  # one after the other
        pairs[0].model = lambda x, c: (x.sum().item(), Mean.model(pairs[0], x, c))[1]
    settings = {"objective": pv.ELBO(), "device": "cpu", "progress": False, **options}
    outcome = yield lambda: pv.fit_replicas(pairs, data, on_nan="skip", **settings)
    assert [[row["skipped"] for row in fit.history] for fit in outcome.value] == [[0, 0], [1, 1]]
    for pair, expected in zip(pairs, alone, strict=True):
        torch.testing.assert_close(pair.m, expected.m, rtol=1e-6, atol=1e-7)


class Raising(Mean):
    """Raises once where it is told to, as a decomposition does that finds NaN."""

    armed = False

    def model(self, x, c):
        if self.armed:
            self.armed = False
            raise RuntimeError("the decomposition did not converge")
        super().model(x, c)


class Uneven(IterableDataset):
    """The second batch of each epoch has another size, so that it runs eagerly, and a bad row."""

    def __init__(self, pair):
        self.pair = pair

    def __iter__(self):
        for i in range(10, 40, SIZE):
            yield X[i : i + SIZE], marks()[i : i + SIZE]
            if i == 10:
                self.pair.armed = True
                yield X[:7], marks(NAN, at=3)[:7]


@fault("A10", "fit_replicas", 0, "replica 0: step 2 of epoch 1 was skipped, because replica 1: the data .* row 3")
def a_step_that_raises_is_skipped_by_all_replicas(folder: Path):
    pairs, alone = [Mean(False), Raising()], Mean()
    settings = {"objective": pv.ELBO(), "device": "cpu", "progress": False, "optimizer": OPTIMIZERS["fused"]}
    pv.fit(alone.model, alone.guide, loader(marks(), slice(10, 40)), epochs=1, **settings)
    data = DataLoader(Uneven(pairs[1]), batch_size=None)
    outcome = yield lambda: pv.fit_replicas(pairs, data, epochs=1, on_nan="skip", **settings)
    assert [(row["skipped"], row["steps"]) for fit in outcome.value for row in fit.history] == [(1, 4)] * 2
    for pair in pairs:
        torch.testing.assert_close(pair.m, alone.m, rtol=1e-6, atol=1e-7)


@fault("A10", "training_step", each={f"{rows} of 10": rows for rows in (0, 2)})
def a_step_says_how_many_data_it_left_out(folder: Path, number):
    pair = Mean()
    step = pv.training_step(
        pair.model, pair.guide, pv.ELBO(), torch.optim.SGD(pair.parameters(), 0.1), X[:10], marks()[:10]
    )
    assert step.left_out == 0
    for size in (10, 8):
        assert step(X[:size], marks(*[-INF] * number, at=3)[:size]).isfinite()
        assert step.left_out == number
    outcome = yield lambda: int(step.left_out)
    assert outcome.value == number


@fault("A10", "fit_replicas", 5, "replica 1: step 2 of epoch 1 was not taken.*last good weights")
def a_bad_replica_is_named(folder: Path):
    pairs, alone = [Mean(False), Mean()], Mean()
    trained(alone, loader(marks(), slice(10)))
    data, settings = loader(marks(NAN)), {"objective": pv.ELBO(), "device": "cpu", "progress": False}
    yield lambda: pv.fit_replicas(pairs, data, epochs=2, **settings)
    torch.testing.assert_close(pairs[1].m, alone.m, rtol=1e-6, atol=1e-7)
    assert pairs[0].m.isfinite().all()


@fault("A10", "training_step", each={
    f"{bad}, {optimizer}": (bad, optimizer) for bad, optimizer in zip(BAD, OPTIMIZERS, strict=False)
})  # fmt: skip
def a_step_of_ones_own_moves_nothing(folder: Path, case):
    bad, name = case
    pairs = Mean(), Mean()
    optimizers = [OPTIMIZERS[name](pair.parameters()) for pair in pairs]
    batches = list(loader(marks(BAD[bad][0])))
    steps = [
        pv.training_step(pair.model, pair.guide, pv.ELBO(), optimizer, *batches[0])
        for pair, optimizer in zip(pairs, optimizers, strict=True)
    ]
    for number in (0, 2, 3):
        steps[1](*batches[number])
    outcome = yield lambda: [steps[0](*batch).item() for batch in batches]
    assert [math.isnan(loss) for loss in outcome.value] == [False, True, False, False]
    same(pairs[0], weights(pairs[1]))
    states = [optimizer.state[pair.m] for pair, optimizer in zip(pairs, optimizers, strict=True)]
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(states[1][k])) for k, v in states[0].items())


@fault("A10", "fit", 5, r"argument 1\) are nan in row 7 of the batch", each=COMPILE)
def averages_of_batch_normalisation_stay_as_they_were(folder: Path, compile):
    pair, alone = Latent(), Latent()
    trained(alone, loader(marks(), slice(10)), compile=compile)
    yield lambda: trained(pair, loader(marks(NAN)), compile=compile)
    same(pair, weights(alone))
    assert pair.norm.num_batches_tracked == 1
    assert pair.norm.running_mean.abs().sum() > 0


class LateAverage(nn.Module):
    """Averages its input from its third step on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("average", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.steps += 1
            self.average += (self.steps > 2) * (x.mean() - self.average) / 2
        return x


class Averaging(Latent):
    """With such an average in the place of the batch's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = LateAverage()


@fault("A10", "fit", 0, "skipped")
def a_buffer_that_moves_late_stays_as_it_was(folder: Path):
    bad, last = marks(NAN, at=len(X) - 1), len(X) - SIZE
    pairs = Averaging(), Averaging()
    assert last == 3 * SIZE

    def fit(pair, rows, c):
        pv.fit(pair.model, pair.guide, loader(c, rows), objective=pv.ELBO(), epochs=1, on_nan="skip", compile=False)

    yield lambda: fit(pairs[0], slice(None), bad)
    fit(pairs[1], slice(last), marks())
    assert pairs[0].norm.steps == 3
    assert pairs[0].norm.average != 0
    same(pairs[0], weights(pairs[1]))


@fault("A10", "training_step", 0)
def a_moving_codebook_stays_as_it_was(folder: Path):
    torch.manual_seed(0)
    pair = pv.models.VQVAE((1, 8, 8), ema_decay=0.9, likelihood="gaussian")
    x = torch.rand(6, 1, 8, 8)
    bad = x.clone()
    bad[2, 0, 3, 3] = NAN
    optimizer = torch.optim.Adam(pair.parameters())
    step = pv.training_step(pair.model, pair.guide, pv.ELBO(), optimizer, x)
    start = weights(pair)
    step(x)
    before = weights(pair)
    assert not torch.equal(start["quantizer.ema_count"], before["quantizer.ema_count"])
    outcome = yield lambda: step(bad).item()
    assert math.isnan(outcome.value)
    same(pair, before)
    assert math.isfinite(step(x).item())


@fault("A10", "fit", 5, 'the gradient in parameter "leaf.0" is -?inf|the norm of the gradient overflows', each={
    "of an infinite gradient": INF, "of one whose norm overflows": 1e25,
})  # fmt: skip
def gradients_are_not_clipped_by_an_infinite_norm(folder: Path, size):
    m = nn.Parameter(torch.zeros(4))
    m.register_hook(lambda gradient: gradient * size)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0).to_event(1), obs=x)

    yield lambda: pv.fit(
        model, lambda x: None, X + 1, objective=pv.ELBO(), epochs=1, clip_norm=1.0, device="cpu", progress=False
    )
    assert torch.equal(m, torch.zeros(4))


@fault("A10", "fit", 5, '"exp_avg_sq" of parameter "leaf.0" overflowed: lower lr')
def what_adam_keeps_overflows(folder: Path):
    """The gradient is finite, its square is not: the parameter would never move again."""
    m = nn.Parameter(torch.zeros(4))
    m.register_hook(lambda gradient: gradient * 1e25)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0).to_event(1), obs=x)

    yield lambda: pv.fit(model, lambda x: None, X + 1, objective=pv.ELBO(), epochs=1, device="cpu", progress=False)
    assert m.isfinite().all()


@fault("A10", "fit", 5, "infinite, from a finite gradient: lower lr|overflow|is inf|was not taken", each={
    "in the last step": 1, "with steps to come": 4,
})  # fmt: skip
def an_update_overflows(folder: Path, steps):
    pair = Mean()
    trained(pair, loader(marks()), optimizer=OPTIMIZERS["sgd"])
    before = weights(pair)
    data = loader(marks(), slice(10 * steps))
    yield lambda: trained(pair, data, optimizer=lambda p: torch.optim.SGD(p, lr=1e30, momentum=0.9), epochs=2)
    assert all(tensor.isfinite().all() for tensor in pair.state_dict().values())
    assert steps > 1 or before.keys() == pair.state_dict().keys()


@fault(
    "A10",
    "fit",
    2,
    r"schedule must give factors in .*, got (nan|inf)",
    each={"nan": NAN, "inf": INF},
)
def a_schedule_gives_no_number(folder: Path, factor):
    pair = Mean()
    yield lambda: trained(pair, loader(marks()), epochs=2, schedule=lambda progress: 1.0 if progress < 0.5 else factor)
    assert pair.m.isfinite().all()


@fault("A10", "fit", 5, r"step 10 of epoch 1 was not taken \(10 in a row\), because the data")
def too_many_steps_in_a_row_are_skipped(folder: Path):
    pair = Mean()
    data = DataLoader(TensorDataset(X, torch.full((40,), NAN)), 2)
    yield lambda: trained(pair, data, on_nan="skip")
    assert torch.equal(pair.m, torch.zeros(4))


@fault("A10", "fit", 5, "no step of epoch 1 was taken")
def every_step_of_an_epoch_is_skipped(folder: Path):
    yield lambda: trained(Mean(), loader(torch.full((40,), NAN)), on_nan="skip")


@fault("A10", "fit", 2, 'on_nan must be.*"raise".*"skip"|on_nan', each={"word": "ignore", "none": None})
def a_wrong_choice_is_refused(folder: Path, choice):
    yield lambda: trained(Mean(), loader(marks()), on_nan=choice)


@fault("A10", "fit", 5, 'parameter "m" is nan: give the pair finite weights', each={
    "raise": "raise", "skip": "skip",
})  # fmt: skip
def a_pair_that_is_nan_from_the_start(folder: Path, on_nan):
    pair = Mean()
    with torch.no_grad():
        pair.m[2] = NAN
    yield lambda: trained(pair, loader(marks()), on_nan=on_nan)
    assert torch.equal(pair.m.isnan(), torch.tensor([False, False, True, False]))


@fault("A10", "fit", 5, 'the draw at guide site "z" is nan in all rows of the batch.*is the last checkpoint', each={
    "ours": pv.IWAE(2), "pyro": pyro.infer.Trace_ELBO(),
})  # fmt: skip
def a_run_that_became_bad_can_go_on(folder: Path, objective):
    """It keeps its last checkpoint, and ends with the bits that it would have had."""
    pair, again, whole = Latent(), Latent(), Latent()
    options = {"objective": objective, "epochs": 3}
    trained(whole, loader(marks()), **options)

    def after(fit):
        pair.sick = len(fit.history) == 2

    yield lambda: trained(pair, loader(marks()), run_dir=folder / "run", on_epoch=after, **options)
    assert all(tensor.isfinite().all() for tensor in pair.state_dict().values())
    trained(again, loader(marks()), run_dir=folder / "run", resume=True, on_nan="skip", **options)
    same(again, weights(whole))


# --- data without a bound --------------------------------------------------------------------------------------------


@fault(
    "A10",
    "fit",
    0,
    r"2 of 10 data have a bound of -inf in step 2 of epoch 1 .*-inf in rows 7, 8 of the batch",
    each=COMPILE,
)
def data_without_a_bound_are_left_out(folder: Path, compile):
    """By hand: the others keep their weight of a tenth each, and the epoch's bound is the mean of 38."""
    pair = Mean()
    outcome = yield lambda: trained(
        pair, loader(marks(-INF, -INF)), compile=compile, optimizer=lambda p: torch.optim.SGD(p, lr=0.5)
    )
    m, bounds = torch.zeros(4, dtype=torch.float64), []
    for start in range(0, 40, SIZE):
        kept = [row for row in range(start, start + SIZE) if row not in (17, 18)]
        bounds.append(dist.Normal(m, 1.0).log_prob(X[kept].double()).sum(-1))
        m = m - 0.5 * (m - X[kept].double()).sum(0) / SIZE
    torch.testing.assert_close(pair.m.double(), m, rtol=1e-6, atol=1e-7)
    row = outcome.value.history[0]
    assert (row["left_out"], row["skipped"]) == (2, 0)
    assert math.isclose(row["bound"], torch.cat(bounds).mean().item(), rel_tol=1e-6)


@fault("A10", "fit", 0, r"the log-probability at model site \"f\" is -inf in rows 17, 21 of the data")
def data_are_named_by_their_place_in_the_set(folder: Path):
    """The order is shuffled, but of one batch."""
    pair = Dead()
    outcome = yield lambda: trained(pair, X, epochs=2, batch_size=40)
    assert [row["left_out"] for row in outcome.value.history] == [2, 2]


@fault("A10", "fit", 0, r"1 of 10 data have a bound of -inf in step \d of epoch 1", each=OURS)
def under_every_objective(folder: Path, objective):
    pair = Dead()
    outcome = yield lambda: trained(pair, X[:30], batch_size=10, objective=objective, epochs=2)
    assert [row["left_out"] for row in outcome.value.history] == [2, 2]
    assert all(math.isfinite(row["bound"]) for row in outcome.value.history)
    assert all(p.isfinite().all() for p in pair.parameters())


@fault("A10", "fit_replicas", 0, "replica 0: 2 of 40 data have a bound of -inf in step 1 of epoch 1")
def of_each_replica(folder: Path):
    pairs, alone = [Dead(), Dead()], Dead()
    expected = trained(alone, X, batch_size=40, epochs=2)
    settings = {"objective": pv.ELBO(), "device": "cpu", "progress": False, "batch_size": 40}
    outcome = yield lambda: pv.fit_replicas(pairs, X, epochs=2, **settings)
    for fit in outcome.value:
        assert [row["left_out"] for row in fit.history] == [2, 2]
        assert abs(fit.history[0]["bound"] - expected.history[0]["bound"]) < 2


@fault("A10", "fit", 5, r'step 2 of epoch 1 .*because the log-probability at model site "g" is -inf in all rows')
def no_datum_of_a_batch_has_a_bound(folder: Path):
    pair, alone = Mean(), Mean()
    trained(alone, loader(marks(), slice(10)))
    with_data = TensorDataset(X, marks(*[1e9] * 10, at=10))
    model = pair.model
    pair.model = lambda x, c: (model(x, 0 * c), never(x, c == 1e9))[0]
    yield lambda: trained(pair, DataLoader(with_data, SIZE))
    same(pair, weights(alone))


@fault(
    "A10",
    "fit",
    5,
    r'gradient in parameter "leaf.0" is (nan|-?inf), where the log-probability at model site "x" is -inf',
)
def a_datum_without_a_bound_has_no_finite_gradient(folder: Path):
    """Its coefficient is 0, but 0 * inf is NaN: it cannot be left out."""
    m = nn.Parameter(torch.zeros(1))
    pair = nn.Module()
    pair.m = m

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(m.exp() * (x < 5), validate_args=False), obs=x)

    pair.model, pair.guide = model, lambda x: None
    yield lambda: trained(pair, torch.tensor([1.0, 2.0, 7.0]), compile=False)
    assert torch.equal(m, torch.zeros(1))


@fault(
    "A10", "fit", 5, r'step 1 of epoch 1 .*because the log-probability at model site "f" is -inf in rows 17, 21 of the'
)
def an_objective_of_pyros_is_one_number(folder: Path):
    pair = Dead()
    before = weights(pair)
    yield lambda: trained(pair, X, batch_size=40, objective=pyro.infer.Trace_ELBO())
    same(pair, before)


def never(x: torch.Tensor, dead: torch.Tensor) -> None:
    """No bound for some data."""
    with pyro.plate("never", len(x), dim=-1):
        pyro.factor("g", torch.where(dead, -INF, 0.0))


class Dead(nn.Module):
    """A pair with a latent, whose model forbids the data 17 and 21."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encoder, self.decoder = nn.Linear(4, 2), nn.Linear(2, 4)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))

    def model(self, x):
        dead = (x.unsqueeze(1) == FORBIDDEN).all(-1).any(-1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)
            pyro.factor("f", torch.where(dead, -INF, 0.0))


# --- other training, and figures -------------------------------------------------------------------------------------


@fault("A10", "fit", 0, "the validation bound of epoch 1 is NaN, and counts as -inf")
def a_validation_bound_is_nan(folder: Path):
    """Patience counts it as no improvement, and no best epoch follows from it."""
    pair = Mean()
    outcome = yield lambda: trained(pair, loader(marks()), epochs=9, validation=loader(marks(NAN)), patience=2)
    assert len(outcome.value.history) == 3


@fault("A10", "rbm.fit", 5, "lower lr")
def an_rbm_overflows(folder: Path):
    machine = pv.models.RBM((8,), 3)
    data = (X.repeat(1, 2) > 0).float()
    yield lambda: machine.fit(data, epochs=3, batch_size=10, lr=1e38, device="cpu", progress=False)
    assert all(p.isfinite().all() for p in machine.parameters())


@fault("A10", "pca.fit", 5, "a variance of .* overflows torch.float32: scale the data down")
def a_variance_overflows(folder: Path):
    pca = pv.models.PCA((4,), 2)
    yield lambda: pca.fit(torch.randn(40, 4, dtype=torch.float64) * 1e30)
    assert pca.noise_variance.isnan(), "it still counts as not fitted"


@fault("A10", "train", 5, r"^error: step \d+ of epoch 1 was not taken, because|error: .*lower lr", each={
    "vae": (), "rbm": ("rbm",),
})  # fmt: skip
def the_command_ends_with_one_line(folder: Path, model):
    options = ("--epochs", "3", "--device", "cpu", "--run-dir", folder / "run", "--lr", "1e38")
    yield "train", *model, *options
    assert not (folder / "run" / "results.json").exists()


@fault("A10", "log_likelihood", 5, "log-weights of datum 0 are NaN", each={"all": None, "refined": 2})
def weights_of_nan_give_no_figure(folder: Path, steps):
    pair = Latent()
    with torch.no_grad():
        pair.decoder.bias.fill_(NAN)
    more = {"refine_steps": steps} if steps else {}
    with pyro.validation_enabled(False):
        yield lambda: pv.log_likelihood(pair.model, pair.guide, X, marks(), num_samples=3, **more)


def nan_bias(network: torch.nn.Linear) -> None:
    with torch.no_grad():
        network.bias.fill_(NAN)


@fault("A10", "ais_log_likelihood", 5, r"^log p\(x\) of 5 of 5 data is NaN: check")
def chains_that_are_nan_give_no_figure(folder: Path):
    pair = Latent()
    nan_bias(pair.decoder)
    with pyro.validation_enabled(False):
        yield lambda: pv.ais_log_likelihood(pair.model, X[:5], marks()[:5], num_temperatures=3)


@fault("A10", "active_units", 5, r'^the posterior mean of site "z" at data\[0\] is nan: data and parameters')
def units_of_a_nan_encoder(folder: Path):
    pair = Dead()
    nan_bias(pair.encoder)
    with pyro.validation_enabled(False):
        yield lambda: pv.active_units(pair.guide, X)


@fault("A10", "refine", 0)
def a_datum_without_a_gradient_keeps_the_guide(folder: Path):
    pair = Dead()
    refined = yield lambda: pv.refine(pair.model, pair.guide, X, steps=3, seed=0)
    log_w = pv.log_weights(pair.model, refined.value, X, num_particles=3)
    assert not log_w.isnan().any()
    assert (log_w == -INF).all(0).nonzero().flatten().tolist() == [17, 21]


@fault("A10", "evaluate", 5, r"is nan in the checkpoint .*: give the pair finite weights")
def a_run_of_nan_is_not_measured(folder: Path):
    from pyrovae import runs

    run = small_run(folder / "run")
    kept = runs.Run(run)
    kept.save("last", {name: tensor * NAN for name, tensor in kept.weights().items()})
    yield "evaluate", run, "--samples", "5", "--device", "cpu"
    assert not (run / "results.json").exists() or "NaN" not in (run / "results.json").read_text()


class Shifted(nn.Module):
    """x ~ N(m, 1), where a parameter of another type of numbers shifts m; that is trained, and comes first."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.shift, self.net = nn.Parameter(torch.zeros(4, dtype=dtype)), nn.Linear(4, 4)

    def model(self, x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0 * self.net(x) + self.shift.real.float(), 1.0).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None: ...


@fault("D", "fit", each={
    f"{kind} {how}": (getattr(torch, kind), how) for kind in ("float64", "bfloat16", "complex64") for how in COMPILE
})  # fmt: skip
def a_parameter_of_another_type_of_numbers(folder: Path, case):
    pair, sgd = Shifted(case[0]), lambda parameters: torch.optim.SGD(parameters, lr=1.0)
    yield lambda: pv.fit(
        pair.model, pair.guide, X, objective=pv.ELBO(), epochs=3, compile=COMPILE[case[1]], optimizer=sgd
    )
    assert torch.allclose(pair.shift.real.float(), X.mean(0), atol=1e-2)


@fault("A10", "fit", 5, r'gradient in parameter "shift" is \(?nan')
def a_complex_gradient_that_is_nan(folder: Path):
    pair = Shifted(torch.complex64)
    pair.shift.register_hook(lambda gradient: gradient * NAN)
    yield lambda: trained(pair, X, compile=False)
    assert not pair.shift.any()


class Missing(nn.Module):
    """Bits or counts of which some are missing."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.zeros(4))

    def model(self, x: torch.Tensor) -> None:
        kind = dist.Bernoulli(logits=self.m) if x.nan_to_num().max() <= 1 else dist.Poisson(self.m.exp())
        with pyro.plate("data", len(x)):
            pyro.sample("x", kind.expand([len(x), 4]).mask(~x.isnan()).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None: ...


@fault("D", "fit", each={"bits": (1, torch.sigmoid), "counts": (5, torch.exp)})
def missing_bits_and_counts_are_masked(folder: Path, case):
    pair, x = Missing(), (X.abs() * case[0]).round()
    x[3, 1] = NAN
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.2)  # noqa: E731
    yield lambda: pv.fit(pair.model, pair.guide, x, objective=pv.ELBO(), epochs=300, compile=False, optimizer=sgd)
    assert torch.allclose(case[1](pair.m), x.nanmean(0), atol=1e-2)
