"""The networks, and everybody's way to train them: each contender is a function of (network, k, example batch).

A contender returns its whole training step, a function of the batch: zero the gradients, loss, gradients, Adam. All
maximise the same bound: the ELBO for k = 1, IWAE's for k > 1.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.optim import Adam as PyroAdam  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import pyrovae as pv
from tests.benchmarks import images
from tests.benchmarks.options import Options

Step = Callable[[Tensor], object]
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Setting:
    """A network and the sizes of a training step."""

    network: str = "mlp"
    batch: int = 100
    k: int = 1
    hidden: tuple[int, ...] = (200, 200)
    latent_dim: int = 50

    def vae(self) -> pv.models.VAE:
        """The network as it starts, always from the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return pv.models.VAE(images.SHAPE, self.latent_dim, self.hidden, network=self.network)


@functools.cache
def trained(setting: Setting, options: Options) -> pv.models.VAE:
    """The network after ``options.warmup`` steps on real data: what contenders start from (a copy each)."""
    batches = images.pool(options.data_dir, setting.batch, options.device)
    vae = setting.vae().to(options.device).initialise(torch.cat(batches))
    step, data = hand_written(vae, setting.k, batches[0]), images.stream(batches)
    for _ in range(options.warmup):
        step(next(data))
    return vae


def start(setting: Setting, options: Options) -> pv.models.VAE:
    """A contender's own copy of the trained network; warming up is done in batches of 20 whatever the setting's."""
    warm = Setting(setting.network, 20, setting.k, setting.hidden, setting.latent_dim)
    return copy.deepcopy(trained(warm, options))


@contextmanager
def left_out(name: str, absent: dict[str, str]) -> Iterator[None]:
    """One contender's trouble is told, and noted in ``absent``, and does not stop the others."""
    try:
        yield
    except Exception as error:
        absent[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        print(f"!! {name} is left out: {absent[name]}", file=sys.stderr)


def adam(vae: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE, fused=True)


def descend(vae: nn.Module, loss_of: Callable[[Tensor], Tensor]) -> Step:
    """A step of fused Adam on a loss that autograd differentiates."""
    optimizer = adam(vae)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(x)
        loss.backward()
        optimizer.step()
        return loss

    return step


# --- pyrovae ---------------------------------------------------------------------------------------------------------


def objective(k: int) -> pv.Objective:
    return pv.ELBO() if k == 1 else pv.IWAE(k)


def ours_eager(vae: pv.models.VAE, k: int, x: Tensor) -> Step:
    """The library's objective, differentiated by autograd."""
    bound = objective(k)
    return descend(vae, lambda x: bound.differentiable_loss(vae.model, vae.guide, x) / len(x))


def ours_compiled(vae: pv.models.VAE, k: int, x: Tensor, precision: str = "float32") -> Step:
    """The library's compiled step."""
    from pyrovae.train.compiled import training_step

    return training_step(vae.model, vae.guide, objective(k), adam(vae), x, precision=precision)


# --- by hand ---------------------------------------------------------------------------------------------------------


def log_weights(vae: pv.models.VAE, x: Tensor, k: int) -> Tensor:
    """log p(x, z) - log q(z | x) of k draws, ``[k, B]``, as one writes it without a library."""
    mean, log_scale = vae.encoder(x).chunk(2, -1)
    noise = torch.randn(k, *mean.shape, device=x.device)
    return _log_weights(vae, x, mean, log_scale, noise)


def _log_weights(vae: pv.models.VAE, x: Tensor, mean: Tensor, log_scale: Tensor, noise: Tensor) -> Tensor:
    z = mean + log_scale.exp() * noise
    return _log_px(vae, x, z) + (log_scale + 0.5 * (noise.square() - z.square())).sum(-1)


def _log_px(vae: pv.models.VAE, x: Tensor, z: Tensor) -> Tensor:
    logits = vae.decoder(z)
    return -binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").flatten(2).sum(-1)


def fixed_log_weights(vae: pv.models.VAE, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The draws and their log-weights with q's parameters held fixed: what a doubly reparameterised gradient needs."""
    mean, log_scale = vae.encoder(x).chunk(2, -1)
    z = mean + log_scale.exp() * torch.randn(k, *mean.shape, device=x.device)
    fixed_mean, fixed_log_scale = mean.detach(), log_scale.detach()
    noise = (z - fixed_mean) * (-fixed_log_scale).exp()
    return z, _log_px(vae, x, z) + (fixed_log_scale + 0.5 * (noise.square() - z.square())).sum(-1)


def hand_loss(vae: pv.models.VAE, x: Tensor, k: int) -> Tensor:
    """Minus the bound per datum."""
    log_w = log_weights(vae, x, k)
    return -log_w.mean() if k == 1 else math.log(k) - log_w.logsumexp(0).mean()


def hand_written(vae: pv.models.VAE, k: int, x: Tensor) -> Step:
    """Plain PyTorch."""
    return descend(vae, lambda x: hand_loss(vae, x, k))


def hand_compiled(vae: pv.models.VAE, k: int, x: Tensor, mode: str | None = None) -> Step:
    """The same loss under torch.compile; Adam, fused already, stays outside."""
    loss = torch.compile(hand_loss, dynamic=False, mode=mode)
    return descend(vae, lambda x: loss(vae, x, k))


@torch.no_grad()
def hand_log_likelihood(vae: pv.models.VAE, x: Tensor, samples: int) -> Tensor:
    """log p(x) of each image: the encoder runs once, the decoder on as many samples at a time as was found fastest."""
    mean, log_scale = vae.encoder(x).chunk(2, -1)
    chunk = max(1, (2**28 if x.is_cuda else 2**21) // (x.numel() * x.element_size()))
    parts = []
    for begin in range(0, samples, chunk):
        noise = torch.randn(min(chunk, samples - begin), *mean.shape, device=x.device)
        parts.append(_log_weights(vae, x, mean, log_scale, noise))
    return torch.cat(parts).logsumexp(0) - math.log(samples)


@torch.no_grad()
def tiny_weights(vae: pv.models.VAE, batches: list[Tensor], k: int) -> dict[str, float]:
    """The shares of particles whose normalised weight is zero or denormal, and of those whose is below eps^2."""
    log_shares = torch.cat([log_weights(vae, x, k) for x in batches[:5]], 1).log_softmax(0)
    info = torch.finfo(log_shares.dtype)
    below = {"denormal or zero": info.tiny, "below eps^2": info.eps**2}
    return {name: (log_shares < math.log(limit)).double().mean().item() for name, limit in below.items()}


# --- Pyro ------------------------------------------------------------------------------------------------------------


def svi_step(vae: pv.models.VAE, loss: Any) -> Step:
    """The pair as Pyro's tutorial writes it, around the same networks, with Pyro's SVI and Adam."""
    name, dim = f"vae{id(vae)}", vae.latent_dim

    def model(x: Tensor) -> None:
        pyro.module(f"{name}.decoder", vae.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), dim), x.new_ones(len(x), dim)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=vae.decoder(z)).to_event(3), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module(f"{name}.encoder", vae.encoder)
        with pyro.plate("data", len(x)):
            mean, log_scale = vae.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))

    return SVI(model, guide, PyroAdam({"lr": LEARNING_RATE}), loss).step


def svi_vectorised(vae: pv.models.VAE, k: int, x: Tensor) -> Step:
    """SVI as an expert runs it: particles in a plate, validation switched off."""
    vectorised = RenyiELBO(alpha=0, num_particles=k, vectorize_particles=True, max_plate_nesting=1) if k > 1 else None
    step = svi_step(vae, vectorised or Trace_ELBO(max_plate_nesting=1))

    def unchecked(x: Tensor) -> object:
        with pyro.validation_enabled(False):
            return step(x)

    return unchecked


def svi_default(vae: pv.models.VAE, k: int, x: Tensor) -> Step:
    """SVI with every default: a loop over particles, validation on."""
    return svi_step(vae, RenyiELBO(alpha=0, num_particles=k) if k > 1 else Trace_ELBO())


# --- Pythae ----------------------------------------------------------------------------------------------------------


def pythae_model(vae: pv.models.VAE, k: int) -> Any:
    """Pythae's VAE or IWAE around the same networks."""
    from pythae.models import IWAE, VAE, IWAEConfig, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = vae.encoder

        def forward(self, x: Tensor) -> Any:
            mean, log_scale = self.net(x).chunk(2, -1)
            return ModelOutput(embedding=mean, log_covariance=2 * log_scale)

    class Decoder(BaseDecoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = vae.decoder

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=torch.sigmoid(self.net(z)))

    sizes = {"input_dim": vae.input_shape, "latent_dim": vae.latent_dim, "reconstruction_loss": "bce"}
    if k == 1:
        return VAE(VAEConfig(**sizes), Encoder(), Decoder())
    return IWAE(IWAEConfig(number_samples=k, **sizes), Encoder(), Decoder())


def pythae(vae: pv.models.VAE, k: int, x: Tensor) -> Step:
    """What Pythae's trainer does with a batch: its forward, zero_grad, backward, (unfused) Adam, and ``.item()``."""
    model = pythae_model(vae, k).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)

    def step(x: Tensor) -> float:
        output = model({"data": x}, epoch=1, dataset_size=60_000, uses_ddp=False)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        return output.loss.item()

    return step


# --- the floor -------------------------------------------------------------------------------------------------------


def floor(vae: pv.models.VAE, k: int, x: Tensor) -> Step:
    """Only the matrix products and convolutions of a step, forward and backward, on tensors of the same shapes."""
    work: list[Callable[[], object]] = []

    def record(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        of = _products if isinstance(layer, nn.Linear) else _convolutions
        work.extend(of(layer, args[0], output, args[0].requires_grad))

    layers = [m for m in vae.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    hand_loss(vae, x, k)
    for hook in hooks:
        hook.remove()

    @torch.no_grad()
    def step(x: Tensor) -> None:
        for product in work:
            product()

    return step


def _products(layer: Any, x: Tensor, y: Tensor, with_input: bool) -> list[Callable[[], object]]:
    weight, a = layer.weight.detach(), x.detach().flatten(0, -2)
    gradient = torch.randn_like(y.detach()).flatten(0, -2)
    out, for_weight, for_input = torch.empty_like(gradient), torch.empty_like(weight), torch.empty_like(a)
    work: list[Callable[[], object]] = [
        lambda: torch.mm(a, weight.t(), out=out),
        lambda: torch.mm(gradient.t(), a, out=for_weight),
    ]
    return [*work, lambda: torch.mm(gradient, weight, out=for_input)] if with_input else work


def _convolutions(layer: Any, x: Tensor, y: Tensor, with_input: bool) -> list[Callable[[], object]]:
    weight, a, gradient = layer.weight.detach(), x.detach(), torch.randn_like(y.detach())
    transposed = isinstance(layer, nn.ConvTranspose2d)
    how = (layer.stride, layer.padding, layer.dilation, transposed, layer.output_padding, layer.groups)
    aten = torch.ops.aten
    return [
        lambda: aten.convolution(a, weight, None, *how),
        lambda: aten.convolution_backward(gradient, a, weight, None, *how, [with_input, True, False]),
    ]


OURS, COMPILED, BFLOAT16 = "pyrovae eager", "pyrovae compiled", "pyrovae compiled, bfloat16"
SVI_FAST, SVI_SLOW = "Pyro SVI vectorised", "Pyro SVI default"
HAND, HAND_COMPILED = "hand-written", "hand-written, torch.compile"
PYTHAE, FLOOR = "Pythae", "products alone"

CONTENDERS: dict[str, Callable[[pv.models.VAE, int, Tensor], Step]] = {
    OURS: ours_eager,
    COMPILED: ours_compiled,
    BFLOAT16: functools.partial(ours_compiled, precision="bfloat16"),
    SVI_FAST: svi_vectorised,
    SVI_SLOW: svi_default,
    HAND: hand_written,
    HAND_COMPILED: hand_compiled,
    PYTHAE: pythae,
    FLOOR: floor,
}
