"""Every datum against its site: what is outside is refused, what is masked, missing or of another batch is not."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints as c

import pyrovae as pv
from pyrovae.engine.convert import Taken, first_way
from pyrovae.engine.observed import Observed, check_observed
from pyrovae.engine.probe import look
from pyrovae.engine.programs import nothing
from pyrovae.engine.sites import log_prob, record
from pyrovae.engine.support import all_inside, inside
from pyrovae.errors import DataError

X = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(12, 2)
OUT = 7, 1  # row and column of what lies outside


def program(fn, value=lambda x: x):
    """Observes ``value(x)`` at ``fn(x)``."""

    def model(x, *more):
        with pyro.plate("data", len(x)):
            pyro.sample("x", fn(x).to_event(1), obs=value(x))

    return model


def changed(x, number):
    x = x.clone()
    x[OUT] = number
    return x


def normal(x):
    return dist.Normal(torch.zeros_like(x), 1.0)


def bits(x):
    return dist.Bernoulli(torch.full_like(x, 0.5))


BITS = (X > 0).double()
BAD = {  # what is observed, of which data, and how a program sees them
    "nan": (normal, changed(X, math.nan)),
    "inf": (normal, changed(X, math.inf)),
    "grey": (bits, changed(BITS, 0.5)),
    "two": (bits, changed(BITS, 2.0)),
    "negative": (lambda x: dist.Exponential(torch.ones_like(x)), changed(X.abs(), -1.0)),
    "fraction": (lambda x: dist.Poisson(torch.ones_like(x)), changed(BITS, 1.5)),
    "above a bound of its own": (
        lambda x: dist.Uniform(-torch.ones_like(x), 1 + x.abs().detach()),
        changed(X.clamp(-1, 2), -1.5),
    ),
    "above": (lambda x: dist.Binomial(2, torch.full_like(x, 0.5)), changed(BITS, 3.0)),
}
WAYS = {
    "as it is": lambda x: x,
    "a view": lambda x: x.view(-1).view(len(x), 2),
    "computed": lambda x: x + 0,
    "columns of more": lambda x: x[:, :2],
}


def looked(model, x):
    look(model, nothing, (x,))


def watched(model, x):
    """All but the first batch is checked as it comes, whatever its size."""
    check = Observed(model, nothing, record(model, (x[:5],), {}), (x[:5],))
    check((x[5:7],), 5)
    check((x[7:],), 7)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("late", [False, True])
def test_what_is_outside_is_found(kind, way, late):
    fn, bad = BAD[kind]
    if way == "columns of more":
        bad = torch.cat([bad, torch.full((len(bad), 1), math.pi)], 1)
    model = program(lambda x: fn(WAYS[way](x)), WAYS[way])
    with pyro.validation_enabled(False), pytest.raises(DataError, match=r"^data\[7, 1\] = \S+ (is outside|at site)"):
        (watched if late else looked)(model, bad)


def test_bounds_that_depend_on_latents_say_nothing_of_data():
    def model(x):
        with pyro.plate("data", len(x)):
            width = pyro.sample("width", dist.Exponential(1.0))
            pyro.sample("x", dist.Uniform(-width, width), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("width", dist.Exponential(1.0))

    with pyro.validation_enabled(False):
        look(model, guide, (X[:, 0],)).check_data()
        check_observed(record(model, (X[:3, 0] * 0,), {}))


@pytest.mark.parametrize("how", ["around", "inside", "none"])
def test_a_mask_hides_what_is_missing_from_values_and_gradients(how):
    loc, x = torch.full((2,), 0.5, requires_grad=True), changed(X, math.nan)
    seen = ~x.isnan()

    def model(x):
        with pyro.plate("data", len(x)):
            if how == "inside":
                pyro.sample("x", dist.Normal(loc, 1.0).expand(x.shape).mask(seen).to_event(1), obs=x)
            else:
                with pyro.poutine.mask(mask=seen.all(-1) | (how == "none")):
                    pyro.sample("x", dist.Normal(loc, 1.0).expand(x.shape).to_event(1), obs=x)

    if how == "none":
        with pytest.raises(DataError, match="finite"):
            look(model, nothing, (x,))
        return
    found = look(model, nothing, (x,)).model["x"]
    each = torch.distributions.Normal(0.5, 1.0).log_prob(X) * (seen if how == "inside" else seen.all(-1, keepdim=True))
    with pyro.validation_enabled(False):
        site = record(model, (x,), {})["x"]
        torch.testing.assert_close(log_prob(site), each.sum(-1))
        (slope,) = torch.autograd.grad(log_prob(site).sum(), loc)
    own = ((X - 0.5) * (seen if how == "inside" else seen.all(-1, keepdim=True))).sum(0)
    torch.testing.assert_close(slope, own)
    torch.testing.assert_close(log_prob(found), each.sum(-1))


def test_missing_values_need_no_run_and_infinite_ones_are_not_missing():
    model = program(lambda x: dist.NanMaskedNormal(torch.zeros_like(x), 1.0))
    check = Observed(model, nothing, record(model, (X,), {}), (X,))
    assert check.fine((changed(X, math.nan),))
    assert not check.fine((changed(X, math.inf),))
    with pytest.raises(DataError, match=r"data\[7, 1\] = inf"):
        check((changed(X, math.inf),))
    plain = Observed(program(normal), nothing, record(program(normal), (X,), {}), (X,))
    assert not plain.fine((changed(X, math.nan),))


def test_bounds_of_another_batch_are_its_own():
    model = program(lambda x: dist.Uniform(torch.full_like(x, -1.0), float(x.max()) + 1))
    narrow, wide = X[:3] * 0, X[:3] * 0 + 9
    Observed(model, nothing, record(model, (narrow,), {}), (narrow,))((wide,))


def test_later_batches_are_measured_as_they_are_checked():
    guide = nothing
    with pytest.raises(DataError, match=r"data\[7, 1\] = 0.5"):
        pv.log_likelihood(program(bits), guide, changed(BITS, 0.5), num_samples=1, batch_size=5)
    found = pv.log_likelihood(program(bits), guide, BITS.to(torch.uint8), num_samples=1, batch_size=5)
    torch.testing.assert_close(found.log_prob, torch.full((12,), -2 * math.log(2), dtype=torch.float64))


def test_integers_become_reals_where_a_program_takes_those():
    whole = torch.tensor([[1, 2], [3, 4]])
    single, double, table = torch.nn.Linear(2, 1).float(), torch.nn.Linear(2, 1).double(), torch.nn.Embedding(5, 2)
    for module, expected in ((single, torch.float32), (double, torch.float64), (table, torch.int64)):
        taken, given = first_way((whole.to(torch.uint8),), lambda batch, run=module: (run(*batch), batch)[1], module)
        assert given[0].dtype == expected
        assert taken((whole,))[0].dtype == expected
    labels, more = whole[:, 0], torch.ones(2, dtype=torch.float64)
    given = Taken(torch.float32, torch.float32)((whole, labels, more))
    assert [a.dtype for a in given] == [torch.float32, torch.int64, torch.float32]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        first_way((whole[:, :1],), lambda batch: single(*batch), single)


NEAR = [0.5, 1 - 2**-24, 1 + 2**-23, 1e-45, -0.0, -1e-45, 2.0, -1.0, 255.0, 3e38, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("support", [c.boolean, c.integer_interval(0, 2), c.unit_interval, c.real, None])
def test_what_is_judged_quickly_is_judged_alike(support, dtype):
    for value in NEAR if dtype.is_floating_point else (0, 1, 2, 5):
        x = torch.tensor([0, 1, 1, 0, 1]).to(dtype).repeat(40)
        x[77] = value
        assert bool(all_inside(x, support)) == bool(inside(x, support).all()), value


def test_what_is_not_observed_does_not_count():
    model, batch = program(lambda x: normal(x[:, 1:]), lambda x: x[:, 1:]), (X,)
    observed = Observed(model, nothing, record(model, batch, {}), batch)
    for column, expected in ((0, True), (1, False)):
        other = X[:5].clone()
        other[3, column] = math.nan
        assert observed.fine((other,)).item() is expected


def test_a_multinomial_that_nobody_gave_a_total_takes_rows_of_any():
    counts = torch.tensor([[4.0, 0.0, 3.0], [0.0, 1.0, 1.0]])

    def model(x, validate=False):
        logits = pyro.param("logits", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Multinomial(logits=logits, validate_args=validate), obs=x)

    found = pv.log_likelihood(model, nothing, counts, num_samples=1).log_prob
    exact = [torch.distributions.Multinomial(int(row.sum()), logits=torch.zeros(3)).log_prob(row) for row in counts]
    torch.testing.assert_close(found, torch.stack(exact).double())
    for bad in ([[4.0, 0.5, 3.0]], [[4.0, -1.0, 3.0]]):
        with pytest.raises(DataError, match="outside the support"):
            pv.log_likelihood(model, nothing, torch.tensor(bad), num_samples=1)
    with pytest.raises(DataError, match="total_count=1"):
        pv.log_likelihood(model, nothing, counts, True, num_samples=1)


class Inner(dist.TorchDistribution):
    """Validates what it computes from a value."""

    arg_constraints, support = {}, c.real

    def log_prob(self, value):
        return dist.Normal(value, 1.0).log_prob(torch.zeros(())).expand(self.batch_shape)

    def expand(self, shape, _instance=None):
        return Inner(shape)


def test_a_density_that_validates_inside_is_measured():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", Inner((len(x),)), obs=x)

    x = X[:, 0].contiguous()
    found = pv.log_likelihood(model, nothing, x, num_samples=1).log_prob
    torch.testing.assert_close(found, dist.Normal(0.0, 1.0).log_prob(x))
