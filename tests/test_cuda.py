"""What must hold on a CUDA device; run with ``pytest -m cuda``. Skipped, visibly, where there is none."""

import pytest
import torch

import pyrovae as pv

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

OBJECTIVES = [
    pv.ELBO(4),
    pv.ELBO(4, free_bits=0.1),
    pv.IWAE(4),
    pv.IWAE(4, gradient="stl"),
    pv.IWAE(4, gradient="dreg"),
    pv.Renyi(0.5, 4),
    pv.VRMax(4),
    pv.MIWAE(2, 3),
    pv.PIWAE(2, 3),
    pv.CIWAE(0.3, 4),
]


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return pv.models.VAE((1, 8, 8), latent_dim=5, hidden=(32,)).double()


@pytest.fixture
def x():
    return torch.bernoulli(torch.full((20, 1, 8, 8), 0.3, dtype=torch.float64))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_same_noise_gives_the_same_loss_and_gradients_as_on_the_cpu(objective, vae, x, monkeypatch):
    def standard_normal(shape, dtype, device):
        return torch.randn(shape, dtype=dtype).to(device)

    monkeypatch.setattr("torch.distributions.normal._standard_normal", standard_normal)
    results = []
    for device in ("cpu", "cuda"):
        vae.to(device).zero_grad()
        torch.manual_seed(1)
        loss = objective.differentiable_loss(vae.model, vae.guide, x.to(device))
        loss.backward()
        results.append([loss.detach().cpu(), *(p.grad.cpu().clone() for p in vae.parameters())])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-9, atol=1e-9)


def test_a_step_never_waits_for_the_device(vae, x):
    vae, x = vae.cuda(), x.cuda()
    objective = pv.IWAE(4, gradient="dreg")
    objective.differentiable_loss(vae.model, vae.guide, x).backward()  # the first call checks the pair
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective.differentiable_loss(vae.model, vae.guide, x).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fit_moves_pair_and_data_and_the_likelihoods_agree_with_the_cpu(x):
    vae = pv.models.VAE((1, 8, 8), latent_dim=5, hidden=(32,))
    data = pv.data.Images(x.float())
    result = pv.fit(vae.model, vae.guide, data, objective=pv.IWAE(5), epochs=3, device="cuda")
    assert result.timings["device"].startswith("cuda")
    assert next(vae.parameters()).is_cuda
    on_cuda = pv.log_likelihood(vae.model, vae.guide, data, num_samples=2000, seed=0)
    on_cpu = pv.log_likelihood(vae.cpu().model, vae.guide, data, num_samples=2000, seed=0)
    error = (on_cuda.std_error.cpu() ** 2 + on_cpu.std_error**2).sqrt()
    # 20 comparisons, |z| < 6: false alarm below 1e-6
    assert ((on_cuda.log_prob.cpu() - on_cpu.log_prob).abs() < 6 * error).all()


def test_the_pair_of_a_cuda_run_loads_on_the_cpu(tmp_path, x):
    vae = pv.models.VAE((1, 8, 8), latent_dim=5, hidden=(32,))
    pv.fit(vae.model, vae.guide, x.float(), objective=pv.ELBO(), epochs=1, device="cuda", run_dir=tmp_path / "run")
    loaded = pv.load(tmp_path / "run")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, vae.state_dict()[name].cpu())
