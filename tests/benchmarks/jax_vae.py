"""The dense VAE as a NumPyro program, with the weights of ours: what its users run on a CPU.

A whole epoch is one compiled scan over ``svi.update``, binarisation included; log p(x) is ``RenyiELBO(alpha=0)`` of one
image, mapped over images. Needs ``pip install "pyrovae[benchmarks]"``. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

LEARNING_RATE = 1e-3
Layers = list[tuple[np.ndarray, np.ndarray]]  # weights [in, out] and biases
Weights = tuple[Layers, Layers]  # of encoder and decoder
Programs = tuple[Callable[[Any], None], Callable[[Any], None]]


def weights(vae: Any) -> Weights:
    """Those of a dense VAE of ours, copied."""
    return weights_of({name: value.cpu().numpy().copy() for name, value in vae.state_dict().items()})


def weights_of(state: Mapping[str, np.ndarray]) -> Weights:
    """The same from the arrays of its state, by name."""

    def layers(network: str) -> Layers:
        names = [n.removesuffix(".weight") for n in state if n.startswith(network) and n.endswith(".weight")]
        return [(state[f"{n}.weight"].T.copy(), state[f"{n}.bias"]) for n in names]

    return layers("encoder"), layers("decoder")


def programs(start: Weights) -> Programs:
    """Model and guide of flat images ``[B, D]``."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    encoder, decoder = start
    dim = len(decoder[0][0])

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


def epochs(
    start: Weights, k: int, pixels: np.ndarray, batch: int, held_out: np.ndarray | None = None
) -> Iterator[tuple[float, float]]:
    """Train an epoch at each step: the mean loss in nats per image, and minus the loss on images held out."""
    import jax
    from numpyro import optim
    from numpyro.infer import SVI

    steps = len(pixels) // batch
    svi = SVI(*programs(start), optim.Adam(LEARNING_RATE), bound(k))

    def epoch(state: Any, key: Any, data: Any) -> tuple[Any, Any]:
        shuffle, noise = jax.random.split(key)
        order = jax.random.permutation(shuffle, len(data))[: steps * batch].reshape(steps, batch)

        def step(state: Any, index: Any) -> tuple[Any, Any]:
            grey = data[index[1]]
            bits = jax.random.bernoulli(index[0], grey).astype(grey.dtype)
            return svi.update(state, bits)

        state, losses = jax.lax.scan(step, state, (jax.random.split(noise, steps), order))
        return state, losses.mean() / batch

    compiled, evaluate = jax.jit(epoch, donate_argnums=0), jax.jit(svi.evaluate)
    data = jax.device_put(pixels)
    state = svi.init(jax.random.PRNGKey(0), data[:batch])
    for key in jax.random.split(jax.random.PRNGKey(1), 10_000):
        state, loss = compiled(state, key, data)
        yield float(loss), float("nan") if held_out is None else -float(evaluate(state, held_out)) / len(held_out)


def likelihoods(start: Weights, samples: int, together: bool) -> Callable[[np.ndarray], np.ndarray]:
    """log p(x) of each image, of one after the other or of all by vmap; compiled once for as many images."""
    import jax

    model, guide = programs(start)
    of = bound(samples)

    def one(key: Any, x: Any) -> Any:
        return -of.loss(key, {}, model, guide, x[None])

    mapped = jax.jit(jax.vmap(one) if together else lambda *all: jax.lax.map(lambda pair: one(*pair), all))

    def run(x: np.ndarray) -> np.ndarray:
        return np.asarray(mapped(jax.random.split(jax.random.PRNGKey(0), len(x)), x))

    return run
