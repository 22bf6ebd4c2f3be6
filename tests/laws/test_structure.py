"""How sites lie in plates: alike in guide and model, known by dim and size, and looked at whenever they change."""

import math
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrovae as pv
from tests.laws.programs import X, lp, normal, plain_model, run_of
from tests.pairs import guide_of, model_of
from tests.state import refused

model = model_of(lambda z: normal(z))


# --- guide and model draw a site alike ------------------------------------------------------------------------------


def event_of_one(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", normal(0.5 * x[:, :1]).to_event(1))


def plate_for_event(x):
    with pyro.plate("units", 3, dim=-2), pyro.plate("data", 3, dim=-1):
        pyro.sample("z", normal(torch.zeros(3, 3)))


def units_model(x):
    with pyro.plate("data", 3):
        z = pyro.sample("z", normal(torch.zeros(3)).to_event(1))
        pyro.sample("x", normal(z.sum(-1)), obs=x[:, 0])


VERBS = {
    "log_weights": pv.log_weights,
    "log_likelihood": partial(pv.log_likelihood, num_samples=4),
    "objective": lambda *a: pv.IWAE(3).loss(*a),
    "gap": partial(pv.posterior_gap, num_samples=64),
    "information": pv.evaluate.information,
    "refine": partial(pv.refine, steps=1),
    "ais": lambda model, guide, x: pv.ais_log_likelihood(model, x, guide=guide, num_temperatures=2),
    "fit": lambda *a: pv.fit(*a, objective=pv.ELBO(), epochs=1, optimizer=torch.optim.SGD),
}


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("subsampling", ["model", "guide"])
def test_a_site_that_one_program_alone_subsamples_is_refused_in_training(subsampling, sequential):
    def program(role, x, loc):
        parts = 6 if subsampling == role else 3
        if sequential:
            for i in pyro.plate("units", parts, subsample=torch.arange(3)):
                yield pyro.sample(f"z_{i}", normal(loc[i]))
        else:
            with pyro.plate("data", parts, subsample=torch.arange(3)):
                yield pyro.sample("z", normal(loc))

    def unlike_model(x):
        z = torch.stack(list(program("model", x, torch.zeros(3))), -1)
        with pyro.plate("rows", 3, dim=-2):
            pyro.sample("x", normal(z.sum(-1, keepdim=True)), obs=x[:, :1])

    def unlike_guide(x):
        list(program("guide", x, x[:, 0]))

    match = "stands for 2 in the model and for 1" if subsampling == "model" else "stands for 1 in the model and for 2"
    for objective in (pv.ELBO(), pv.ELBO(2), pv.RWS(2)):
        refused(ValueError, match, objective.loss, unlike_model, unlike_guide, X)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize(
    ("program", "guide"),
    [(plain_model, event_of_one), (units_model, plate_for_event)],
)
def test_a_site_of_two_shapes_is_refused(program, guide, validate):
    with pyro.validation_enabled(validate):
        for verb in VERBS.values():
            refused(ValueError, "(event_dims|shapes) disagree at site .z.*one shape", verb, program, guide, X)


# --- plates go by dim and size --------------------------------------------------------------------------------------


def named(name, dim=-1, site="z"):
    def guide(x):
        with pyro.plate(name, len(x), dim=dim):
            pyro.sample(site, normal(0.5 * x if dim == -1 else 0.5 * x.unsqueeze(-1), 0.9))

    return guide


def test_a_guides_plate_may_have_a_name_of_its_own():
    x = X[:, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_w, seen = run_of(partial(pv.log_weights, num_particles=4), model, named("batch"), x)
        pv.fit(model, guide_with_parameter("batch"), x, objective=pv.IWAE(2), epochs=1, batch_size=2)
    assert log_w.shape == (4, 3)
    z = seen["z"]
    torch.testing.assert_close(log_w, lp(normal(0.0), z) + lp(normal(z), x) - lp(normal(0.5 * x, 0.9), z))
    folded = pv.log_weights(model, named("batch"), x, num_particles=4, fold_particles=True)
    assert folded.shape == (4, 3)


def guide_with_parameter(name):
    loc = torch.tensor(0.3, requires_grad=True)

    def guide(x):
        with pyro.plate(name, len(x)):
            pyro.sample("z", normal(loc * x, 0.9))

    return guide


def test_plates_of_one_model_are_told_apart_by_name_though_their_sizes_agree():
    # Three classes and three data: the classes are shared by the data, so that weights are joint.
    def shared(x):
        with pyro.plate("classes", 3):
            mean = pyro.sample("mean", normal(0.0))
        with pyro.plate("data", 3):
            pyro.sample("x", normal(mean[..., [1, 2, 0]]), obs=x)

    assert pv.log_weights(shared, named("classes", site="mean"), X[:, 0], num_particles=4).shape == (4,)


def outside(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", normal(0.0))
        pyro.sample("x", normal(z, pyro.param("scale", torch.tensor(1.0))), obs=x)
    pyro.factor("bonus", x.new_tensor(0.25))


def mean_model(x):
    mean = pyro.sample("mean", normal(0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", normal(mean, pyro.param("scale", torch.tensor(1.0))), obs=x)


@pytest.mark.parametrize(
    ("program", "guide", "stray"),
    [
        (outside, named("data"), "bonus"),
        (mean_model, lambda x: pyro.sample("mean", normal(0.3, 0.5)), None),
    ],
)
@pytest.mark.parametrize("verb", ["log_weights", "log_likelihood", "objective", "fit"])
def test_joint_weights_that_no_latent_makes_are_told_once_at_the_users_line(program, guide, stray, verb):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if verb == "fit":
            pv.fit(program, guide, X[:, 0], objective=pv.IWAE(2), epochs=2, batch_size=3, validation=X[:, 0])
        else:
            VERBS[verb](program, guide, X[:, 0])
    joint = [w for w in told if "joint over the data" in str(w.message)]
    assert len(joint) == (stray is not None)
    assert all(f'"{stray}" lie outside' in str(w.message) and w.filename == __file__ for w in joint)


# --- what changes is looked at again --------------------------------------------------------------------------------


def grown(x):
    """z ~ N(0, 1) for each datum, seen once, or in [B, T] as often as there are columns: then in a plate more."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", normal(0.0))
        if x.dim() == 1:
            pyro.sample("x", normal(z), obs=x)
            return
        with pyro.plate("time", x.shape[1]):
            pyro.sample("x", normal(z), obs=x.T)


def grown_guide(x):
    number = 1 + x[0].numel()
    with pyro.plate("data", len(x)):
        pyro.sample("z", normal(x.view(len(x), -1).sum(1) / number, number**-0.5))  # the posterior


def grown_log_px(x):
    x = x.view(len(x), -1)
    return dist.MultivariateNormal(torch.zeros(x.shape[1]), torch.eye(x.shape[1]) + 1).log_prob(x)


@pytest.mark.parametrize("make", [pv.ELBO, pv.IWAE, pv.VRMax], ids=lambda make: make.__name__)
def test_an_objective_follows_plates_that_come_later(make):
    objective = make(num_particles=3)
    for x in (X[:, 0], X, X[:, 0], X[:2]):
        assert objective.loss(grown, grown_guide, x) == pytest.approx(-grown_log_px(x).sum().item())


def test_a_likelihood_follows_plates_that_come_later():
    class Growing(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return (X[:, 0], X)[index]

    loader = torch.utils.data.DataLoader(Growing(), batch_size=None)
    found = pv.log_likelihood(grown, grown_guide, loader, num_samples=6, seed=0)
    torch.testing.assert_close(found.log_prob, torch.cat([grown_log_px(X[:, 0]), grown_log_px(X)]))


def test_a_pair_that_no_longer_matches_is_refused_when_it_no_longer_does():
    def shrunk(x):  # one draw for all, once there are more than three
        with pyro.plate("batch", len(x) if len(x) <= 3 else 1):
            pyro.sample("z", normal(0.5, 1.0))

    objective = pv.IWAE(2)
    assert math.isfinite(objective.loss(model, shrunk, X[:, 0]))
    refused(ValueError, "disagree at site .z.", objective.loss, model, shrunk, X.flatten())


def test_a_pair_is_looked_at_once_for_each_structure(monkeypatch):
    from pyrovae.engine import runner

    looks, looked = [], runner.checked_look
    monkeypatch.setattr(runner, "checked_look", lambda *a: looks.append(a) or looked(*a))
    objective, guide = pv.IWAE(2), guide_of(lambda x: normal(0.5 * x, 0.9))
    for size in (3, 2, 3, 2, 1, 3, 1):
        objective.loss(model, guide, X[:size, 0])
    assert len(looks) == 2  # one datum is a case of its own: it broadcasts
