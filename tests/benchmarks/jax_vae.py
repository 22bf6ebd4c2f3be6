"""The dense VAE as a NumPyro program, with the weights of ours: what its users run on a CPU.

A whole epoch is one compiled scan over ``svi.update``, binarisation included; log p(x) is ``RenyiELBO(alpha=0)`` of one
image, mapped over images. Needs ``pip install numpyro`` (JAX comes with it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pyrovae as pv

LEARNING_RATE = 1e-3
Layers = list[tuple[np.ndarray, np.ndarray]]


def layers(network: nn.Module) -> Layers:
    """Weights ``[in, out]`` and biases of a dense network."""
    dense = (m for m in network.modules() if isinstance(m, nn.Linear))
    return [(m.weight.detach().numpy().T.copy(), m.bias.detach().numpy().copy()) for m in dense]


def programs(vae: pv.models.VAE) -> tuple[Callable[[Any], None], Callable[[Any], None]]:
    """Model and guide of flat images ``[B, D]``."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    encoder, decoder, dim = layers(vae.encoder), layers(vae.decoder), vae.latent_dim

    def network(name: str, start: Layers, x: Any) -> Any:
        for i, (weight, bias) in enumerate(start):
            x = x @ numpyro.param(f"{name}.{i}.weight", weight) + numpyro.param(f"{name}.{i}.bias", bias)
            x = jnp.tanh(x) if i + 1 < len(start) else x
        return x

    def model(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(dim), 1.0).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=network("decoder", decoder, z)).to_event(1), obs=x)

    def guide(x: Any) -> None:
        mean, log_scale = jnp.split(network("encoder", encoder, x), 2, -1)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(mean, jnp.exp(log_scale)).to_event(1))

    return model, guide


def bound(k: int) -> Any:
    """The ELBO for one particle, IWAE's bound for more."""
    from numpyro.infer import RenyiELBO, Trace_ELBO

    return Trace_ELBO() if k == 1 else RenyiELBO(alpha=0, num_particles=k)


def epochs(vae: pv.models.VAE, k: int, x: Tensor, batch: int) -> Callable[[], float]:
    """One more epoch at each call; the mean loss in nats per image."""
    import jax
    from numpyro import optim
    from numpyro.infer import SVI

    pixels = np.asarray(x.flatten(1))
    steps = len(pixels) // batch
    svi = SVI(*programs(vae), optim.Adam(LEARNING_RATE), bound(k))

    def epoch(state: Any, key: Any, data: Any) -> tuple[Any, Any]:
        shuffle, noise = jax.random.split(key)
        order = jax.random.permutation(shuffle, len(data))[: steps * batch].reshape(steps, batch)

        def step(state: Any, index: Any) -> tuple[Any, Any]:
            grey = data[index[1]]
            bits = jax.random.bernoulli(index[0], grey).astype(grey.dtype)
            return svi.update(state, bits)

        state, losses = jax.lax.scan(step, state, (jax.random.split(noise, steps), order))
        return state, losses.mean() / batch

    compiled, data = jax.jit(epoch, donate_argnums=0), jax.device_put(pixels)
    held = [svi.init(jax.random.PRNGKey(0), data[:batch])]
    keys = iter(jax.random.split(jax.random.PRNGKey(1), 10_000))

    def run() -> float:
        held[0], loss = compiled(held[0], next(keys), data)
        return float(loss)

    return run


def log_likelihood(vae: pv.models.VAE, x: Tensor, samples: int) -> Tensor:
    """log p(x) of each image."""
    return likelihoods(vae, samples)(x)


def likelihoods(vae: pv.models.VAE, samples: int) -> Callable[[Tensor], Tensor]:
    """The same, to be called again with as many images without being compiled again."""
    import jax

    model, guide = programs(vae)
    of = bound(samples)

    def one(key: Any, x: Any) -> Any:
        return -of.loss(key, {}, model, guide, x[None])

    mapped = jax.jit(lambda keys, x: jax.lax.map(lambda pair: one(*pair), (keys, x)))

    def run(x: Tensor) -> Tensor:
        keys = jax.random.split(jax.random.PRNGKey(0), len(x))
        return torch.from_numpy(np.array(mapped(keys, np.asarray(x.flatten(1)))))

    return run
