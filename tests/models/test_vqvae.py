"""Vector quantisation against hand-computed numbers and brute force; the VQ-VAE's bound, gradients and priors."""

import copy
import json
import math

import pytest
import torch
from pyro import poutine
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyrovae as pv
from pyrovae.compile.precision import bfloat16_networks
from pyrovae.errors import DataError
from pyrovae.models import VQVAE, CodePrior, VectorQuantizer
from tests.state import refused

pytestmark = pytest.mark.double(3)

EMA = {"ema_decay": 0.9}
CODEBOOKS = [{}, EMA, {"num_quantizers": 2}, {"num_quantizers": 2, "revive_below": 1.0, **EMA}]
each_codebook = pytest.mark.parametrize("options", CODEBOOKS, ids=str)


def quantizer(rows, **options):
    rows = torch.as_tensor(rows)
    made = VectorQuantizer(*rows.shape[-2:], **options)
    made.codebook.data.copy_(rows)
    if made.ema_decay is not None:
        made.ema_sum.copy_(rows)
    return made


def state(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same(module, before):
    torch.testing.assert_close(state(module), before, rtol=0, atol=0)


# --- the quantizer ---------------------------------------------------------------------------------------------------


def test_numbers_by_hand():
    made = quantizer([[0.0, 0.0], [1.0, 1.0]])
    found = made(torch.tensor([[0.2, 0.0], [0.9, 1.2], [0.3, 0.1]]))
    assert found.codes.tolist() == [0, 1, 0]
    assert found.z_q.tolist() == [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    torch.testing.assert_close(found.codebook_losses, torch.tensor([0.04, 0.05, 0.1]))
    torch.testing.assert_close(found.commitment_losses, found.codebook_losses)
    torch.testing.assert_close(found.codebook_loss, torch.tensor(0.19 / 3))
    torch.testing.assert_close(found.commitment_loss, torch.tensor(0.19 / 3))
    torch.testing.assert_close(made.loss(found), 1.25 * found.codebook_losses)
    torch.testing.assert_close(found.perplexity, torch.tensor(3 / 4 ** (1 / 3)))


@each_codebook
def test_rows_are_the_nearest(options):
    made = VectorQuantizer(9, 5, **options).eval()
    z = torch.randn(4, 3, 5)
    found = made(z)
    several = options.get("num_quantizers", 1) > 1
    rest, rows = z, torch.zeros_like(z)
    for i, codebook in enumerate(made.codebook if several else [made.codebook]):
        codes = torch.cdist(rest, codebook.expand(4, 9, 5)).argmin(-1)
        assert torch.equal(found.codes[..., i] if several else found.codes, codes)
        rest, rows = rest - codebook[codes], rows + codebook[codes]
    torch.testing.assert_close(found.z_q, rows, rtol=0, atol=0)
    torch.testing.assert_close(found.z_q, made.lookup(found.codes), rtol=0, atol=0)
    assert torch.equal(made.encode(z), found.codes)
    assert found.codes.shape == ((4, 3, 2) if several else (4, 3))
    assert found.codebook_losses.shape == found.commitment_losses.shape == (4, 3)
    torch.testing.assert_close(found.codebook_loss, found.codebook_losses.mean())
    torch.testing.assert_close(made.perplexity(found.codes), found.perplexity)


def test_gradients_go_straight_through_and_each_loss_moves_one_side():
    made, z = VectorQuantizer(4, 3), torch.randn(10, 3, requires_grad=True)
    found, weight = made(z), torch.randn(10, 3)
    gradients = torch.autograd.grad(
        (found.z_q * weight).sum(), [z, made.codebook], allow_unused=True, retain_graph=True
    )
    torch.testing.assert_close(gradients[0], weight)
    assert gradients[1] is None
    away = z.detach() - made.codebook.detach()[found.codes]
    of_z, of_rows = torch.autograd.grad(found.commitment_loss, [z, made.codebook], allow_unused=True, retain_graph=True)
    torch.testing.assert_close(of_z, 2 * away / 10)
    assert of_rows is None
    of_z, of_rows = torch.autograd.grad(found.codebook_loss, [z, made.codebook], allow_unused=True)
    torch.testing.assert_close(of_rows, torch.zeros(4, 3).index_add(0, found.codes, -2 * away / 10))
    assert of_z is None


def test_losses_and_their_gradients_do_not_depend_on_how_many_vectors_there_are():
    made, z = VectorQuantizer(4, 3), torch.randn(10, 3)
    once, often = made(z), made(z.repeat(7, 1))
    torch.testing.assert_close(once.codebook_loss, often.codebook_loss)
    torch.testing.assert_close(once.perplexity, often.perplexity)
    of_once, of_often = (torch.autograd.grad(found.codebook_loss, made.codebook)[0] for found in (once, often))
    torch.testing.assert_close(of_once, of_often)


def test_perplexity_counts_the_codes_in_use():
    made = quantizer([[float(i)] for i in range(8)])
    assert made(torch.arange(8.0).unsqueeze(1)).perplexity.item() == pytest.approx(8)
    assert made(torch.tensor([[2.0], [5.0]])).perplexity.item() == pytest.approx(2)
    assert made(torch.full((5, 1), 3.0)).perplexity.item() == pytest.approx(1)


def test_moving_averages_follow_the_vectors():
    rows = [[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]]
    made = quantizer(rows, ema_decay=0.8)
    z = torch.tensor([[0.2, 0.0], [0.4, 0.2], [0.9, 1.2]])
    count, total = torch.ones(3), torch.tensor(rows)
    for _ in range(2):
        found = made(z)
        assert found.codes.tolist() == [0, 0, 1]
        torch.testing.assert_close(found.z_q, made.ema_sum.new_tensor(rows)[found.codes])
        count = 0.8 * count + 0.2 * torch.tensor([2.0, 1.0, 0.0])
        total = 0.8 * total + 0.2 * torch.stack([z[0] + z[1], z[2], torch.zeros(2)])
        smooth = (count + 1e-5) / (count.sum() + 3e-5) * count.sum()
        rows = (total / smooth.unsqueeze(1)).tolist()
        torch.testing.assert_close(made.ema_count, count)
        torch.testing.assert_close(made.codebook, torch.tensor(rows))
    assert not list(made.parameters())
    before = state(made)
    made.eval()(z)
    made.train().encode(z)
    assert_same(made, before)


def test_moving_averages_find_the_clusters():
    """Codes that the data keep in use end at the means of what they stand for."""
    made = quantizer([[-1.0], [1.0]], ema_decay=0.9)
    for _ in range(200):
        made(torch.tensor([[-3.0], [-2.0], [4.0], [5.0], [6.0]]))
    torch.testing.assert_close(made.codebook, torch.tensor([[-2.5], [5.0]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(made.ema_count, torch.tensor([2.0, 3.0]))


def test_codes_out_of_use_are_revived():
    rows = [[0.0], [50.0], [90.0], [1.0]]
    made = quantizer(rows, ema_decay=0.9, revive_below=0.95)
    z = torch.tensor([[0.1], [0.2], [1.1]]).repeat(20, 1)
    made(z)
    assert all(any(torch.equal(made.codebook[i], v) for v in z) for i in (1, 2))
    torch.testing.assert_close(made.ema_count, torch.tensor([0.9 + 4.0, 0.95, 0.95, 0.9 + 2.0]))
    torch.testing.assert_close(made.ema_sum[[1, 2]], 0.95 * made.codebook[[1, 2]])
    torch.testing.assert_close(made.ema_sum[[0, 3]], torch.tensor([[0.1 * 6.0], [0.9 + 0.1 * 22.0]]))
    before = state(made)
    made.eval()(z)
    assert_same(made, before)


def test_float32_at_least():
    rows, z = torch.randn(8, 4).float(), torch.randn(50, 4)
    made = quantizer(rows).float()
    for low in (z.bfloat16(), z.half()):
        expected, found = made(low.float()), made(low)
        for name in found._fields:
            assert torch.equal(getattr(expected, name), getattr(found, name)), name
        assert found.z_q.dtype == found.codebook_losses.dtype == torch.float32
    plain = made(z.float())
    with torch.autocast("cpu", dtype=torch.bfloat16), bfloat16_networks():
        found = made(z.float())
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.codebook_losses, plain.codebook_losses)
    assert {made(z).z_q.dtype, made(z).codebook_loss.dtype} == {torch.float64}
    exact = made.double()(z).codebook_losses
    torch.testing.assert_close(made.float()(z).codebook_losses, exact, rtol=1e-12, atol=0)


class _Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_distances_are_chunked(monkeypatch):
    made, z = VectorQuantizer(64, 3), torch.randn(700, 3)
    whole = made(z)
    monkeypatch.setattr("pyrovae.parts.quantizer.DISTANCES", {"cpu": 6400})
    with _Largest() as largest:
        chunked = made(z)
    assert torch.equal(whole.codes, chunked.codes)
    assert largest.numel == 6400


def test_residual_quantisation_leaves_less_over():
    z = torch.randn(500, 4)
    errors = []
    for number in (1, 2, 3):
        made = VectorQuantizer(16, 4, num_quantizers=number).initialise(z)
        found = made(z)
        errors.append((z - found.z_q).square().sum(-1).mean().item())
        assert found.perplexity.shape == ((number,) if number > 1 else ())
    assert errors[0] > 1.3 * errors[1] > 1.3**2 * errors[2]
    rest = z - made.codebook[0][found.codes[:, 0]]
    first, second = (z - made.codebook[0][found.codes[:, 0]]), rest - made.codebook[1][found.codes[:, 1]]
    third = second - made.codebook[2][found.codes[:, 2]]
    torch.testing.assert_close(found.commitment_losses, sum(r.square().sum(-1) for r in (first, second, third)))


@each_codebook
def test_a_start_from_the_data_is_asked_for(options):
    made = VectorQuantizer(6, 2, **options)
    assert made.codebook.abs().max() <= 1 / 6
    z = torch.randn(40, 2) + torch.tensor([5.0, 0.0])
    assert made.initialise(z.view(4, 10, 2)) is made
    first = made.codebook[0] if options.get("num_quantizers") else made.codebook
    chosen = [(z == row).all(-1).nonzero().item() for row in first]
    assert len(set(chosen)) == 6
    if "ema_decay" in options:
        torch.testing.assert_close(made.ema_sum, made.codebook)
        assert (made.ema_count == 1).all()
    before = made.codebook.detach().clone()
    made.initialise(z[:4])
    first, before = (rows[0] if options.get("num_quantizers") else rows for rows in (made.codebook, before))
    assert torch.equal(first[4:], before[4:])
    torch.testing.assert_close(first[:4].sort(0).values, z[:4].sort(0).values)


def test_what_the_quantizer_refuses():
    with pytest.raises(ValueError, match=r"revive_below=1\.0 needs the moving counts: pass ema_decay"):
        VectorQuantizer(4, 4, revive_below=1.0)
    refused(ValueError, r"code_dim=4, got \(2, 5\): move the channels last", VectorQuantizer(4, 4), torch.zeros(2, 5))


# --- the pair --------------------------------------------------------------------------------------------------------


def small(**options):
    return VQVAE((1, 4, 8), **{"num_codes": 5, "code_dim": 3, "channels": 4, "num_downsamplings": 1, **options})


def images(number=6):
    return torch.rand(number, 1, 4, 8).round()


@each_codebook
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_bound_and_its_gradient_are_those_of_the_papers_loss(options, likelihood):
    pair, x = small(likelihood=likelihood, commitment_weight=0.3, **options).initialise(images(30)), images()
    twin = copy.deepcopy(pair)
    torch.manual_seed(0)
    loss = pv.ELBO(3).differentiable_loss(pair.model, pair.guide, x)
    loss.backward()
    torch.manual_seed(0)
    found = twin.quantizer(twin.encoder(x).movedim(1, -1))
    uniform = 2 * 4 * math.log(5) * options.get("num_quantizers", 1)
    reconstruction = twin.observation.distribution(twin.decoder(found.z_q.movedim(-1, 1))).log_prob(x)
    vq = (found.codebook_losses + 0.3 * found.commitment_losses).sum((-2, -1))
    expected = (uniform - reconstruction + vq).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for (name, parameter), other in zip(pair.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)
        assert parameter.grad.abs().sum() > 0, name
    if "revive_below" not in options:  # the codes are moved once a step, whatever runs besides
        assert_same(pair, state(twin))


def test_sites_of_the_programs():
    pair, x = small(), images()
    drawn = poutine.trace(pair.guide).get_trace(x)
    joint = poutine.trace(poutine.replay(pair.model, trace=drawn)).get_trace(x)
    assert set(drawn.nodes) - {"_INPUT", "_RETURN", "data"} == {"vq", "z"}
    assert drawn.nodes["vq"]["fn"].has_rsample
    assert drawn.nodes["z"]["value"].shape == (6, 2, 4, 3)
    assert joint.nodes["z"]["fn"].support.is_discrete
    assert joint.nodes["z"]["fn"].support.check(torch.zeros(6, 2, 4, 3)).shape == (6,)
    assert joint.observation_nodes == ["x"]
    pair.eval()
    assert "vq" not in poutine.trace(pair.guide).get_trace(x).nodes


@each_codebook
def test_in_eval_mode_it_is_a_bound_that_more_particles_do_not_tighten(options):
    pair, x = small(**options).initialise(images(30)).eval(), images()
    before = state(pair)
    expected = pair.observation.distribution(pair.decoder(pair.quantizer.lookup(
        pair.encode(x).movedim(1, -1) if "num_quantizers" in options else pair.encode(x)
    ).movedim(-1, 1))).log_prob(x) - 8 * options.get("num_quantizers", 1) * math.log(5)  # fmt: skip
    found = pv.log_likelihood(pair.train().model, pair.guide, x, num_samples=7)
    torch.testing.assert_close(found.log_prob, expected)
    torch.testing.assert_close(found.std_error, torch.zeros(6), atol=1e-6, rtol=0)
    pair.eval()
    torch.testing.assert_close(pv.IWAE(4).bound(pv.log_weights(pair.model, pair.guide, x, num_particles=4)), expected)
    assert_same(pair, before)
    assert pair.likelihood_is == "bound"


@pytest.mark.parametrize("objective", [pv.IWAE(3, gradient="stl"), pv.IWAE(3, gradient="dreg"), pv.RWS(3)], ids=repr)
def test_gradients_without_meaning_are_refused(objective):
    pair, x = small(), images()
    with pytest.raises(ValueError, match=r'guide site "(vq|z)" is a (factor|Delta) that carries parameters'):
        objective.differentiable_loss(pair.model, pair.guide, x)


def test_fit_reports_perplexity_and_moves_the_codes_in_training_only():
    pair, x = small(num_codes=8, revive_below=0.5, **EMA), images(40)
    result = pv.fit(
        pair.model, pair.guide, x, objective=pv.ELBO(), epochs=2, batch_size=20, validation=x, compile=False
    )
    pair.eval()
    expected = pair.quantizer(pair.vectors(x)).perplexity.item()
    assert result.history[-1]["perplexity"] == pytest.approx(expected)
    assert result.history[-1]["kl"] == pytest.approx(8 * math.log(8))
    bound = pv.log_likelihood(pair.model, pair.guide, x, num_samples=2)
    assert result.history[-1]["validation_bound"] == pytest.approx(-bound.nll)


def test_it_learns_patterns():
    patterns = (torch.rand(4, 1, 4, 8) < 0.5).double()
    x = patterns.repeat(25, 1, 1, 1)
    pair = small(num_codes=16, code_dim=4, channels=16, revive_below=0.5, ema_decay=0.9).initialise(x)
    pv.fit(pair.model, pair.guide, x, objective=pv.ELBO(), epochs=30, batch_size=20, lr=5e-3, compile=False)
    assert torch.equal(pair.eval().reconstruct(patterns).round(), patterns)


@each_codebook
def test_verbs(options):
    pair = small(**options).eval()
    codes = pair.encode(torch.rand(2, 3, 1, 4, 8))
    assert codes.shape == ((2, 3, 2, 2, 4) if "num_quantizers" in options else (2, 3, 2, 4))
    assert codes.dtype == torch.int64
    torch.testing.assert_close(pair.decode(codes)[1], pair.decode(codes[1]))
    rows = pv.sample(pair, 50, seed=0, site="z", returns="draws")
    assert rows.shape == (50, 2, 4, 3)
    if "num_quantizers" not in options:
        assert set(pair.quantizer.encode(rows).flatten().tolist()) == set(range(5))
    for verb in (pair.interpolate, pair.traverse):
        refused(ValueError, rf"VQVAE has no {verb.__name__}: its codes are names of rows", verb, images(1), images(1))
    for wrong, message in [
        (codes.double(), r"codes must be integers \[\.\.\., (2, )?2, 4\], got torch.float64"),
        (codes[..., :3], "got torch.int64 of shape"),
        (codes + 5, r"codes must be among 0 \.\.\. 4, got [5-9] to [5-9]: pass such"),
    ]:
        refused(DataError, message, pair.decode, wrong)


def test_networks_are_the_papers():
    pair = VQVAE((3, 32, 32), code_dim=64, channels=256, likelihood="gaussian")
    assert pair.grid == (8, 8)
    kernels = [tuple(p.shape) for p in pair.encoder.parameters() if p.dim() == 4]
    residual = [(256, 256, 3, 3), (256, 256, 1, 1)]
    assert kernels == [(256, 3, 4, 4), (256, 256, 4, 4), *residual, *residual, (64, 256, 1, 1)]
    kernels = [tuple(p.shape) for p in pair.decoder.parameters() if p.dim() == 4]
    assert kernels == [(256, 64, 1, 1), *residual, *residual, (256, 256, 4, 4), (256, 3, 4, 4)]


# --- the learned prior -----------------------------------------------------------------------------------------------


def with_prior(**options):
    pair = small(**options).initialise(images(30))
    return pair.with_prior(CodePrior(pair.grid, 5, channels=4, num_layers=2))


@pytest.mark.parametrize("options", [{}, EMA], ids=str)
def test_a_learned_prior_scores_the_codes(options):
    pair, x = with_prior(**options).eval(), images()
    uniform = copy.deepcopy(pair)
    uniform.code_prior = None
    before, after = (pv.log_weights(p.model, p.guide, x, num_particles=2) for p in (uniform, pair))
    learned = pair.code_prior.distribution().log_prob(pair.encode(x))
    torch.testing.assert_close(after - before, (learned + 8 * math.log(5)).expand(2, 6))
    training = [pv.log_weights(p.train().model, p.guide, x) for p in (copy.deepcopy(pair), uniform)]
    torch.testing.assert_close(*training)


def test_codes_are_found_again_however_close_two_rows_are():
    pair = with_prior().eval()
    with torch.no_grad():
        pair.quantizer.codebook[1] = pair.quantizer.codebook[0] * (1 + 1e-6)
    pair.float()
    codes = torch.randint(5, (20, *pair.grid))
    z = pair.quantizer.lookup(codes)
    torch.testing.assert_close(pair.prior().log_prob(z), pair.code_prior.distribution().log_prob(codes))
    assert (pair.prior().log_prob(z + 0.1) == -math.inf).all()


def test_samples_come_from_the_learned_prior():
    pair = with_prior()
    with torch.no_grad():
        pair.code_prior.network.output.bias[3] += 100
    expected = pair.decode(torch.full((4, *pair.grid), 3))
    torch.testing.assert_close(pv.sample(pair, 4, seed=0), expected)
    with torch.no_grad():
        pair.code_prior.network.output.bias[4] += 99
    drawn = pv.sample(pair, 40, seed=0, site="z", returns="draws")
    assert set(pair.quantizer.encode(drawn).flatten().tolist()) == {3, 4}
    cold = pv.sample(pair, 40, seed=0, site="z", returns="draws", temperature=0.01)
    assert set(pair.quantizer.encode(cold).flatten().tolist()) == {3}


def test_the_prior_is_saved_with_the_pair(tmp_path):
    pair, x = with_prior(revive_below=0.5, **EMA), images(20)
    pv.fit(pair.model, pair.guide, x, objective=pv.ELBO(), epochs=1, run_dir=tmp_path / "run", compile=False)
    loaded = pv.load(tmp_path / "run")
    assert loaded.config == json.loads(json.dumps(pair.config))
    assert_same(loaded, state(pair))
    pair.eval()
    assert torch.equal(pv.log_weights(loaded.model, loaded.guide, x), pv.log_weights(pair.model, pair.guide, x))


def test_priors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"over grids \(2, 4\) of 5 codes, got \(4, 2\) of 5"):
        small().with_prior(CodePrior((4, 2), 5, channels=4))
    refused(ValueError, r"of 5 codes, got \(2, 4\) of 6", small().with_prior, CodePrior((2, 4), 6, channels=4))
    with pytest.raises(ValueError, match="needs one codebook, got num_quantizers=2"):
        small(num_quantizers=2).with_prior(CodePrior((2, 4), 5, channels=4))
