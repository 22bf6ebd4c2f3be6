"""Dreams that several sites draw together: SleepPhi against exact losses and gradients."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyrovae as pv
from tests.laws.test_wake_sleep import check_sleep, entropy_and_distance

pytestmark = pytest.mark.seed(11)
A, B, S = 0.8, 0.5, 0.6  # x_t ~ N(A z + B x_{t-1}, S^2)


def exact_chain(m, r, length):
    """E log q of z ~ N(0, 1) by N(m sum_t x_t, r^2), of one datum of this length."""
    reach = [(1 - B ** (length - t)) / (1 - B) for t in range(length)]  # of a step's noise, in the sum
    slope = A * sum(reach)
    return entropy_and_distance(r, (1 - m * slope) ** 2 + m**2 * S**2 * sum(c**2 for c in reach))


@pytest.mark.parametrize("rows", ["all", "some by views", "some by an index", "some by a copy", "one after the other"])
def test_a_sequence_is_dreamt_as_it_is_drawn(rows, agree):
    """Steps read the steps before them, of what was dreamt; beyond a length, and in rows left out, x stays."""
    m, r = (torch.tensor(v, requires_grad=True) for v in (0.3, 0.7))
    lengths = torch.tensor([3, 1, 2, 3])
    left_out = rows not in ("all", "one after the other")

    def plate():
        return pyro.plate("data", 4, subsample_size=2 if left_out else None, subsample=None)

    def of(x, index):
        return {"some by views": x[index], "some by a copy": x[index].clone()}.get(rows, x)

    def chain(x):
        with plate() as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(len(index)), 1.0))
            own, at = of(x, index), index if rows == "some by an index" else slice(None)
            before = torch.zeros(len(index))
            for t in range(3):
                with poutine.mask(mask=t < lengths[index]):
                    pyro.sample(f"x_{t}", dist.Normal(A * z + B * before, S), obs=own[at, t])
                before = own[at, t]

    def apart(x):
        for i in range(4):
            z, before = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0)), 0.0
            for t in range(int(lengths[i])):
                pyro.sample(f"x_{i}_{t}", dist.Normal(A * z + B * before, S), obs=x[i, t])
                before = x[i, t]

    def of_sums(x):
        seen = torch.arange(3) < lengths[:, None]
        assert (x[~seen] == 100).all(), "what a mask leaves out was written to"
        loc = m * x.where(seen, 0).sum(1)
        if rows == "one after the other":
            for i in range(4):
                pyro.sample(f"z_{i}", dist.Normal(loc[i], r))
        else:
            with plate() as index:
                assert (x == 100).all(1).sum() in ((2, 4) if left_out else (0, 4))
                pyro.sample("z", dist.Normal(loc[index], r))

    exact = -sum(exact_chain(m, r, int(length)) for length in lengths)
    x = torch.full((4, 3), 100.0)
    model = apart if rows == "one after the other" else chain
    check_sleep(1, (model, of_sums, x), exact, {"m": m, "r": r}, agree)
    assert (x == 100).all(), "the data were written to"


@pytest.mark.parametrize("how", ["arguments", "columns", "a dict", "reals of integers", "of one alone"])
def test_what_depends_on_latents_is_dreamt_in_whichever_argument_it_is(how, agree):
    """z ~ N(0, 1), x and y ~ N(z, 1); guide N(m x + c y, r^2); s does not depend on z and stays."""
    m, c, r = (torch.tensor(v, requires_grad=True) for v in (0.3, 0.4, 0.8))
    number, kept = 6, torch.arange(6.0)

    def columns(*given):
        if how == "a dict":
            return given[0]["x"], given[0]["y"], given[0]["s"]
        return given[0].T if how == "columns" else given

    def model(*given):
        x, y, s = columns(*given)
        with pyro.plate("data", number):
            pyro.sample("s", dist.Normal(torch.zeros(number), 1.0), obs=s)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y.double().float() if how == "reals of integers" else y)
            if how != "of one alone":
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(*given):
        x, y, s = columns(*given)
        assert how == "columns" or torch.equal(s, kept)
        with pyro.plate("data", number):
            pyro.sample("z", dist.Normal(c * y + (0 if how == "of one alone" else m * x), r))

    far = torch.full((number,), 100.0)
    given = {"columns": (torch.stack([far, far, kept], 1),), "a dict": ({"x": far, "y": far.clone(), "s": kept},)}
    both = (1 - m - c) ** 2 + m**2 + c**2
    exact = -number * entropy_and_distance(r, (1 - c) ** 2 + c**2 if how == "of one alone" else both)
    check_sleep(2, (model, guide, *given.get(how, (far, far.clone(), kept))), exact, {"m": m, "c": c, "r": r}, agree)


def test_series_that_come_longer_later_are_dreamt_whole():
    def model(unused, y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for t in range(len(y)):
            pyro.sample(f"y_{t}", dist.Normal(z, 1.0), obs=y[t])

    def guide(unused, y):
        given.append(y)
        pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(())) * y.mean(), 1.0))

    given, objective = [], pv.SleepPhi()
    for length in (2, 5, 3):
        assert math.isfinite(objective.loss(model, guide, torch.zeros(1), torch.full((length,), 100.0)))
        assert (given[-1] < 90).all()
