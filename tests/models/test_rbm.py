"""The RBM against brute force, its log Z by annealing against the exact one, its gradients, chains and errors.

Statistical tests have fixed seeds; their tolerances are 4 to 5 standard errors (false alarms below 1 in 10,000).
"""

import itertools
import math

import pytest
import torch
from torch.nn.functional import softplus

import pyrovae as pv
from pyrovae import runs
from pyrovae.compile.noise import rewritten
from pyrovae.data import DataError
from pyrovae.models import RBM, contrastive, partition
from pyrovae.models.contrastive import epoch_metrics
from pyrovae.models.partition import anneal, enumerate_states
from pyrovae.models.rbm import Marginal
from tests.state import refused

SHAPE, HIDDEN = (2, 3), 4


def states(number):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=number)), dtype=torch.float64)


V, H = states(6).view(-1, *SHAPE), states(HIDDEN)


def random_rbm(num_visible=SHAPE, num_hidden=HIDDEN, scale=1.0, seed=0, **options):
    rbm = RBM(num_visible, num_hidden, **options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in rbm.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return rbm


@pytest.fixture
def rbm():
    return random_rbm()


def joint(rbm):
    """p(v, h) of all states, ``[64, 16]``, by the definition."""
    v = V.flatten(1)
    energy = -(v @ rbm.visible_bias)[:, None] - (H @ rbm.hidden_bias)[None] - v @ rbm.weight @ H.T
    return (-energy).flatten().softmax(0).view(len(V), len(H)).detach()


def probabilities(rbm):
    return joint(rbm).sum(1)


def draws(rbm, number):
    """Exact draws of v."""
    return V[torch.multinomial(probabilities(rbm), number, replacement=True)]


def within(found, expected, error, times=5.0):
    assert ((found - expected).abs() <= times * error + 1e-12).all()


def same_frequencies(v, expected):
    code = (v.flatten(1) @ (2.0 ** torch.arange(5, -1, -1, dtype=torch.float64))).long()
    frequencies = torch.bincount(code, minlength=64) / len(v)
    within(frequencies, expected, (expected * (1 - expected) / len(v)).sqrt())


# --- the distribution ------------------------------------------------------------------------------------------------


def test_everything_is_the_brute_force_sum(rbm):
    p, v = joint(rbm), V.flatten(1)
    log_z = torch.logsumexp(
        ((v @ rbm.visible_bias)[:, None] + (H @ rbm.hidden_bias)[None] + v @ rbm.weight @ H.T).flatten(), 0
    )
    torch.testing.assert_close(rbm.log_partition(), log_z)
    torch.testing.assert_close(rbm.log_prob(V).exp(), p.sum(1))
    torch.testing.assert_close(rbm.log_prob(V).exp().sum(), torch.tensor(1.0).double())
    torch.testing.assert_close(rbm.free_energy(V), -(p.sum(1).log() + log_z))
    torch.testing.assert_close(rbm.hidden(V).mean, (p @ H) / p.sum(1, keepdim=True))
    torch.testing.assert_close(rbm.visible(H).mean.flatten(1), (p.T @ v) / p.sum(0).unsqueeze(1))
    torch.testing.assert_close(rbm.encode(V), rbm.hidden(V).mean)
    torch.testing.assert_close(rbm.decode(H), rbm.visible(H).mean)
    assert rbm.hidden(V).event_shape == (HIDDEN,)
    assert rbm.visible(H).event_shape == SHAPE
    assert rbm.log_prob(V.view(4, 16, *SHAPE)).shape == (4, 16)
    assert rbm.log_prob(V[0].bool()).shape == ()


def test_the_pair_observes_x_with_that_density(rbm):
    log_w = pv.log_weights(rbm.model, rbm.guide, V, num_particles=3)
    torch.testing.assert_close(log_w, rbm.log_prob(V).expand(3, 64))
    estimate = pv.log_likelihood(rbm.model, rbm.guide, V, num_samples=2)
    torch.testing.assert_close(estimate.log_prob, probabilities(rbm).log())
    assert not estimate.std_error.any()
    assert rbm.likelihood_is == "exact"
    assert RBM(21, 21).likelihood_is == "annealed"


# --- the partition function ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_visible", "num_hidden"), [(7, 3), (3, 7), (1, 1), (30, 5), (5, 30)])
def test_either_side_is_enumerated(num_visible, num_hidden, monkeypatch):
    rbm = random_rbm(num_visible, num_hidden)
    mirrored = enumerate_states(rbm.weight.T, rbm.hidden_bias, rbm.visible_bias)
    torch.testing.assert_close(rbm.log_partition(), mirrored)
    whole = torch.autograd.grad(rbm.log_partition(), list(rbm.parameters()))
    monkeypatch.setattr(partition, "CHUNK", 4 * max(num_visible, num_hidden))
    torch.testing.assert_close(rbm.log_partition(), mirrored)
    torch.testing.assert_close(torch.autograd.grad(rbm.log_partition(), list(rbm.parameters())), whole)


def test_exact_gradient_is_that_of_the_expectations(rbm):
    """d log p / d W = E[v h | data] - E[v h | model]."""
    x = V[[3, 17, 60]]
    rbm.log_prob(x).mean().backward()
    p = joint(rbm)
    model = torch.einsum("vh,vi,hj->ij", p, V.flatten(1), H)
    data = x.flatten(1).T @ rbm.encode(x) / 3
    torch.testing.assert_close(rbm.weight.grad, (data - model).detach())
    torch.testing.assert_close(rbm.hidden_bias.grad, (rbm.encode(x).mean(0) - p.sum(0) @ H).detach())


def test_annealing_finds_the_exact_log_z():
    rbm = random_rbm(50, 15, scale=0.4)
    exact = rbm.log_partition().detach()
    log_z, error = rbm.log_partition(method="ais", chains=200, steps=500, return_std_error=True)
    assert log_z.dtype == error.dtype == torch.float64
    assert log_z.shape == error.shape == ()
    assert 0 < error < 0.1
    within(log_z.detach(), exact, error, times=4)


def test_annealing_without_weights_is_exact_at_once():
    """Independent units: all weights are equal, and one step is enough."""
    rbm = random_rbm(40, 30)
    rbm.weight.data.zero_()
    rbm.base_visible.copy_(rbm.visible_bias)
    log_z, error = rbm.log_partition(method="ais", steps=1, return_std_error=True)
    expected = softplus(rbm.visible_bias).sum() + softplus(rbm.hidden_bias).sum()
    torch.testing.assert_close(log_z, expected)
    assert error < 1e-12


def test_the_stated_error_is_honest_and_z_unbiased():
    """Over 300 repetitions deviations have standard deviation 1 (its standard error: 0.04), and the mean Z is Z."""
    rbm = random_rbm(12, 6, scale=0.7)
    exact = rbm.log_partition().detach()
    parameters = rbm.weight, rbm.visible_bias, rbm.hidden_bias, rbm.base_visible, rbm.base_hidden
    found = [anneal(*parameters, chains=50, steps=5) for _ in range(300)]
    deviation = torch.stack([(f.log_z - exact) / f.std_error for f in found])
    assert 0.8 < deviation.std() < 1.25
    assert 0.9 < (deviation.abs() < 2).double().mean() < 0.99
    ratio = torch.stack([(f.log_z - exact).exp() for f in found])
    within(ratio.mean(), 1.0, ratio.std() / math.sqrt(300))
    assert 0.05 < ratio.std() < 0.5  # else the above would show nothing


def test_annealed_increments_keep_their_digits_in_single_precision():
    low = torch.tensor([-80.0, -9.0, -1e-3, 0.0, 1e-3, 9.0, 80.0])
    for rise in (1e-4, -1e-4, 0.3, -0.999, 1.0, -50.0, 100.0):
        expected = softplus(low.double() + rise) - softplus(low.double())
        found = partition.softplus_rise(low, torch.full_like(low, rise)).double()
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7 if abs(rise) < 1 else 1e-5)


def test_one_log_z_serves_until_a_parameter_changes(monkeypatch):
    rbm, calls = random_rbm(6, 4, ais_chains=10, ais_steps=3), []
    monkeypatch.setattr("pyrovae.models.partition.anneal", lambda *arguments: (calls.append(1), anneal(*arguments))[1])

    def asked(**options):
        return rbm.log_partition(method="ais", **options).item()

    first = asked()
    assert [asked(), asked(chains=10, steps=3)] == [first, first]
    assert len(calls) == 1
    assert asked(seed=1) != first
    assert asked(steps=4) != first
    assert asked() == first
    assert len(calls) == 3
    rbm.weight.data[0, 0] += 0.5  # which no version counter sees
    second = asked()
    assert second != first
    rbm.load_state_dict(random_rbm(6, 4, seed=2).state_dict())
    third = asked()
    assert third != second
    rbm.base_visible += 0.1
    fourth = asked()
    assert fourth != third
    rbm.base_hidden += 0.1
    assert asked() != fourth
    assert len(calls) == 7
    assert rbm.float().log_partition(method="ais").dtype == torch.float64
    assert len(calls) == 8
    with torch.no_grad():
        exact = rbm.log_partition()
        rbm.hidden_bias.data += 1
        assert rbm.log_partition() > exact


def test_estimates_leave_the_generator_alone_and_depend_on_the_seed_only():
    rbm, other = random_rbm(), random_rbm()
    state = torch.get_rng_state()
    one = rbm.log_partition(method="ais", steps=5)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    assert torch.equal(one, other.log_partition(method="ais", steps=5))


def test_an_estimated_log_z_serves_values_and_refuses_gradients():
    rbm = random_rbm(25, 22, scale=0.1, ais_steps=20)
    x = torch.rand(10, 25).round().double()
    expected = -rbm.free_energy(x) - rbm.log_partition()
    torch.testing.assert_close(rbm.log_prob(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(rbm.log_prob(x), expected.detach())
    torch.testing.assert_close(pv.log_likelihood(rbm.model, rbm.guide, x, num_samples=1).log_prob, expected.detach())
    refused(ValueError, "no gradient: train with rbm", rbm.log_prob(x).mean().backward)
    refused(ValueError, "no gradient: train with rbm", pv.fit, rbm.model, rbm.guide, x, objective=pv.ELBO(), epochs=1)


# --- chains ----------------------------------------------------------------------------------------------------------


def test_gibbs_leaves_the_distribution_invariant(rbm):
    p = joint(rbm)
    transition = (p / p.sum(1, keepdim=True)) @ (p / p.sum(0)).T  # of v to v, by way of h
    torch.testing.assert_close(p.sum(1) @ transition, p.sum(1))
    same_frequencies(rbm.gibbs(draws(rbm, 40_000), 3), p.sum(1))
    start = V[:1].expand(40_000, *SHAPE)
    same_frequencies(rbm.gibbs(start), transition[0])
    same_frequencies(rbm.gibbs(start, 3), torch.linalg.matrix_power(transition, 3)[0])
    assert not torch.allclose(transition[0], p.sum(1), atol=0.05)


def test_generation_draws_from_the_distribution():
    rbm = random_rbm(scale=0.7, burn_in=50)
    x = pv.sample(rbm, 40_000, returns="draws", seed=0)
    same_frequencies(x, probabilities(rbm))
    means = pv.sample(rbm, 40_000, seed=0)
    assert ((means > 0) & (means < 1)).all()
    within(means.mean(0), (probabilities(rbm) @ V.flatten(1)).view(SHAPE), 0.5 / 200)


def test_the_mean_is_that_of_the_chains_drawn():
    rbm = random_rbm(scale=3.0, burn_in=5)
    marginal = Marginal(rbm, torch.Size([1000]))
    x = marginal.sample()
    assert x.shape == marginal.mean.shape == (1000, *SHAPE)
    sure = (marginal.mean - 0.5).abs() > 0.49
    assert (x[sure] == marginal.mean[sure].round()).double().mean() > 0.95
    assert torch.equal(marginal.mean, marginal.mean)
    assert Marginal(rbm, torch.Size([])).sample((2, 5)).shape == (2, 5, *SHAPE)
    assert Marginal(rbm, torch.Size([])).mean.shape == SHAPE
    assert marginal.expand((3, 1000)).log_prob(x).shape == (3, 1000)


def gradient(rbm, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(rbm.parameters()))])


def test_contrastive_divergence_tends_to_the_exact_gradient():
    """Towards it with k from the data; at it, within the error of 20,000 chains, from equilibrium."""
    rbm = random_rbm(scale=2.0)
    x = V[torch.tensor([0, 7, 31, 63])].repeat(5000, 1, 1)
    exact = gradient(rbm, -rbm.log_prob(x).mean())
    noise = 0.5 * math.sqrt(len(exact) / len(x))  # of the distance: an entry's standard deviation is 1/2 at most

    def distance(start, steps):
        return (gradient(rbm, rbm.contrastive_divergence(x, start, steps)[0]) - exact).norm()

    biases = [distance(None, k) for k in (1, 3, 30)]
    assert biases[0] > 2 * biases[1] > 8 * noise
    assert biases[2] < 2 * noise
    assert distance(draws(rbm, len(x)), 1) < 2 * noise


def test_contrastive_divergence_returns_the_chains(rbm):
    loss, after = rbm.contrastive_divergence(V, V[:5], 2)
    assert after.shape == (5, *SHAPE)
    assert not after.requires_grad
    torch.testing.assert_close(loss, rbm.free_energy(V).mean() - rbm.free_energy(after).mean())


# --- training --------------------------------------------------------------------------------------------------------

STRIPES = torch.cat([states(3).repeat_interleave(3, 1), states(3).repeat(1, 3)]).view(-1, 3, 3).float()
TRAINING = STRIPES.repeat(20, 1, 1)


def trained(**options):
    torch.manual_seed(0)
    rbm = RBM((3, 3), 8).initialise(TRAINING)
    history = rbm.fit(TRAINING, **{"batch_size": 32, "lr": 0.1, "epochs": 100} | options)
    return rbm, history


def test_training_comes_near_maximum_likelihood():
    """Bars and stripes: 12 patterns of 9 bits once and 2 twice, whose entropy no model can beat."""
    entropy = (12 * 4 + 2 * 2 * 3) / 16 * math.log(2)
    best = RBM((3, 3), 8).initialise(TRAINING)
    pv.fit(best.model, best.guide, TRAINING, objective=pv.ELBO(), epochs=150, batch_size=320, lr=0.1)
    likely = {"maximum": best} | {
        "CD-1": trained()[0], "CD-10": trained(cd_steps=10)[0], "persistent": trained(persistent=True)[0],
    }  # fmt: skip
    found = {name: rbm.log_prob(STRIPES).mean().item() for name, rbm in likely.items()}
    before = RBM((3, 3), 8).initialise(TRAINING).log_prob(STRIPES).mean().item()
    assert before < -6.2
    assert found["maximum"] <= -entropy
    assert found["maximum"] > -3.2
    assert min(found["CD-1"], found["CD-10"], found["persistent"]) > before + 1
    assert max(found["CD-10"], found["persistent"]) <= found["maximum"] + 0.1


@pytest.mark.parametrize("persistent", [False, True])
def test_a_compiled_training_is_the_eager_one_on_the_same_noise(persistent, interpreted, monkeypatch):
    """The last batch of an epoch is of another size, and runs eagerly."""
    x, results = torch.rand(50, 6).round(), []
    for compile in (False, True):
        monkeypatch.setattr(contrastive, "worthwhile", lambda *_, compile=compile: compile)
        torch.manual_seed(3)
        machine = RBM(6, 4)
        with rewritten():
            machine.fit(x, epochs=3, batch_size=20, cd_steps=2, persistent=persistent)
        results.append(list(machine.parameters()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert len(interpreted) == 1


def test_history():
    _, history = trained(epochs=4, validation=STRIPES, schedule=lambda t: 1 - t)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert [row["learning_rate"] for row in history] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert all(row["seconds"] > 0 for row in history)
    assert history[-1]["pseudo_log_likelihood"] < 0
    assert history[-1]["reconstruction_error"] > 0
    assert abs(history[-1]["free_energy_gap"]) < 5
    assert "free_energy_gap" not in trained(epochs=1)[1][0]


def test_metrics_are_what_they_say(rbm):
    v = V[40:41].repeat(20_000, 1, 1)
    found = epoch_metrics(rbm, v, V[:7])
    code = [i for i in range(64) if (V[i] != V[40]).sum() == 1]
    log_p = rbm.log_prob(V)
    exact = torch.stack([log_p[40] - torch.logaddexp(log_p[40], log_p[i]) for i in code])
    within(torch.tensor(found["pseudo_log_likelihood"]), exact.sum(), 6 * exact.std() / math.sqrt(20_000))
    assert found["reconstruction_error"] == pytest.approx((rbm.reconstruct(V[40:41]) - V[40]).square().sum().item())
    gap = rbm.free_energy(V[:7]).mean() - rbm.free_energy(V[40])
    assert found["free_energy_gap"] == pytest.approx(gap.item())


def test_the_seed_decides_everything():
    state = torch.get_rng_state()
    one = trained(epochs=2, seed=3)[0].state_dict()
    torch.manual_seed(9)
    two, other = trained(epochs=2, seed=3)[0].state_dict(), trained(epochs=2, seed=4)[0].state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["weight"], other["weight"])
    torch.set_rng_state(state)
    rbm = RBM(9, 2)
    state = torch.get_rng_state()
    rbm.fit(TRAINING.flatten(1), epochs=1)
    assert torch.equal(state, torch.get_rng_state())


def test_persistent_chains_go_on_from_fit_to_fit(monkeypatch):
    rbm, _ = trained(epochs=1, persistent=True, chains=7)
    assert rbm.chains.shape == (7, 9)
    assert "chains" not in rbm.state_dict()
    starts, follow = [], rbm.contrastive_divergence
    monkeypatch.setattr(
        rbm, "contrastive_divergence", lambda v, start, steps: (starts.append(start), follow(v, start, steps))[1]
    )
    before = rbm.chains.clone()
    rbm.fit(TRAINING, epochs=1, batch_size=160, persistent=True, chains=7)
    assert torch.equal(starts[0].flatten(1), before)
    assert not torch.equal(starts[1], starts[0])
    rbm.fit(TRAINING, epochs=1, batch_size=160, persistent=True)
    assert starts[2].shape == (160, 3, 3)
    rbm.fit(TRAINING, epochs=1)
    assert starts[-1] is None


def test_momentum_and_decay_are_those_of_the_weights():
    """With no data to follow (zero gradient of the biases aside) decay alone shrinks the weights, and no bias."""
    rbm = RBM(4, 3)
    weight = rbm.weight.detach().clone()
    rbm.contrastive_divergence = lambda v, start, steps: (0.0 * sum(p.sum() for p in rbm.parameters()), v)
    rbm.hidden_bias.data += 1
    options = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.2, "schedule": "constant"}
    rbm.fit(torch.rand(10, 4).round(), epochs=1, batch_size=5, **options)
    first = (1 - 0.1 * 0.2) * weight
    second = first - 0.1 * (0.5 * 0.2 * weight + 0.2 * first)
    torch.testing.assert_close(rbm.weight.detach(), second)
    assert (rbm.hidden_bias == 1).all()


def test_dynamic_data_and_loaders():
    grey = pv.data.Images(torch.rand(50, 3, 3), torch.arange(50), binarization="dynamic")
    assert len(RBM((3, 3), 4).fit(grey, epochs=2)) == 2
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(STRIPES), batch_size=8)
    rbm = RBM((3, 3), 4)
    rbm.fit(loader, epochs=1)
    torch.testing.assert_close(rbm.base_visible, STRIPES.flatten(1).mean(0).logit())


def test_annealing_starts_where_units_are_on_as_often_as_on_data():
    rbm, _ = trained(epochs=5)
    mean = TRAINING.flatten(1).mean(0)
    torch.testing.assert_close(rbm.base_visible.sigmoid(), mean)
    torch.testing.assert_close(rbm.base_hidden.sigmoid(), rbm.encode(TRAINING).mean(0).detach())
    assert rbm.base_hidden.any()


def test_initialise_sets_the_visible_biases_and_where_annealing_starts():
    x = torch.cat([torch.zeros(30, 2), torch.ones(10, 2)]).index_fill(1, torch.tensor([1]), 1.0)
    rbm = RBM(2, 3)
    assert rbm.initialise(x) is rbm
    expected = torch.tensor([0.25, 0.999]).logit()
    torch.testing.assert_close(rbm.visible_bias.detach(), expected)
    torch.testing.assert_close(rbm.base_visible, expected)


# --- verbs and round trips -------------------------------------------------------------------------------------------


def test_verbs_that_binary_units_have_not(rbm):
    refused(ValueError, "RBM has no spherical path", rbm.interpolate, V[:5], V[20:25], path="spherical")
    refused(ValueError, "RBM has no traverse: its hidden units are 0 or 1", rbm.traverse, V[:1])


def test_where_annealing_starts_comes_back_from_a_run(tmp_path):
    rbm = random_rbm((1, 5, 5), 22, scale=0.1, ais_steps=10).float()
    rbm.base_visible += 0.3
    x = torch.rand(4, 1, 5, 5).round()
    run = runs.Run(tmp_path / "rbm")
    run.start({"model": runs.describe(rbm)})
    run.save("last", rbm.state_dict())
    assert torch.equal(pv.load(run.path).log_prob(x), rbm.log_prob(x))


# --- errors ----------------------------------------------------------------------------------------------------------


def test_grey_data_are_refused(rbm):
    grey = torch.full((4, *SHAPE), 0.5).double()
    message = r"= 0.5 is outside the support .*binarization='dynamic'"
    for use in (
        rbm.log_prob,
        rbm.free_energy,
        rbm.fit,
        lambda x: pv.fit(rbm.model, rbm.guide, x, objective=pv.ELBO(), epochs=1),
    ):
        refused(DataError, message, use, grey)
    refused(DataError, message, pv.log_likelihood, rbm.model, rbm.guide, grey, num_samples=1)


def test_data_of_another_shape(rbm):
    for use in (rbm.log_prob, rbm.fit):
        refused(DataError, r"\(2, 3\).*got \(4, 6\): reshape", use, torch.zeros(4, 6).double())


def test_other_errors(rbm):
    with pytest.raises(ValueError, match=r"at most 20 units on one side, got 21 and 22: pass method=\"ais\""):
        RBM(21, 22).log_partition(method="exact")
    refused(ValueError, "did you mean 'exact'", rbm.log_partition, method="exakt")
    refused(ValueError, "steps must be", rbm.gibbs, V, 0)
    with pytest.raises(ValueError, match="chains=10 are those of persistent=True"):
        RBM(9, 3).fit(TRAINING.flatten(1), epochs=1, chains=10)
    refused(FloatingPointError, "lower lr", RBM(9, 3).fit, TRAINING.flatten(1), epochs=3, lr=1e38)
