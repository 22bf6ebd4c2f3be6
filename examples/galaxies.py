"""Published evidences, found again: mixtures of normals for the velocities of 82 galaxies.

    python examples/galaxies.py [--epochs 600] [--samples 20000] [--components 2 3]

How many clusters do the velocities show? Chib (1995) answered by the evidence p(x) of mixtures under one prior, and his
figures became a test of methods when Neal (1999) found some of them wrong, by log 3! and more: he averaged the
likelihood over 100 million draws from the prior. Here the component of every galaxy is summed out of the Pyro program,
a normal guide is fitted to weights, means and variances, and importance sampling measures the evidence. The guide
covers one of the K! orders of the components, which have equal shares of p(x) where they are as far apart as here:
log K! is added.

Chib, S. (1995), *Marginal likelihood from the Gibbs output*. Neal, R. M. (1999), *Erroneous results in "Marginal
likelihood from the Gibbs output"*.
"""

import math
from functools import partial

import head
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value
from pyro.ops.indexing import Vindex

import pyrovae as pv

VELOCITIES = """
    9.172 9.350 9.483 9.558 9.775 10.227 10.406 16.084 16.170 18.419 18.552 18.600 18.927 19.052 19.070 19.330 19.343
    19.349 19.440 19.473 19.529 19.541 19.547 19.663 19.846 19.856 19.863 19.914 19.918 19.973 19.989 20.166 20.175
    20.179 20.196 20.215 20.221 20.415 20.629 20.795 20.821 20.846 20.875 20.986 21.137 21.492 21.701 21.814 21.921
    21.960 22.185 22.209 22.242 22.249 22.314 22.374 22.495 22.746 22.747 22.888 22.914 23.206 23.241 23.263 23.484
    23.538 23.542 23.666 23.706 23.711 24.129 24.285 24.289 24.366 24.717 24.990 25.633 26.960 26.995 32.065 32.789
    34.279
"""  # thousands of km/s, Corona Borealis region: Postman, Huchra, Geller (1986), as Roeder (1990) gives them
NEAL = {(2, "one"): (-239.764, 0.005), (3, "one"): (-226.803, 0.040), (3, "each"): (-226.791, 0.089)}
SEEN = {2: {"weights": (0.1, 0.9), "means": (9.7, 21.9)}, 3: {"weights": (0.1, 0.85, 0.05), "means": (9.7, 21.4, 33.0)}}


def mixture(components, variances):
    """K normal clusters with one variance or each its own: Chib's prior, the clusters of the galaxies summed out."""
    number = 1 if variances == "one" else components

    def model(x):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(components)))
        means = pyro.sample("means", dist.Normal(20.0, 10.0).expand([components]).to_event(1))
        spread = pyro.sample("variances", dist.InverseGamma(3.0, 20.0).expand([number]).to_event(1))
        scales = spread.sqrt().expand(means.shape)
        with pyro.plate("galaxies", len(x)):
            c = pyro.sample("cluster", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(Vindex(means)[..., c], Vindex(scales)[..., c]), obs=x)

    seen = {name: torch.tensor(values) for name, values in SEEN[components].items()}
    return model, seen | {"variances": torch.full((number,), 4.0)}


def main():
    options = head.options(
        __doc__, epochs=600, samples=20_000,
        components={"nargs": "+", "type": int, "default": [2, 3], "choices": [2, 3], "help": "mixtures of how many"},
    )  # fmt: skip
    x = torch.tensor([float(word) for word in VELOCITIES.split()])
    print("components  variances      log p(x)      published       off by     ESS")
    for (components, variances), (published, error) in NEAL.items():
        if components not in options.components:
            continue
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, values = mixture(components, variances)
        guide = AutoMultivariateNormal(
            pyro.poutine.block(model, hide=["cluster"]), init_loc_fn=init_to_value(values=values), init_scale=0.1
        )
        pv.fit(
            model, guide, (x,), objective=pv.ELBO(16), epochs=options.epochs,
            optimizer=partial(torch.optim.Adam, lr=0.02), schedule="linear",
        )  # fmt: skip
        found = pv.log_likelihood(model, guide, x, num_samples=options.samples, seed=0)
        evidence = found.log_prob.item() + math.lgamma(components + 1)
        ours, theirs = f"{evidence:.3f} ± {found.nll_std_error:.3f}", f"{published:.3f} ± {error:.3f}"
        print(f"{components:10}  {variances:9}  {ours}  {theirs}  {evidence - published:+.3f}  {found.ess:6.0f}")


if __name__ == "__main__":
    main()
