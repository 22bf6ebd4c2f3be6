"""The semi-supervised VAE: the sum over classes against explicit sums, closed forms and Pyro's own enumeration."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch.nn.functional import cross_entropy, log_softmax

import pyrovae as pv
from pyrovae.engine.stacked import Stacked
from pyrovae.engine.unwrap import unvalidated
from pyrovae.errors import DataError
from pyrovae.models import SemiSupervisedVAE
from pyrovae.parts import PartialLabel, SoftOneHot, Weighted, hide_labels
from tests.state import refused
from tests.zoo import ZOO

pytestmark = pytest.mark.double(5)

X = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).round()
LABELS = {
    "none": None,
    "all unknown": torch.full((6,), -1),
    "mixed": torch.tensor([0, -1, 2, -1, 1, -1]),
    "all": torch.tensor([0, 1, 2, 2, 1, 0]),
}
PROBS = (0.2, 0.3, 0.5)
VARIANTS = [variant for variant in ZOO if variant.family == "semi_supervised"]


def small(**variant):
    return SemiSupervisedVAE(
        **{"input_shape": (1, 4, 4), "num_classes": 3, "latent_dim": 2, "hidden": (8,), "classification_weight": 0.7}
        | variant
    )


def log_joint_weight(m, x, label, z):
    """log p(x, y) / q(z | x, y) of one class, from the model's parts."""
    code = torch.eye(3)[torch.full((len(x),), label)]
    log_p = m.likelihood(z, code).log_prob(x) + m.prior(code).log_prob(z) + m.class_logits[label]
    return log_p - m.posterior(x, code).log_prob(z)


def by_hand(m, x, y, z):
    """The bound of each datum, z ``[C, B, D]``: what the paper writes, as loops over data and classes."""
    log_q = log_softmax(m.classifier(x), -1)
    inside = torch.stack([log_joint_weight(m, x, label, z[label]) for label in range(3)], -1)
    bounds = []
    for b in range(len(x)):
        label = -1 if y is None else int(y[b])
        if label >= 0:
            bounds.append(inside[b, label] + m.classification_weight * log_q[b, label])
        else:
            bounds.append(sum(log_q[b, c].exp() * (inside[b, c] - log_q[b, c]) for c in range(3)))
    return torch.stack(bounds)


def same_noise(m, x):
    """What the guide draws for every class, from the generator as it is now."""
    state = torch.get_rng_state()
    with torch.random.fork_rng():
        torch.set_rng_state(state)
        return poutine.trace(m.guide).get_trace(x).nodes["z"]["value"]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("which", LABELS)
def test_the_enumerated_loss_and_its_gradient_are_the_sum_over_labels(variant, which):
    m, y = small(**variant.options | {"input_shape": (1, 4, 4)}), LABELS[which]
    z = same_noise(m, X)
    assert z.shape == (3, 6, 2)
    expected = -by_hand(m, X, y, z).sum()
    wanted = torch.autograd.grad(expected, list(m.parameters()))
    args = (X,) if y is None else (X, y)
    for objective in (pv.ELBO(), Trace_ELBO()):
        state = torch.get_rng_state()
        loss = objective.differentiable_loss(m.model, m.guide, *args)
        torch.set_rng_state(state)
        got = torch.autograd.grad(loss, list(m.parameters()))
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


def test_the_gradient_of_the_classification_term_is_that_of_the_cross_entropy():
    m, y = small(classification_weight=0.0), LABELS["mixed"]
    alpha, known = 2.5, y >= 0
    losses = {}
    for weight in (0.0, alpha):
        m.classification_weight = weight
        pyro.set_rng_seed(1)
        losses[weight] = pv.ELBO().differentiable_loss(m.model, m.guide, X, y)
    term = losses[alpha] - losses[0.0]
    expected = alpha * cross_entropy(m.classifier(X)[known], y[known], reduction="sum")
    torch.testing.assert_close(term, expected)
    weights = list(m.classifier.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(term, weights, retain_graph=True), torch.autograd.grad(expected, weights)
    )
    others = [p for n, p in m.named_parameters() if not n.startswith("classifier")]
    left = torch.autograd.grad(term, others, allow_unused=True)
    assert all(g is None or g.abs().max() < 1e-12 for g in left)


def test_an_unlabelled_datum_and_a_labelled_one_do_not_meet():
    m = small()
    z = same_noise(m, X)
    pyro.set_rng_seed(0)
    mixed = by_hand(m, X, LABELS["mixed"], z)
    known = LABELS["mixed"] >= 0
    assert torch.equal(mixed[known], by_hand(m, X, LABELS["all"], z)[known])
    assert torch.equal(mixed[~known], by_hand(m, X, None, z)[~known])


# --- a pair without statistical error --------------------------------------------------------------------------------


def closed_form(**variant):
    """A pair whose z says nothing, so that log p(x | y) is known and every weight given y is exact."""
    m = small(**{"hidden": (), "class_probs": PROBS} | variant)
    with torch.no_grad():
        for parameter in m.parameters():
            parameter.copy_(torch.randn_like(parameter))
        m.encoder.output.weight.zero_()
        m.encoder.output.bias.zero_()
        m.decoder.output.weight[:, :2] = 0
        m.classifier.output.weight.mul_(0.3)
    logits = m.decoder.output.weight.detach()[:, 2:].T + m.decoder.output_bias.detach()
    given_y = dist.Bernoulli(logits=logits).to_event(1).log_prob(X.flatten(1).unsqueeze(1))
    return m, given_y + torch.tensor(PROBS).log()


def kingma(m, log_joint):
    log_q = log_softmax(m.classifier(X), -1).detach()
    return (log_q.exp() * (log_joint - log_q)).sum(-1)


def test_the_bounds_in_closed_form():
    m, log_joint = closed_form()
    torch.testing.assert_close(-pv.ELBO().loss(m.model, m.guide, X), kingma(m, log_joint).sum().item())
    # More particles gain nothing here: the sum over classes is inside each weight, so this is no log p(x).
    torch.testing.assert_close(-pv.IWAE(7).loss(m.model, m.guide, X), kingma(m, log_joint).sum().item())
    log_q = log_softmax(m.classifier(X), -1).detach()
    labelled = (log_joint + 0.7 * log_q)[torch.arange(6), LABELS["all"]].sum()
    torch.testing.assert_close(-pv.ELBO().loss(m.model, m.guide, X, LABELS["all"]), labelled.item())
    assert (kingma(m, log_joint) < log_joint.logsumexp(-1)).all()


def test_the_weight_of_the_kl_leaves_likelihood_and_classification_alone():
    m, log_joint = closed_form()
    log_q = log_softmax(m.classifier(X), -1).detach()
    log_prior = torch.tensor(PROBS).log()
    unlabelled = (log_q.exp() * (log_joint - log_prior + 0.5 * (log_prior - log_q))).sum(-1)
    torch.testing.assert_close(-pv.ELBO(kl_weight=0.5).loss(m.model, m.guide, X), unlabelled.sum().item())
    rows, y = torch.arange(6), LABELS["all"]
    labelled = (log_joint - 0.5 * log_prior + 0.7 * log_q)[rows, y].sum()
    torch.testing.assert_close(-pv.ELBO(kl_weight=0.5).loss(m.model, m.guide, X, y), labelled.item())


def test_it_is_what_pyro_enumerates():
    """The programs of eval mode, y marked in the guide, under TraceEnum_ELBO and ours: the same on the same noise."""
    m, found = small(class_probs=PROBS), []
    marked = config_enumerate(m.guide, "parallel")
    for objective, guide in ((pv.ELBO(), m.guide), (pv.ELBO(), marked), (TraceEnum_ELBO(max_plate_nesting=1), marked)):
        m.train(guide is not marked)
        pyro.set_rng_seed(0)
        loss = objective.differentiable_loss(m.model, guide, X)
        found.append([loss, *torch.autograd.grad(loss, list(m.parameters()))])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12)


def test_log_likelihood_is_of_x_without_labels_and_of_x_and_y_with_them():
    m, log_joint = closed_form()
    estimate = pv.log_likelihood(m.model, m.guide, X, num_samples=20_000, seed=0)
    error = (estimate.log_prob - log_joint.logsumexp(-1)).abs()
    assert (error < 5 * estimate.std_error + 1e-6).all()  # 12 of such tests in a million fail by chance
    assert estimate.std_error.max() < 0.1
    exact = log_joint[torch.arange(6), LABELS["all"]]
    labelled = pv.log_likelihood(m.model, m.guide, X, LABELS["all"], num_samples=5, seed=0)
    torch.testing.assert_close(labelled.log_prob, exact)
    mixed = pv.log_likelihood(m.model, m.guide, X, LABELS["mixed"], num_samples=20_000, seed=0)
    known = LABELS["mixed"] >= 0
    torch.testing.assert_close(mixed.log_prob[known], exact[known])
    torch.testing.assert_close(mixed.log_prob[~known], log_joint.logsumexp(-1)[~known], rtol=0, atol=0.2)
    assert m.training


def test_eval_mode_scores_the_ordinary_pair():
    """log w = log p(y) p(z) p(x | z, y) - log q(y | x) q(z | x, y) at what was drawn."""
    m = small(class_probs=PROBS).eval()
    q = poutine.trace(m.guide).get_trace(X)
    p = poutine.trace(poutine.replay(m.model, trace=q)).get_trace(X)
    y, z = q.nodes["y"]["value"], q.nodes["z"]["value"]
    assert y.shape == (6, 3)
    assert torch.equal(y.sum(-1), torch.ones(6))
    assert z.shape == (6, 2)
    expected = torch.stack([log_joint_weight(m, X, int(c), z)[b] for b, c in enumerate(y.argmax(-1))])
    expected = expected - (y * log_softmax(m.classifier(X), -1)).sum(-1)
    q.compute_log_prob()
    p.compute_log_prob()
    log_w = sum(p.nodes[s]["log_prob"] for s in ("y", "z", "x")) - q.nodes["y"]["log_prob"] - q.nodes["z"]["log_prob"]
    torch.testing.assert_close(log_w, expected)
    assert pv.log_weights(m.model, m.guide, X, LABELS["mixed"], num_particles=4).shape == (4, 6)


@pytest.mark.parametrize("objective", [pv.ELBO(2), pv.IWAE(3), pv.MIWAE(2, 3), pv.Renyi(0.5, 2)], ids=repr)
def test_every_objective_stays_below_log_p(objective):
    m, log_joint = closed_form()
    assert -objective.loss(m.model, m.guide, X) <= log_joint.logsumexp(-1).sum() + 1e-9


@pytest.mark.parametrize("objective", [pv.IWAE(2, gradient="dreg"), pv.ELBO(gradient="stl"), pv.RWS(2)], ids=repr)
def test_gradients_at_fixed_class_probabilities_have_no_meaning_and_are_refused(objective):
    m = small()
    with pytest.raises(ValueError, match=r'guide site "y" is a Delta that carries parameters.*gradient="total"'):
        objective.differentiable_loss(m.model, m.guide, X)


# --- training and use ------------------------------------------------------------------------------------------------


def test_one_objective_serves_both_modes():
    """Their plates differ; with several particles these stand to the left of all."""
    m, log_joint = closed_form()
    objective = pv.ELBO(3)
    m.eval()
    objective.differentiable_loss(m.model, m.guide, X)
    m.train()
    torch.testing.assert_close(-objective.differentiable_loss(m.model, m.guide, X), kingma(m, log_joint).sum())


@pytest.mark.parametrize("which", LABELS)
def test_particles_are_independent_runs(which):
    m, y = small(), LABELS[which]
    args = (X,) if y is None else (X, y)
    with pyro.plate("k", 4, dim=-3):
        q = poutine.trace(m.guide).get_trace(*args)
        p = poutine.trace(poutine.replay(m.model, trace=q)).get_trace(*args)
    assert p.nodes["z"]["value"].shape == (4, 3, 6, 2)
    expected = torch.stack([by_hand(m, X, y, z) for z in p.nodes["z"]["value"]])
    pyro.set_rng_seed(2)
    bound = torch.as_tensor(pv.IWAE(4).loss(m.model, m.guide, *args))
    pyro.set_rng_seed(2)
    log_w = pv.log_weights(m.model, m.guide, *args, num_particles=4)
    torch.testing.assert_close(-bound, (log_w.logsumexp(0) - math.log(4)).sum())
    q.compute_log_prob()
    p.compute_log_prob()
    sums = [t.nodes[s]["log_prob"].sum(-2) for t, s in ((p, "x"), (p, "z"), (q, "z"))]
    got = sums[0] + sums[1] - sums[2] + (p.nodes["y"]["log_prob"] - q.nodes["y"]["log_prob"]).squeeze(1)
    got = got if y is None else got + p.nodes["label"]["log_prob"].squeeze(-2)
    torch.testing.assert_close(got, expected)


def clusters(number=300):
    """Three kinds of images, one label each of three data."""
    kind = torch.arange(number) % 3
    patterns = torch.bernoulli(torch.full((3, 1, 4, 4), 0.5))
    noisy = torch.bernoulli((0.1 + 0.8 * patterns)[kind])
    return noisy, kind


@pytest.mark.parametrize("compile", [False, True])
def test_three_labels_and_many_images_make_a_classifier(compile, tmp_path, interpreted):
    x, kind = clusters()
    y = hide_labels(kind, per_class=2)
    m = small(hidden=(16,), classification_weight=5.0).initialise(x)
    result = pv.fit(
        m.model, m.guide, (x, y), objective=pv.ELBO(), epochs=40, batch_size=100, lr=0.02, compile=compile,
        run_dir=tmp_path, validation=(x, y),
    )  # fmt: skip
    assert result.timings["path"] == ("compiled" if compile else "eager")
    assert m.accuracy(x, kind) > 0.95
    assert math.isfinite(result.history[-1]["kl"])
    twin = pv.load(tmp_path)
    assert torch.equal(twin.classify(x), m.classify(x))
    drawn = pv.sample(m, 300, kind, returns="draws", seed=0)
    assert m.accuracy(drawn, kind) > 0.8
    assert pv.sample(m, 10, seed=0).shape == (10, 1, 4, 4)


def test_samples_without_label_follow_the_prior_of_classes():
    m = small(class_probs=PROBS).eval()
    y = pv.sample(m, 6000, site="y", returns="draws", seed=0)
    share = y.mean(0)
    # Standard error at most 0.0065; five of them.
    torch.testing.assert_close(share, torch.tensor(PROBS), rtol=0, atol=0.033)
    given = pv.sample(m, 6, LABELS["mixed"], seed=0)
    assert given.shape == X.shape


def test_a_label_given_is_the_label_drawn():
    m, _ = closed_form()
    for label in range(3):
        expected = m.decode(torch.zeros(4, 2), label)
        torch.testing.assert_close(pv.sample(m, 4, torch.tensor(label)), expected)


def test_verbs():
    m, y = small(), LABELS["mixed"]
    probabilities = m.classify(X)
    torch.testing.assert_close(probabilities, m.classifier(X).softmax(-1).detach())
    best = probabilities.argmax(-1)
    assert torch.equal(m.completed(X), best)
    assert torch.equal(m.completed(X, y), torch.where(y < 0, best, y))
    assert torch.equal(m.encode(X), m.encode(X, best))
    assert torch.equal(m.encode(X, y), m.encode(X, m.completed(X, y)))
    assert torch.equal(m.reconstruct(X), m.decode(m.encode(X), best))
    assert m.analogies(X, None, range(3)).shape == (6, 3, 1, 4, 4)
    assert m.accuracy(X, best) == 1.0
    assert m.accuracy(X, (best + 1) % 3, batch_size=4) == 0.0
    units = pv.active_units(m.guide, X)
    assert {name: u.variances.shape for name, u in units.items()} == {"y": (3,), "z": (2,)}


def test_the_classifier_may_have_a_network_of_its_own():
    own = {"network": "conv", "channels": [3, 4], "hidden": [6]}
    mixed, conv = small(classifier=own), small(network="conv", channels=(2,))
    shapes = [tuple(p.shape) for p in mixed.classifier.parameters() if p.dim() > 1]
    assert shapes == [(3, 1, 4, 4), (4, 3, 4, 4), (6, 4), (3, 6)]
    assert [tuple(p.shape) for p in mixed.encoder.parameters() if p.dim() > 1] == [(8, 19), (4, 8)]
    assert conv.classifier.convolutions[0].out_channels == 2
    plain = small(network="conv", channels=(2,), classifier={"network": "mlp"})
    assert [tuple(p.shape) for p in plain.classifier.parameters() if p.dim() > 1] == [(8, 16), (3, 8)]


def test_hide_labels():
    y = torch.arange(40) % 4
    hidden = hide_labels(y, per_class=3)
    assert torch.equal(hidden[hidden >= 0], y[hidden >= 0])
    assert torch.equal(hidden[hidden >= 0].bincount(), torch.full((4,), 3))
    assert torch.equal(hidden, hide_labels(y, per_class=3))
    assert not torch.equal(hidden, hide_labels(y, per_class=3, seed=1))
    refused(DataError, "class 0 has 10 labels, per_class=11 asked for: keep fewer", hide_labels, y, per_class=11)
    refused(ValueError, "per_class must be an integer of at least 1", hide_labels, y, per_class=0)


# --- the distributions -----------------------------------------------------------------------------------------------


def test_a_soft_one_hot_is_the_categorical_on_one_hot_values():
    probs = torch.tensor(PROBS)
    values = torch.eye(3)
    torch.testing.assert_close(SoftOneHot(probs=probs).log_prob(values), probs.log())
    torch.testing.assert_close(SoftOneHot(probs=probs).log_prob(values), dist.OneHotCategorical(probs).log_prob(values))
    weights = torch.tensor([0.1, 0.2, 0.7])
    torch.testing.assert_close(SoftOneHot(probs=probs).expand([4]).log_prob(weights), (weights @ probs.log()).expand(4))


def test_weighted_is_its_base_but_for_the_weight():
    base = dist.Normal(torch.randn(3, 6, 2), 0.7).to_event(1)
    weighted = Weighted(base, torch.rand(3, 6))
    z = weighted.rsample()
    assert z.shape == (3, 6, 2)
    assert weighted.has_rsample
    assert torch.equal(weighted.mean, base.mean)
    assert weighted.support.check(z).all()
    torch.testing.assert_close(weighted.log_prob(z), weighted.weight * base.log_prob(z))
    torch.testing.assert_close(weighted.expand([4, 3, 6]).log_prob(z), weighted.log_prob(z).expand(4, 3, 6))


@pytest.mark.parametrize("gap", [{}, {"validate_args": True}])
def test_unvalidated_reaches_distributions_held_by_any_name(gap):
    base, x = dist.Normal(torch.zeros(3, 2), 1.0, **gap).to_event(1), torch.full((3, 2), torch.nan)
    weighted = Weighted(base, torch.ones(3))
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), dist.Normal(torch.zeros(3), 1.0), **gap)
    for fn, value in ((weighted, x), (mixture, x), (Stacked([None, weighted], [None, x], 1), torch.stack([x, x]))):
        assert unvalidated(fn).log_prob(value).isnan().any()
        refused(ValueError, "within the support", weighted.log_prob, x)  # what it was made from still looks


def test_partial_label():
    log_q = log_softmax(torch.randn(6, 3), -1)
    found = PartialLabel(log_q, 2.0).log_prob(LABELS["mixed"])
    torch.testing.assert_close(found[0], 2 * log_q[0, 0])
    torch.testing.assert_close(found[[1, 3, 5]], torch.zeros(3))
    assert PartialLabel(log_q, 2.0).log_prob(torch.tensor([0, 1, 3, -2, 0, 0])).isnan().tolist() == [
        False, False, True, True, False, False,
    ]  # fmt: skip
    support = PartialLabel(log_q, 1.0).support
    assert support.check(torch.tensor([-2, -1, 0, 2, 3])).tolist() == [False, True, True, True, False]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y", "match"),
    [
        (torch.tensor([0, 3, 0, 0, 0, 0]), r"labels\[1\] = 3: with num_classes=3, labels run from 0 to 2"),
        (torch.tensor([0, -1, -2, 0, 0, 0]), r"labels\[2\] = -2"),
    ],
)
@pytest.mark.parametrize("program", ["model", "guide"])
def test_wrong_labels_are_refused(program, y, match):
    with pytest.raises(DataError, match=match), pyro.validation_enabled(True):
        getattr(small(), program)(X, y)


def test_decoding_needs_a_label():
    m = small()
    refused(DataError, "labels missing", m.decode, torch.zeros(2, 2))
    with pytest.raises(DataError, match=r"labels\[0\] = -1"), pyro.validation_enabled(True):
        m.decode(torch.zeros(2, 2), -1)


@pytest.mark.parametrize("bad", [3, -2])
def test_fit_checks_every_label_before_it_trains(bad):
    y = LABELS["mixed"].repeat(20)
    y[113] = bad
    m = small()
    with pytest.raises(DataError, match=rf'data\[113\] = {bad} is outside the support of site "label"'):
        pv.fit(m.model, m.guide, (X.repeat(20, 1, 1, 1), y), objective=pv.ELBO(), epochs=1, batch_size=10)
    with pyro.validation_enabled(False), pytest.raises(DataError, match=rf"data\[4\] = {bad}"):
        pv.log_weights(m.model, m.guide, X, y[109:115])
