"""Pairs written with pyro.markov: a linear Gaussian state-space model against its joint normal, and an HMM."""

import itertools
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer

import pyrovae as pv

pytestmark = pytest.mark.double(3)

T, DECAY, MOVE, NOISE = 4, 0.8, 0.6, 0.5
X = torch.tensor([[0.3, -0.2, 0.8, 1.5], [-1.0, 0.1, 0.0, 0.4], [2.0, 1.0, 1.5, -0.5]], dtype=torch.float64)


def model(x):
    with pyro.plate("data", len(x)):
        z = x.new_zeros(())
        for t in pyro.markov(range(T)):
            z = pyro.sample(f"z_{t}", dist.Normal(DECAY * z, MOVE))
            pyro.sample(f"x_{t}", dist.Normal(z, NOISE), obs=x[:, t])


def joint():
    """The covariance of z and of x."""
    z = torch.zeros(T, T)
    for t in range(T):
        z[t, :t] = z[:t, t] = DECAY * z[t - 1, :t] if t else z[t, :t]
        z[t, t] = MOVE**2 + (DECAY**2 * z[t - 1, t - 1] if t else 0)
    return z, z + NOISE**2 * torch.eye(T)


def exact_log_prob(x):
    return dist.MultivariateNormal(torch.zeros(T), joint()[1]).log_prob(x)


def smoother(wider=1.0):
    """The posterior, z_t given z_{t-1} and all of x, as a markov guide; its spread times ``wider``."""
    z, x = joint()
    gain = z @ torch.linalg.inv(x)
    left = z - gain @ z

    def guide(data):
        mean = data @ gain.T
        with pyro.plate("data", len(data)):
            before = None
            for t in pyro.markov(range(T)):
                slope = left[t, t - 1] / left[t - 1, t - 1] if t else torch.tensor(0.0)
                spread = (left[t, t] - slope * left[t, t - 1]).sqrt() if t else left[0, 0].sqrt()
                shift = slope * (before - mean[:, t - 1]) if t else 0.0
                before = pyro.sample(f"z_{t}", dist.Normal(mean[:, t] + shift, wider * spread))

    return guide


def test_the_exact_markov_guide_gives_constant_weights():
    log_w = pv.log_weights(model, smoother(), X, num_particles=20)
    torch.testing.assert_close(log_w, exact_log_prob(X).expand(20, 3))


@pytest.mark.parametrize("compile", [False, True])
def test_the_likelihood_of_a_sequence(compile):
    found = pv.log_likelihood(model, smoother(1.2), X, num_samples=4000, seed=0, compile=compile)
    assert ((found.log_prob - exact_log_prob(X)).abs() < 5 * found.std_error).all()


def test_annealing_a_sequence():
    found = pv.ais_log_likelihood(model, X, num_chains=64, num_temperatures=100, leapfrog_steps=5, seed=0)
    assert ((found.log_prob - exact_log_prob(X)).abs() < 5 * found.std_error).all()


@pytest.mark.parametrize(
    "objective", [pv.ELBO(4), pv.IWAE(4), pv.IWAE(4, gradient="dreg"), pv.RWS(4), pv.TVO(4, partitions=3)], ids=repr
)
def test_objectives_at_the_posterior_are_tight(objective):
    """At the exact posterior every bound is log p(x), and the doubly reparameterised gradient of the guide is 0."""
    offset = torch.zeros(T, requires_grad=True)
    exact = smoother()

    def guide(x):
        exact(x + offset)

    loss = objective.differentiable_loss(model, guide, X)
    assert loss.item() == pytest.approx(-exact_log_prob(X).sum().item())
    (slope,) = torch.autograd.grad(loss, offset)
    assert (slope.abs().max() < 1e-10) == (objective.gradient == "dreg")


LENGTHS = torch.tensor([2, 4, 1])


def cut(x, lengths, observe=True):
    """The model of series that end, whose later steps a mask leaves out; without observations a guide."""
    with pyro.plate("data", len(x)):
        z = x.new_zeros(())
        for t in pyro.markov(range(x.shape[1])):
            with pyro.poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Normal(DECAY * z if observe else 0.7 * x[:, t], MOVE))
                if observe:
                    pyro.sample(f"x_{t}", dist.Normal(z, NOISE), obs=x[:, t])


def to_the_longest(rows):
    x, lengths = (torch.stack(column) for column in zip(*rows, strict=True))
    return x[:, : lengths.max()], lengths


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("per_batch", [False, True])
def test_posterior_draws_of_series_of_several_lengths(per_batch, compile, interpreted):
    """Padded by NaN, whether a mask leaves steps out or a batch has none of them; |z| < 5 for 7 means."""
    data = X, LENGTHS
    if per_batch:
        series = torch.utils.data.TensorDataset(*data)
        data = (torch.utils.data.DataLoader(series, batch_size=1, collate_fn=to_the_longest),)
    found = pv.log_likelihood(
        cut, partial(cut, observe=False), *data, num_samples=8000, num_draws=2000, seed=0, compile=compile
    )
    draws = torch.stack([found.draws[f"z_{t}"] for t in range(T)], -1)
    z, x = joint()
    for b, length in enumerate(LENGTHS.tolist()):
        inside = x[:length, :length]
        gain = z[:length, :length] @ torch.linalg.inv(inside)
        spread = (z[:length, :length] - gain @ z[:length, :length]).diagonal().sqrt()
        error = spread * (1 / 2000 + 1 / found.ess[b]) ** 0.5
        assert ((draws[:, b, :length].mean(0) - gain @ X[b, :length]).abs() < 5 * error).all()
        assert draws[:, b, length:].isnan().all()
        exact = dist.MultivariateNormal(torch.zeros(length), inside).log_prob(X[b, :length])
        assert (found.log_prob[b] - exact).abs() < 5 * found.std_error[b]


PROBS = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
BITS = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])


def hidden_markov(x):
    emit = pyro.param("emit", torch.tensor([0.2, 0.9]), constraint=dist.constraints.unit_interval)
    with pyro.plate("data", len(x)):
        state = torch.zeros(len(x), dtype=torch.long)
        for t in pyro.markov(range(3)):
            state = pyro.sample(f"s_{t}", dist.Categorical(PROBS[state]), infer={"enumerate": "parallel"})
            pyro.sample(f"x_{t}", dist.Bernoulli(emit[state]), obs=x[:, t])


def hidden_markov_guide(x):
    with pyro.plate("data", len(x)):
        for t in range(3):
            pyro.sample(f"s_{t}", dist.Categorical(logits=torch.zeros(len(x), 2)))


def summed_log_prob(x, emit=(0.2, 0.9)):
    emit, total = torch.tensor(emit), torch.zeros(len(x))
    for path in itertools.product(range(2), repeat=3):
        terms = [PROBS[a, b].log() for a, b in itertools.pairwise((0, *path))]
        total += (sum(terms) + dist.Bernoulli(emit[list(path)]).log_prob(x).sum(-1)).exp()
    return total.log()


def test_a_discrete_sequence_is_measured_by_draws():
    found = pv.log_likelihood(hidden_markov, hidden_markov_guide, BITS, num_samples=4000, seed=1)
    assert ((found.log_prob - summed_log_prob(BITS)).abs() < 5 * found.std_error).all()


def test_a_discrete_sequence_is_trained_by_pyros_enumeration():
    loss = infer.TraceEnum_ELBO(max_plate_nesting=1).loss(hidden_markov, lambda x: None, BITS)
    assert loss == pytest.approx(-summed_log_prob(BITS).sum().item())
    data = BITS.repeat(8, 1)
    fitted = pv.fit(
        hidden_markov, lambda x: None, data, objective=infer.TraceEnum_ELBO(max_plate_nesting=1), epochs=20, lr=0.1
    )
    assert fitted.history[-1]["bound"] > fitted.history[0]["bound"]


def test_our_objectives_refuse_the_enumerated_sequence_by_name():
    marked = infer.config_enumerate(hidden_markov_guide)
    with pytest.raises(ValueError, match='"s_0"'):
        pv.VIMCO(4).differentiable_loss(hidden_markov, marked, BITS)
