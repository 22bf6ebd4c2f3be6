"""What is measured: data outside of their support, in another order, of another type, missing; figures by hand."""

import math
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torch.utils.data.sampler import BatchSampler, RandomSampler, Sampler, SubsetRandomSampler, WeightedRandomSampler

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
    "ais": lambda p, x: pv.ais_log_likelihood(p.model, x, num_chains=2, num_temperatures=2, leapfrog_steps=1),
    "ais from the guide": lambda p, x: pv.ais_log_likelihood(
        p.model, x, guide=p.guide, num_chains=2, num_temperatures=2, leapfrog_steps=1, batch_size=50
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


# --- the test part, before step 1 ------------------------------------------------------------------------------------


def split_file(path, test):
    np.savez(path, x=bits(60).numpy(), x_test=test.numpy())
    return f"npz:{path}"


PARTS = {"grey": 0.25, "byte": 255.0, "negative": -3.0}
TRAIN = "train", "vae", "--epochs", "1", "--samples", "5", "--latent-dim", "2", "--set", "hidden=[4]", "--device", "cpu"


@fault("A1", "train", 3, r"data\[40, 2\] = \S+ is outside the support of site \"x\"", each=PARTS)
def the_test_part_alone_is_outside_the_support(folder: Path, value):
    data = split_file(folder / "data.npz", wrong(value, 40, 60))
    yield *TRAIN, "--data", data, "--run-dir", folder / "run"
    assert not (folder / "run" / "metrics.jsonl").exists()
    assert not (folder / "run" / "last").exists()


@fault("A1", "train", 0)
def a_test_part_inside_the_support(folder: Path):
    yield *TRAIN, "--data", split_file(folder / "data.npz", bits(60)), "--run-dir", folder / "run"
    assert (folder / "run" / "results.json").exists()


# --- in the order of the data set ------------------------------------------------------------------------------------


class Gauss(torch.nn.Module):
    """log p(x) and the posterior are known: every weight is exact."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(2, dtype=dtype))

    def model(self, x, *more):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.shift.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) + self.shift, 1.0).to_event(1), obs=x)

    def guide(self, x, *more):
        with pyro.plate("data", len(x)):
            pyro.sample(
                "z", dist.Normal(torch.nn.functional.linear(x, (1 / 3 + self.shift)[None]).squeeze(-1), 3**-0.5)
            )


def gauss(x):
    covariance = torch.eye(2).double() + 1
    return torch.distributions.MultivariateNormal(torch.zeros(2).double(), covariance).log_prob(x.double())


LINE = torch.linspace(-2, 2, 36).reshape(18, 2)


def same(found, exact, tolerance=1e-5):
    assert found.shape == exact.shape
    assert (found.double() - exact).abs().max() < tolerance, (found, exact)


def loader(sampler=None, data=None, **options):
    return DataLoader(Rows(LINE) if data is None else data, **{"batch_size": 5, "sampler": sampler, **options})


def doubled(rows):
    return 2 * torch.stack(rows)


IN_ORDER = {
    "plain": loader,
    "shuffled": lambda: loader(shuffle=True),
    "dropping": lambda: loader(drop_last=True),
    "shuffled and dropping": lambda: loader(shuffle=True, drop_last=True, batch_size=7),
    "with a worker": lambda: loader(shuffle=True, num_workers=1, multiprocessing_context="fork"),
    "of shuffled batches": lambda: DataLoader(Rows(LINE), batch_sampler=BatchSampler(RandomSampler(LINE), 5, True)),
    "of a stream that drops": lambda: loader(data=Stream(LINE), drop_last=True),
    "of tensors": lambda: DataLoader(TensorDataset(LINE), 5, shuffle=True),
}
MEASURED_IN_ORDER = {
    "log_likelihood": lambda pair, data: measured(pair, data),
    "ais": lambda pair, data: pv.ais_log_likelihood(
        pair.model, data, guide=pair.guide, num_chains=2, num_temperatures=2, leapfrog_steps=1, seed=0
    ),
}
BOTH = {f"{verb}-{name}": (verb, name) for verb in MEASURED_IN_ORDER for name in IN_ORDER}


@fault("A2", "loader", 0, r"\A\s*\Z", each=BOTH)
def a_loader_is_measured_in_order(folder: Path, each):
    verb, name = each
    outcome = yield lambda: MEASURED_IN_ORDER[verb](Gauss(), IN_ORDER[name]())
    same(outcome.value.log_prob, gauss(LINE))


@fault("A2", "loader", 0)
def the_collate_function_is_used(folder: Path):
    outcome = yield lambda: measured(Gauss(), loader(shuffle=True, collate_fn=doubled))
    same(outcome.value.log_prob, gauss(2 * LINE))


REPEATING = {
    "weighted": lambda: loader(WeightedRandomSampler([1.0] * 17 + [50.0], 18)),
    "with replacement": lambda: loader(RandomSampler(LINE, replacement=True)),
    "of some": lambda: loader(RandomSampler(LINE, num_samples=7)),
}


@fault(
    "A2", "loader", 0, "every datum once, in order: the loader's (Weighted)?RandomSampler is not used", each=REPEATING
)
def a_sampler_that_repeats_is_left_out(folder: Path, make):
    outcome = yield lambda: measured(Gauss(), make())
    same(outcome.value.log_prob, gauss(LINE))


@fault("A2", "loader", 0, each={"sampler": SubsetRandomSampler, "list": list})
def a_loader_of_a_part_is_measured_in_its_order(folder: Path, kind):
    outcome = yield lambda: measured(Gauss(), loader(kind([4, 2, 9, 17, 0, 3])))
    same(outcome.value.log_prob, gauss(LINE[[4, 2, 9, 17, 0, 3]]))


class Odd(Sampler):
    def __iter__(self):
        return iter(range(1, 18, 2))

    def __len__(self):
        return 9


class Buckets(Sampler):
    def __iter__(self):
        return iter([[3, 1], [2, 0]])

    def __len__(self):
        return 2


OWN = {
    "Odd": lambda: loader(Odd()),
    "Buckets": lambda: DataLoader(Rows(LINE), batch_sampler=Buckets()),
}


@fault("A2", "loader", 2, r"sampler of its own, (Odd|Buckets): pass the data set itself", each=OWN)
def a_sampler_of_ones_own_is_refused(folder: Path, make):
    yield lambda: measured(Gauss(), make())


@fault("A2", "fit validation", 2, "sampler of its own, Odd: pass the data set itself")
def a_sampler_of_ones_own_is_refused_before_training(folder: Path):
    pair = Gauss()
    yield lambda: fitted(pair, LINE, validation=loader(Odd()), run_dir=folder / "run")
    assert torch.equal(pair.shift, torch.zeros(2))
    assert not (folder / "run").exists()


@fault("A2", "fit validation", 0)
def validation_sees_every_datum(folder: Path):
    pair, options = Gauss(), {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
    outcome = yield lambda: fitted(pair, LINE, validation=loader(shuffle=True, drop_last=True, batch_size=7), **options)
    assert abs(outcome.value.history[0]["validation_bound"] - gauss(LINE).mean()) < 1e-5


class Changing(Gauss):
    """Has a latent more, or one of another size, in the last batch."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def more(self, x):
        if (self.change == "absent" and len(x) < 5) or (self.change == "first" and len(x) == 5):
            pyro.sample("w", dist.Normal(0.0, 1.0))
        elif self.change == "size":
            pyro.sample("w", dist.Normal(torch.zeros(len(x), 2 + (len(x) < 5)), 1.0).to_event(1))

    def model(self, x):
        with pyro.plate("data", len(x)):
            self.more(x)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) + self.shift, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            self.more(x)
            pyro.sample("z", dist.Normal(x.sum(-1) / 3, 3**-0.5))


CHANGES = {change: change for change in ("absent", "first", "size")}


@fault("A2", "num_draws", 0, each=CHANGES)
def draws_of_batches_that_differ(folder: Path, change):
    """Padded by NaN."""
    outcome = yield lambda: measured(Changing(change), LINE, batch_size=5, num_draws=3)
    w = outcome.value.draws["w"]
    last = len(LINE) // 5 * 5
    blank = {"absent": w[:, :last], "first": w[:, last:], "size": w[:, :last, 2:] if w.dim() > 2 else w[:0]}[change]
    assert w.shape[:2] == (3, len(LINE))
    assert int(blank.isnan().sum()) == int(w.isnan().sum()) == blank.numel() > 0


class Elsewhere(Gauss):
    """Has a latent in a plate more, in the last batch."""

    def model(self, x):
        self.guide(x, more=True)

    def guide(self, x, more=False):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if more:
                pyro.sample("x", dist.Normal(z.unsqueeze(-1) + self.shift, 1.0).to_event(1), obs=x)
            with pyro.plate("more", 2, dim=-2) if len(x) < 5 else nullcontext():
                pyro.sample("w", dist.Normal(0.0, 1.0))


@fault("A2", "num_draws", 2, '"w" come and go, or change plates or shapes')
def draws_in_other_plates(folder: Path):
    yield lambda: measured(Elsewhere(), LINE, batch_size=5, num_draws=3)


@fault("A2", "num_draws", 0, each=CHANGES)
def batches_that_differ_are_measured(folder: Path, change):
    outcome = yield lambda: measured(Changing(change), LINE, batch_size=5)
    same(outcome.value.log_prob, gauss(LINE))


class Joint(Gauss):
    """Has a latent that the data of the last batch share."""

    def model(self, x):
        if len(x) < 5:
            pyro.sample("w", dist.Normal(0.0, 1.0))
        super().model(x)

    def guide(self, x):
        if len(x) < 5:
            pyro.sample("w", dist.Normal(0.0, 1.0))
        super().guide(x)


@fault("A2", "log_likelihood", 2, "some batches have latents outside the data plate, and others have not")
def a_batch_shares_latents(folder: Path):
    yield lambda: measured(Joint(), LINE, batch_size=5)


# --- one type of numbers ---------------------------------------------------------------------------------------------

WHOLE = (torch.arange(36) * 5 % 7).reshape(18, 2)
BYTES = WHOLE.to(torch.uint8)
TYPES = {
    "bytes": BYTES, "booleans": WHOLE > 3, "integers": WHOLE, "short": WHOLE.short(), "half": WHOLE.half(),
    "single": WHOLE.float(), "double": WHOLE.double(), "bytes array": BYTES.numpy(), "array": WHOLE.double().numpy(),
    "integers array": WHOLE.int().numpy(), "booleans array": (WHOLE > 3).numpy(), "list": WHOLE.tolist(),
    "loader": DataLoader(TensorDataset(BYTES), 5), "set": TensorDataset(WHOLE.double()),
}  # fmt: skip
EACH_TYPE = {f"{name}-{kind}": (name, kind) for name in TYPES for kind in ("float32", "float64")}


def values_of(name):
    return (WHOLE > 3).double() if "booleans" in name else WHOLE.double()


@fault("D", "types", 0, each=EACH_TYPE)
def data_of_any_type_are_measured(folder: Path, each):
    name, kind = each
    outcome = yield lambda: measured(Gauss(getattr(torch, kind)), TYPES[name])
    assert outcome.value.dtype == kind
    same(outcome.value.log_prob, gauss(values_of(name)), 1e-10 if kind == "float64" else 1e-4)


@fault("D", "types", 0, each={name: name for name in TYPES})
def data_of_any_type_are_trained_on(folder: Path, name):
    options = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0), "validation": TYPES[name]}
    outcome = yield lambda: fitted(Gauss(torch.float64), TYPES[name], **options)
    assert abs(outcome.value.history[0]["bound"] - gauss(values_of(name)).mean()) < 1e-9
    assert abs(outcome.value.history[0]["validation_bound"] - gauss(values_of(name)).mean()) < 1e-9


@fault("D", "types", 0, each={"ais": 0, "gap": 1, "units": 2})
def bytes_are_measured_in_every_way(folder: Path, which):
    pair, data = Gauss(), BYTES.numpy()
    options = {"num_chains": 2, "num_temperatures": 2, "leapfrog_steps": 1, "guide": pair.guide, "seed": 0}
    verbs = [
        lambda: -pv.ais_log_likelihood(pair.model, data, **options).nll,
        lambda: pv.posterior_gap(pair.model, pair.guide, data, num_particles=2, num_samples=2).log_p,
        lambda: pv.active_units(pair.guide, data)["z"].variances.item(),
    ]
    outcome = yield verbs[which]
    variance = (WHOLE.double().sum(-1) / 3).var()
    assert abs(outcome.value - [gauss(WHOLE).mean(), gauss(WHOLE).mean(), variance][which]) < 1e-4


class Tokens(Bits):
    """Words of a vocabulary of five, which the guide embeds: log p(x) is known."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 1)
        torch.nn.init.zeros_(self.embedding.weight)

    def likelihood(self, z, x):
        logits = torch.nn.functional.pad(self.logits, (0, 1)) + 0 * z[..., None, None]
        return dist.Categorical(logits=logits.expand(*logits.shape[:-2], x.shape[-1], 5)).to_event(1)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.embedding(x).sum((-1, -2)), 1.0))


WORDS = (torch.arange(60) * 7 % 5).reshape(20, 3)
WORDS_AS = {
    "tensor": WORDS, "bytes": WORDS.to(torch.uint8), "array": WORDS.numpy(), "list": WORDS.tolist(),
    "set": TensorDataset(WORDS), "loader": DataLoader(TensorDataset(WORDS), 6),
}  # fmt: skip


@fault("D", "types", 0, each=WORDS_AS)
def words_stay_integers(folder: Path, data):
    pair = Tokens()
    options = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
    outcome = yield lambda: (measured(pair, data), fitted(pair, data, **options))
    log_probs = torch.nn.functional.pad(LOGITS.double(), (0, 1)).log_softmax(-1)
    same(outcome.value[0].log_prob, log_probs[WORDS].sum(-1))
    assert abs(outcome.value[1].history[0]["bound"] - log_probs[WORDS].sum(-1).mean()) < 1e-5


# --- missing values, labels, counts ----------------------------------------------------------------------------------


class Missing(Gauss):
    """Of what is missing nothing is known, and nothing is asked: log p of the rest."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc, seen = z.unsqueeze(-1) + self.shift, ~x.isnan()
            if self.kind == "NanMaskedNormal":
                pyro.sample("x", dist.NanMaskedNormal(loc, 1.0).to_event(1), obs=x)
            elif self.kind == "NanMaskedMultivariateNormal":
                pyro.sample("x", dist.NanMaskedMultivariateNormal(loc, torch.eye(2)), obs=x)
            elif self.kind == "mask":
                pyro.sample("x", dist.Normal(loc, 1.0).mask(seen).to_event(1), obs=x)
            else:
                with pyro.poutine.mask(mask=seen.all(-1)):
                    pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            seen = x.isfinite() if self.kind != "masked rows" else x.isfinite().all(-1, keepdim=True).expand_as(x)
            precision = 1 + seen.sum(-1)
            loc = x.nan_to_num().mul(seen).sum(-1) / precision + self.shift.sum()
            pyro.sample("z", dist.Normal(loc, precision**-0.5))


HOLES = LINE.clone()
HOLES[1, 0] = HOLES[7, 1] = HOLES[16, 0] = HOLES[16, 1] = math.nan
KINDS = {k: k for k in ("NanMaskedNormal", "NanMaskedMultivariateNormal", "mask", "masked rows")}


def rest(kind):
    found = gauss(HOLES.nan_to_num())
    single = torch.distributions.Normal(0.0, 2**0.5)
    rows = kind == "masked rows"
    found[1] = 0 if rows else single.log_prob(HOLES[1, 1])
    found[7] = 0 if rows else single.log_prob(HOLES[7, 0])
    found[16] = 0
    return found


@fault("D", "missing", 0, each=KINDS)
def missing_values_are_measured(folder: Path, kind):
    outcome = yield lambda: measured(Missing(kind), HOLES, batch_size=6)
    same(outcome.value.log_prob, rest(kind))


@fault("D", "missing", 0, each={f"{k}-{s}": (k, s) for k in KINDS for s in ("tensor", "loader")})
def missing_values_are_trained_on(folder: Path, each):
    kind, source = each
    options = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0), "batch_size": 6}
    outcome = yield lambda: fitted(Missing(kind), SOURCES[source](HOLES), **options)
    assert abs(outcome.value.history[0]["bound"] - rest(kind).mean()) < 1e-5


@fault("D", "missing", 3, r'^data\[7, 1\] = inf at site "x": data must be finite', each=KINDS)
def infinity_is_not_missing(folder: Path, kind):
    data = HOLES.clone()
    data[7, 1] = math.inf
    yield lambda: measured(Missing(kind), data)


class Counts(Bits):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def likelihood(self, z, x):
        return self.make(self.logits + 0 * z.unsqueeze(-1))


def labels(logits):
    return dist.Categorical(logits=logits)


def one_hot(logits):
    return dist.OneHotCategorical(logits=logits)


def trials(logits):
    return dist.Multinomial(3, logits=logits)


def counts(logits):
    return dist.Poisson(logits.exp()).to_event(1)


def gammas(logits):
    return dist.Gamma(logits.exp(), 1.0).to_event(1)


def betas(logits):
    return dist.Beta(logits.exp(), 2.0).to_event(1)


SHARES = [[0.25, 0.25, 0.25, 0.25], [0.3333, 0.3333, 0.2222, 0.1111]]
FAMILIES = {
    "a label too many": (labels, [0, 3, 4], r"data\[2\] = 4.* .*integers up to 3; count from 0"),
    "labels from -1": (labels, [0, -1, 2], r"data\[1\] = -1(\.0)? is outside"),
    "half a label": (labels, [0.0, 1.5], r"data\[1\] = 1.5 .*counts in integers"),
    "one-hot": (labels, torch.eye(4), r"one label per draw, .*argmax\(-1\).*OneHotCategorical"),
    "two-hot": (one_hot, torch.eye(4) * 2, r"data\[0\] = \[2.0, .*outside"),
    "trials": (trials, [[1, 1, 1, 0], [2, 1, 1, 0]], "sum to as much as 4.*total_count=3"),
    "one trial": (lambda a: dist.Multinomial(logits=a), [[1, 1, 1, 0]], "sum to as much as 3.*total_count=1"),
    "half a trial": (trials, [[1, 0.5, 1, 0]], r"data\[0\] = .*counts in integers"),
    "half a count": (counts, [[1, 0.5, 1, 0]], r"data\[0, 1\] = 0.5 .*in integers"),
    "a negative count": (counts, [[1, -2, 1, 0]], r"data\[0, 1\] = -2.0 is outside"),
    "more than all": (lambda a: dist.Binomial(3, logits=a).to_event(1), [[1, 4, 1, 0]], r"data\[0, 1\] = 4.0 is out"),
    "zero": (lambda a: dist.LogNormal(a, 1.0).to_event(1), [[1.0, 0.0, 1.0, 1.0]], r"data\[0, 1\] = 0.0 is outside"),
    "no simplex": (lambda a: dist.Dirichlet(a.exp()), [[0.5, 0.2, 0.2, 0.2]], r"data\[0\] = \[0.5, .*its sum is 1.1 "),
    "rounded shares": (lambda a: dist.Dirichlet(a.exp()), SHARES, r"data\[1\] = .*its sum is 0.9999.*x / x.sum"),
    "no share": (lambda a: dist.Dirichlet(a.exp()), [[0.5, 0.0, 0.25, 0.25]], r"data\[0\] = .*\(shares above 0\): it"),
    "less than none": (lambda a: dist.Dirichlet(a.exp()), [[0.5, -0.5, 0.5, 0.5]], r"data\[0\] = .*holds -0.5, but"),
    "gamma's end": (gammas, [[1.0, 2.0, 0.0, 1.0]], r"data\[0, 2\] = 0.0 .*density is 0 or infinite.*clamp"),
    "beta's end": (betas, [[0.2, 0.5, 0.5, 1.0]], r"data\[0, 3\] = 1.0 .*\(above 0 and below 1\).*clamp"),
}
LIKELIHOODS = {f"{verb}-{name}": (verb, name) for name in FAMILIES for verb in ("log_likelihood", "fit")}


@fault("C", "labels and counts", 3, each=LIKELIHOODS)
def data_are_not_of_the_likelihood(folder: Path, each):
    verb, name = each
    make, data, says = FAMILIES[name]
    data = data if isinstance(data, torch.Tensor) else torch.tensor(data)
    outcome = yield lambda: (measured if verb == "log_likelihood" else fitted)(Counts(make), data)
    assert re.search(says, outcome.message), outcome.message


@fault("C", "labels and counts", 0)
def documents_of_any_length_are_measured(folder: Path):
    """Trials below total_count are those of the datum, as Pyro counts them."""
    data = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0]])
    outcome = yield lambda: measured(Counts(lambda a: dist.Multinomial(3, logits=a)), data)
    log_p = LOGITS.double().log_softmax(-1)
    exact = torch.stack([math.log(6) + log_p[:3].sum(), math.log(2) + log_p[0] + log_p[3]])
    same(outcome.value.log_prob, exact)


@fault("C", "labels and counts", 0)
def what_ends_at_its_density_s_ends_is_measured(folder: Path):
    """With concentrations of 1 the density is finite there."""
    data = torch.tensor([[0.0, 1.0, 0.5, 0.25]])
    outcome = yield lambda: measured(Counts(lambda a: dist.Beta(0 * a + 1, 1.0).to_event(1)), data)
    same(outcome.value.log_prob, torch.zeros(1))


# --- no message shows a tensor ---------------------------------------------------------------------------------------


class Broken(Bits):
    """A parameter that is no number, among many."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(200, 4))
        self.table.data[3, 2] = math.nan

    def likelihood(self, z, x):
        return dist.Normal(self.table[: len(x)] + 0 * z.unsqueeze(-1), 1.0).to_event(1)


BROKEN = {
    "log_likelihood": lambda pair, x: measured(pair, x),
    "log_weights": lambda pair, x: pv.log_weights(pair.model, pair.guide, x),
    "ais": lambda pair, x: pv.ais_log_likelihood(pair.model, x),
    "fit": lambda pair, x: fitted(pair, x),
    "fit by Pyro": lambda pair, x: fitted(pair, x, objective=pyro.infer.Trace_ELBO()),
}


@fault("C", "message", 5, r'^parameter "table" is nan: [^\n]*$', each=BROKEN)
def a_parameter_is_no_number(folder: Path, verb):
    yield lambda: verb(Broken(), torch.zeros(200, 4))


@fault("C", "message", 2, r"^Expected parameter loc .*Real\(\), but loc\[3, 2\] = nan$")
def a_parameter_is_no_number_when_drawn_from(folder: Path):
    yield lambda: pv.sample(Broken().model, 200, like=torch.zeros(200, 4))


@fault("C", "message", 2, r'^site "x": Expected value .*Boolean.*, but value\[150, 2\] = 0.25$')
def an_objective_of_pyros_is_asked_itself(folder: Path):
    """What Pyro says is shortened wherever this package runs its programs."""
    pair, x = Bits(), wrong(0.25)

    def asked():
        from pyrovae.engine.brief import Brief

        with Brief():
            pyro.infer.Trace_ELBO().loss(pair.model, pair.guide, x)

    yield asked


@fault("D", "log_likelihood", each={
    "uint64": np.uint64, "longdouble": np.longdouble, "big-endian": np.dtype(">f4"), "half": np.float16,
})  # fmt: skip
def numpys_other_numbers(folder: Path, dtype):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)

    outcome = yield lambda: pv.log_likelihood(model, lambda x: None, np.ones((5, 2), dtype), num_samples=2)
    assert abs(outcome.value.nll - (math.log(2 * math.pi) + 1)) < 1e-6


@fault("D", "log_likelihood", 3, "numbers.*received|no masked values, has 4", each={
    "masked": np.ma.masked_array(np.ones((5, 4)), mask=np.eye(5, 4)), "text": np.array([["a", "b"]] * 5),
})  # fmt: skip
def arrays_that_are_no_numbers(folder: Path, x):
    yield lambda: pv.log_likelihood(lambda x: None, lambda x: None, x, num_samples=2)
