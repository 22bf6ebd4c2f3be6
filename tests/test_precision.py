"""Mixed precision: networks multiply in bfloat16, and nothing else does."""

import math
from contextlib import suppress

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyrovae as pv
from pyrovae.compile import graph as graphs
from pyrovae.compile.noise import rewritten
from pyrovae.compile.precision import bfloat16_networks, choose_precision, full_float32, networks_in, readable
from pyrovae.engine.probe import look
from pyrovae.engine.randomness import isolated_rng
from pyrovae.train.compiled import Compiled
from pyrovae.train.step import Eager

pytestmark = pytest.mark.seed(47)

EPS = torch.finfo(torch.bfloat16).eps
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "units", "rows", "taken"),
    [
        ("float32", True, 10_000, "float32"),
        ("bfloat16", True, 1, "bfloat16"),
        ("auto", True, 100, "bfloat16"),
        ("auto", True, 99, "float32"),
        ("auto", False, 10_000, "float32"),
    ],
)
def test_auto_takes_bfloat16_where_it_is_faster(asked, units, rows, taken, monkeypatch, recwarn):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": units}, raising=False)
    assert choose_precision(asked, CPU, rows) == taken
    assert not recwarn.list


def test_bfloat16_without_units_for_it_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False}, raising=False)
    vae = pv.models.VAE((4,), latent_dim=1, hidden=(3,))
    with pytest.warns(UserWarning, match='no units for bfloat16.*"auto"') as warned:
        pv.fit(vae.model, vae.guide, torch.ones(8, 4), objective=pv.ELBO(), epochs=1, precision="bfloat16")
    assert len(warned) == 1
    assert warned[0].filename == __file__


@pytest.mark.parametrize(("data", "taken"), [(100, "bfloat16"), (99, "float32")])
def test_a_job_says_what_auto_took(data, taken, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    vae, x = pv.models.VAE((4,), latent_dim=1, hidden=(3,)), torch.ones(200, 4)
    options = {"batch_size": data, "precision": "auto", "compile": False}
    result = pv.fit(vae.model, vae.guide, x, objective=pv.ELBO(), epochs=1, **options)
    assert result.timings["precision"] == taken


WEIGHT = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0))
LAYERS = {
    "linear": (nn.Linear(6, 5), (7, 6)),
    "linear without bias": (nn.Linear(6, 5, bias=False), (2, 7, 6)),
    "bilinear": (lambda x: F.bilinear(x, x, WEIGHT), (7, 6)),
    "conv1d": (nn.Conv1d(2, 3, 3), (4, 2, 9)),
    "conv2d": (nn.Conv2d(2, 3, 3, stride=2, padding=1), (4, 2, 9, 9)),
    "conv3d": (nn.Conv3d(2, 3, 2), (4, 2, 4, 4, 4)),
    "conv_transpose2d": (nn.ConvTranspose2d(2, 3, 4, 2, 1), (4, 2, 5, 5)),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), (2, 7, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_multiplies_in_bfloat16_and_gives_float32(name):
    """Its result is a bfloat16 number, off by rounding; its input and its parameters stay as they are."""
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    exact = layer(x)
    with bfloat16_networks():
        low = layer(x)
    assert low.dtype == torch.float32
    assert torch.equal(low, low.bfloat16().float())
    assert not torch.equal(low, exact)
    # Rounding of inputs, sum and result: a few eps / 2 on the scale of the sum's terms, in the mean of squares.
    assert (low - exact).norm() < 2 * EPS * exact.norm().clamp(min=1)
    assert torch.equal(layer(x), exact)


def test_the_layer_is_the_bfloat16_layer():
    layer, x = nn.Linear(6, 5), torch.randn(7, 6)
    with bfloat16_networks():
        low = layer(x)
    assert torch.equal(low, F.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()).float())
    with bfloat16_networks():
        named = F.linear(x, weight=layer.weight, bias=layer.bias)
    assert torch.equal(low, named)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_left_alone(dtype):
    layer, x = nn.Linear(6, 5).to(dtype), torch.randn(7, 6, dtype=dtype)
    with bfloat16_networks():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        assert layer(x).dtype == dtype


def test_what_is_no_network_stays_float32():
    x = torch.randn(50, 6)
    d = dist.MultivariateNormal(torch.zeros(6), torch.eye(6) + 0.3)
    expected = [x @ x.T, torch.einsum("bi,ci->bc", x, x), d.log_prob(x), x.logsumexp(-1), dist.Normal(x, 1).log_prob(x)]
    with bfloat16_networks():
        got = [x @ x.T, torch.einsum("bi,ci->bc", x, x), d.log_prob(x), x.logsumexp(-1), dist.Normal(x, 1).log_prob(x)]
    assert all(map(torch.equal, got, expected))


def test_gradients_flow_in_float32_and_are_near():
    net, x = nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 1)), torch.randn(100, 6)

    def gradients():
        return torch.autograd.grad(net(x).square().mean(), list(net.parameters()))

    exact = gradients()
    with bfloat16_networks():
        low = gradients()
    for e, g in zip(exact, low, strict=True):
        assert g.dtype == torch.float32
        assert 0 < (g - e).norm() < 4 * EPS * e.norm()


def vae(**variant):
    torch.manual_seed(2)
    return pv.models.VAE((1, 8, 8), latent_dim=3, **{"hidden": (32,)} | variant)


def grey():
    digits = pv.data.load("digits", binarization="dynamic").train
    return digits.subset(slice(0, 200))


@pytest.mark.parametrize("variant", [{}, {"network": "conv", "channels": (4,)}], ids=["mlp", "conv"])
@pytest.mark.parametrize("objective", [pv.ELBO(2), pv.IWAE(3, gradient="dreg")], ids=repr)
def test_log_probabilities_stay_exact_to_far_better_than_bfloat16(variant, objective):
    """A loss of 44 nats is off by the networks' rounding alone; rounded itself, it would be off by a tenth of a nat."""
    pair, x = vae(**variant), grey().fixed().x
    losses, gradients = [], []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(1)
        with networks_in(precision):
            loss = objective.differentiable_loss(pair.model, pair.guide, x) / len(x)
        assert loss.dtype == torch.float32
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, list(pair.parameters())))
    assert losses[0] > 40
    assert 0 < abs(losses[1] - losses[0]) < 0.02
    assert math.fmod(losses[1], 0.25) != 0  # bfloat16 has steps of a quarter here
    exact, low = (torch.cat([g.flatten() for g in each]) for each in gradients)
    assert (low - exact).norm() < 10 * EPS * exact.norm()


class Dtypes(nn.Module):
    """Notes what its distributions are made of."""

    def __init__(self):
        super().__init__()
        self.pair, self.seen = vae(likelihood="gaussian"), set()

    def model(self, x):
        trace = pyro.poutine.trace(self.pair.model).get_trace(x)
        self.seen |= {trace.nodes[name]["value"].dtype for name in ("x", "z")}
        self.seen.add(self.pair.likelihood(trace.nodes["z"]["value"]).mean.dtype)

    def guide(self, x):
        self.seen.add(self.pair.posterior(x).mean.dtype)
        self.pair.guide(x)


def test_sites_never_see_bfloat16():
    pair = Dtypes()
    pv.fit(pair.model, pair.guide, torch.rand(20, 1, 8, 8), objective=pv.ELBO(), epochs=1, precision="bfloat16")
    assert pair.seen == {torch.float32}


@pytest.mark.parametrize("how", [False, True], ids=["eager", "compiled"])
def test_training_in_bfloat16_reaches_the_bound_of_float32(how, interpreted):
    bounds = {}
    for precision in ("float32", "bfloat16"):
        pair = vae()
        result = pv.fit(
            pair.model, pair.guide, grey(), objective=pv.IWAE(2), epochs=8, lr=1e-2, compile=how, precision=precision
        )
        assert result.timings["precision"] == precision
        assert result.timings["path"] == ("compiled" if how else "eager")
        assert all(p.dtype == torch.float32 for p in pair.parameters())
        bounds[precision] = [row["bound"] for row in result.history]
    assert bounds["bfloat16"] != bounds["float32"]
    assert bounds["bfloat16"][-1] > bounds["bfloat16"][0] + 5
    assert bounds["bfloat16"] == pytest.approx(bounds["float32"], abs=0.2)


def eager_gradients(pair, x, precision):
    return Eager(pair.model, pair.guide, look(pair.model, pair.guide, (x,)), (x,), precision=precision)


def test_the_compiled_step_in_bfloat16_is_the_eager_one():
    """Through Inductor, which may round fewer intermediate results: within a few eps, and nearer than to float32's."""
    pair, x, objective = vae(), grey().fixed().x, pv.IWAE(3, gradient="dreg")
    exact, eager = (eager_gradients(pair, x, precision) for precision in ("float32", "bfloat16"))
    compiled = Compiled(eager)
    assert compiled.static(objective) is not None
    results = []
    for gradients in (exact, eager, compiled):
        with isolated_rng(3), rewritten():
            loss, _ = gradients(objective, (x,))
        results.append((float(loss), torch.cat([p.grad.flatten() for p in pair.parameters()])))
    (_, full), (loss, gradient), (other, found) = results
    assert other == pytest.approx(loss, abs=0.02)
    assert (found - gradient).norm() < 5 * EPS * gradient.norm()
    assert (found - full).norm() > 0.1 * EPS * full.norm()  # it is bfloat16 indeed


@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_a_wrong_graph_is_refused_in_bfloat16_as_well(factor, monkeypatch):
    def perturbed(self):
        return lambda *inputs, noise=self.noise: [result * factor for result in self(*inputs)]

    monkeypatch.setattr(graphs.Graph, "compiled", perturbed)
    pair = vae()
    with pytest.warns(UserWarning, match="compiled and eager results differ"):
        result = pv.fit(
            pair.model, pair.guide, grey(), objective=pv.ELBO(), epochs=1, compile=True, precision="bfloat16"
        )
    assert result.timings["path"] == "eager"


def test_an_evaluation_is_in_float32_whatever_a_pair_was_trained_in():
    pair = vae()
    pv.fit(pair.model, pair.guide, grey(), objective=pv.ELBO(), epochs=1, precision="bfloat16")
    estimate = pv.log_likelihood(pair.model, pair.guide, grey(), num_samples=3, seed=0)
    with torch.no_grad(), isolated_rng(0), full_float32():
        x = grey().fixed(0).x[:100]
        log_w = pv.log_weights(pair.eval().model, pair.guide, x, num_particles=3)
    torch.testing.assert_close(estimate.log_prob[:100].float(), log_w.logsumexp(0) - math.log(3))


BACKENDS = torch.backends
SWITCHES = {
    "matmul": BACKENDS.cuda.matmul, "convolutions": BACKENDS.cudnn.conv, "recurrent": BACKENDS.cudnn.rnn,
    "matmul on CPUs": BACKENDS.mkldnn.matmul, "convolutions on CPUs": BACKENDS.mkldnn.conv,
    "recurrent on CPUs": BACKENDS.mkldnn.rnn, "cuDNN": BACKENDS.cudnn, "CPUs": BACKENDS.mkldnn, "all": BACKENDS,
}  # fmt: skip
ALLOWED = {
    "nothing": lambda: None,
    "matmul, high": lambda: torch.set_float32_matmul_precision("high"),
    "matmul, medium": lambda: torch.set_float32_matmul_precision("medium"),
    "TF32 in matmul": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "no TF32 in cuDNN": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
} | {name: lambda switch=switch: setattr(switch, "fp32_precision", "tf32") for name, switch in SWITCHES.items()}


def older():
    """What the older switches say, where torch lets them be read."""
    return [readable(torch.get_float32_matmul_precision), readable(lambda: BACKENDS.cudnn.allow_tf32)]


def newer():
    return [switch.fp32_precision for switch in SWITCHES.values()]


@pytest.mark.parametrize("name", ALLOWED)
def test_full_float32_restores_what_was_allowed_by_torchs_older_switches_and_its_newer_ones(name):
    default, tf32, new = torch.get_float32_matmul_precision(), BACKENDS.cudnn.allow_tf32, newer()
    try:
        ALLOWED[name]()
        before = older(), newer()
        with suppress(KeyError), full_float32():
            assert newer()[:6] == ["ieee"] * 6
            for was, now, full in zip(before[0], older(), ("highest", False), strict=True):
                assert was is None or now == full
            raise KeyError
        assert (older(), newer()) == before
        with full_float32():
            pass
        BACKENDS.fp32_precision = "ieee"  # whoever had nothing of its own still takes that
        after = newer()
        BACKENDS.fp32_precision = before[1][-1]
        assert (older(), newer()) == before
        assert after[0] == (
            "tf32" if name in ("matmul", "TF32 in matmul", "matmul, high", "matmul, medium") else "ieee"
        )
    finally:
        for switch, value in reversed([*zip(SWITCHES.values(), new, strict=True)]):
            switch.fp32_precision = value
        torch.set_float32_matmul_precision(default)
        BACKENDS.cudnn.allow_tf32 = tf32


def test_an_evaluation_multiplies_in_float32_and_restores_what_was_allowed():
    seen = set()

    class Seeing(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = vae()

        def model(self, x):
            seen.add(torch.get_float32_matmul_precision())
            self.pair.model(x)

        def guide(self, x):
            self.pair.guide(x)

    default, pair = torch.get_float32_matmul_precision(), Seeing()
    torch.set_float32_matmul_precision("medium")
    try:
        pv.log_likelihood(pair.model, pair.guide, grey(), num_samples=2)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(default)
    assert seen == {"highest"}
