"""One stochastic layer, two, and the ladder: what each layer does.

    python examples/hierarchical.py [--data mnist] [--epochs 100] [--particles 1] [--warmup 20] [--samples 1000]

On the embedded digits by default. Prints, for each pair, the test log-likelihood, the KL of every layer, and its
active units by both definitions: (a) variance over data of the unit's mean at one draw of the layer before, as the IWAE
paper's code has it; (b) of that mean averaged over the layer before, as the paper writes it.
"""

import head
import torch

import pyrovae as pv


def pairs(shape, units):
    """One layer, two layers bottom-up, and the same two with a guide that comes down the generative path."""
    wide = 4 * units
    two = {"latent_dims": (2 * units, units), "hidden": ((wide, wide), (2 * units, 2 * units))}
    yield "one layer", lambda: pv.models.VAE(shape, latent_dim=units, hidden=(wide, wide))
    yield "two layers, bottom-up", lambda: pv.models.HierarchicalVAE(shape, **two)
    yield "two layers, ladder", lambda: pv.models.HierarchicalVAE(shape, **two, guide="top_down")


def describe(pair, test, history, samples):
    estimate = pv.log_likelihood(pair.model, pair.guide, test, num_samples=samples, seed=0)
    one_draw, averaged = (pv.active_units(pair.guide, test, samples=draws) for draws in (1, 64))
    print(f"  {estimate}")
    for site, kl in sorted(history[-1]["kl_per_unit"].items()):
        active = f"{one_draw[site].count} (a), {averaged[site].count} (b) of {len(kl)}"
        print(f"  {site}: KL {sum(kl):.2f} nats, active units {active}")


def main():
    options = head.options(
        __doc__,
        data="digits",
        units=(int, "latents of the highest layer: 50 in the paper, 10 for the digits"),
        epochs=100,
        particles=1,
        warmup=20.0,
        samples=1000,
    )
    data = head.load(options, binarization="dynamic")
    units = options.units or (10 if options.data == "digits" else 50)
    for name, make in pairs(data.train.event_shape, units):
        torch.manual_seed(0)
        pair = make().initialise(data.train.x)
        fitted = pv.fit(
            pair.model, pair.guide, data.train, objective=pv.IWAE(options.particles), epochs=options.epochs,
            kl_warmup=min(options.warmup, options.epochs / 2),
        )  # fmt: skip
        print(f"{name}, {sum(p.numel() for p in pair.parameters()):,} parameters")
        describe(pair, data.test, fitted.history, options.samples)


if __name__ == "__main__":
    main()
