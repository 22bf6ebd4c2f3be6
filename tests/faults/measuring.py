"""What is measured: data outside of their support, in another order, of another type, missing; figures by hand."""

import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import pyro.infer
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

import pyrovae as pv
from tests.faults.matrix import fault

LOGITS = torch.linspace(-1, 2, 4)


class Bits(torch.nn.Module):
    """Bits whose log p(x) is known: the latent, of which there must be one, says nothing of them."""

    def __init__(self):
        super().__init__()
        self.logits, self.loc = torch.nn.Parameter(LOGITS.clone()), torch.nn.Parameter(torch.zeros(()))

    def likelihood(self, z, x):
        return dist.Bernoulli(logits=self.logits + 0 * z.unsqueeze(-1)).to_event(1)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", self.likelihood(z, x), obs=self.seen(x))

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc, 1.0))

    def seen(self, x):
        return x


class Scaled(Bits):
    """The same of bytes, which the program divides itself."""

    def seen(self, x):
        return x / 255


def bits(number=200):
    return (torch.arange(number * 4).reshape(number, 4) * 7 % 5 > 2).float()


def exact(x):
    return torch.distributions.Bernoulli(logits=LOGITS.double()).log_prob(x.double()).sum(-1)


def wrong(value, at=150, number=200):
    """Bits, but for one value far from the first batch."""
    x = bits(number)
    x[at, 2] = value
    return x


class Rows(Dataset):
    """A data set that holds no tensor which the library could look through."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i]


class Stream(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x)


SOURCES = {
    "tensor": lambda x: x,
    "set": Rows,
    "loader": lambda x: DataLoader(Rows(x), 50),
    "shuffled": lambda x: DataLoader(Rows(x), 50, shuffle=True),
    "stream": lambda x: DataLoader(Stream(x), 50),
}
VALUES = {"grey": 0.25, "byte": 255.0, "two": 2.0, "negative": -1.0, "missing": math.nan, "infinite": math.inf}
OUTSIDE = r"^data\[150, 2\] = \S+ (is outside the support of|at) site \"x\"[^\n]*$"
EVERY = {f"{value}-{source}": (value, source) for value in ("grey", "missing") for source in SOURCES}
few = {"epochs": 1, "batch_size": 50, "device": "cpu", "progress": False, "compile": False, "num_workers": 0}


def measured(pair, data, **options):
    return pv.log_likelihood(pair.model, pair.guide, data, num_samples=2, seed=0, **options)


def fitted(pair, data, **options):
    options = {"objective": pv.ELBO(), **few, **options}
    return pv.fit(pair.model, pair.guide, data, **options)


def unmoved(pair):
    return torch.equal(pair.logits, LOGITS)


MEASURES = {
    "log_likelihood": lambda p, x: measured(p, x),
    "log_likelihood by 50": lambda p, x: measured(p, x, batch_size=50),
    "log_likelihood refined": lambda p, x: measured(p, x, batch_size=50, refine_steps=1),
    "log_likelihood compiled": lambda p, x: measured(p, x, compile=True, batch_size=50),
    "ais": lambda p, x: pv.ais_log_likelihood(p.model, x, num_chains=2, num_temperatures=2),
    "ais from the guide": lambda p, x: pv.ais_log_likelihood(
        p.model, x, guide=p.guide, num_chains=2, num_temperatures=2, batch_size=50
    ),
    "posterior_gap": lambda p, x: pv.posterior_gap(p.model, p.guide, x, num_particles=2, num_samples=2),
    "information": lambda p, x: pv.information(p.model, p.guide, x),
    "log_weights": lambda p, x: pv.log_weights(p.model, p.guide, x),
    "gradient_snr": lambda p, x: pv.gradient_snr(pv.ELBO(), p.model, p.guide, x, repetitions=2),
    "refine": lambda p, x: pv.refine(p.model, p.guide, x, steps=1),
    "loss": lambda p, x: pv.IWAE(2).loss(p.model, p.guide, x),
    "inflated": lambda p, x: pv.log_likelihood(p.model, pv.inflate(p.guide), x, num_samples=2),
}


@fault("A1", "measure", 3, OUTSIDE, each=MEASURES)
def a_value_is_outside_the_support(folder: Path, measure):
    yield lambda: measure(Bits(), wrong(0.25))


@fault("A1", "measure", 3, OUTSIDE, each=MEASURES)
def a_value_is_outside_and_pyro_does_not_look(folder: Path, measure):
    with pyro.validation_enabled(False):
        yield lambda: measure(Bits(), wrong(2.0))


@fault("A1", "log_likelihood", 3, OUTSIDE, each=EVERY)
def a_late_value_is_measured(folder: Path, each):
    value, source = each
    yield lambda: measured(Bits(), SOURCES[source](wrong(VALUES[value])))


@fault("A1", "fit", 3, OUTSIDE, each=EVERY)
def a_late_value_is_trained_on(folder: Path, each):
    value, source = each
    pair = Bits()
    yield lambda: fitted(pair, SOURCES[source](wrong(VALUES[value])), run_dir=folder / "run")
    assert unmoved(pair) or source not in ("tensor",)
    assert not (folder / "run" / "last").exists()


@fault("A1", "fit", 3, OUTSIDE, each=VALUES)
def a_value_of_any_kind_is_trained_on(folder: Path, value):
    yield lambda: fitted(Bits(), wrong(value))


@fault("A1", "fit validation", 3, OUTSIDE, each=EVERY)
def a_late_value_is_validated_on(folder: Path, each):
    value, source = each
    pair = Bits()
    yield lambda: fitted(pair, bits(), validation=SOURCES[source](wrong(VALUES[value])))
    assert unmoved(pair) or source != "tensor"


@fault("A1", "fit_replicas", 3, OUTSIDE, each={s: s for s in SOURCES if s != "set"})
def a_late_value_is_trained_on_by_replicas(folder: Path, source):
    pairs = [Bits(), Bits()]
    options = {name: value for name, value in few.items() if name not in ("compile", "num_workers")}
    yield lambda: pv.fit_replicas(pairs, SOURCES[source](wrong(0.25)), objective=pv.ELBO(), **options)


@fault("A1", "fit", 3, OUTSIDE, each={"tensor": "tensor", "shuffled": "shuffled"})
def a_late_value_is_trained_on_by_pyro(folder: Path, source):
    yield lambda: fitted(Bits(), SOURCES[source](wrong(0.25)), objective=pyro.infer.Trace_ELBO())


@fault("A1", "fit", 3, r'^data\[150, 2\] = \S+ is outside the support of site "x"', each={s: s for s in SOURCES})
def a_program_computes_what_it_observes(folder: Path, source):
    yield lambda: fitted(Scaled(), SOURCES[source](wrong(0.25) * 255))


@fault("A1", "log_likelihood", 3, r'^data\[150, 2\] = \S+ is outside the support of site "x"')
def a_program_computes_what_is_measured(folder: Path):
    yield lambda: measured(Scaled(), wrong(0.25) * 255, batch_size=50)


@fault("A1", "fit", 0, each={s: s for s in SOURCES})
def data_that_are_fine_are_trained_on(folder: Path, source):
    outcome = yield lambda: fitted(Bits(), SOURCES[source](bits()), epochs=2, batch_size=30)
    assert len(outcome.value.history) == 2


@fault("A1", "active_units", 3, r'site "z" at data\[150\] is nan')
def a_value_is_missing_where_only_a_guide_runs(folder: Path):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.nan_to_num(posinf=0) + 0 * x, 1.0).to_event(1))

    with pyro.validation_enabled(False):
        yield lambda: pv.active_units(guide, wrong(math.nan))


@fault("A1", "fit", 0)
def data_are_looked_at_once(folder: Path):
    """Training checks a datum in the first epoch only."""
    looked = []

    class Counted(Bits):
        def seen(self, x):
            looked.append(len(x))
            return super().seen(x)

    yield lambda: fitted(Counted(), DataLoader(Rows(bits()), 50), epochs=3)
    assert len(looked) <= 2 * 4 * 3 + 10  # guide aside, the program runs once a step and not for the check
