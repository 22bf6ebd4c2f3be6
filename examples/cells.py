"""The cells of the tables: which network is trained on which bound, and how its particles grow."""

from dataclasses import dataclass, replace

import pyrovae as pv

#: What a variant of a network changes in it; several are joined by "+".
VARIANTS = {
    "plain": {}, "vamp": {"prior": "vamp"}, "full": {"posterior": "full"}, "flow": {"posterior": "flow"},
    "iaf": {"posterior": "iaf"}, "ladder": {"guide": "top_down"},
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One figure of a table: a network and its objective."""

    table: str
    layers: int
    objective: str
    particles: int
    groups: int = 1
    gradient: str = "total"
    beta: float | None = None
    continues: "Cell | None" = None  # from whose network it starts
    variant: str | None = None  # of the network, in table D
    growth: str | None = None  # of the particles, in table D: "6x1,3x5" is 1 in six parts of the epochs, 5 in three

    def __str__(self):
        return f"{self.layers} layer{'s'[: self.layers - 1]}, {self.stages}"

    @property
    def stages(self):
        """What it is trained on, in words."""
        before = f"{self.continues.stages}, then " if self.continues else ""
        beta = "" if self.beta is None else f"({self.beta})"
        groups = f"{self.groups} x " if self.groups > 1 else ""
        k = f"{groups}{self.particles}" if self.growing is None else f"{self.growing[0]} to {self.growing[-1]}"
        own = [f"{before}{self.objective}{beta}, k = {k}"]
        if self.variant is not None:
            own += [self.gradient] * (self.gradient != "total") + [self.variant] * (self.variant != "plain")
        return ", ".join(own)

    @property
    def growing(self):
        """The numbers of particles of equal parts of the epochs; None where there is one number."""
        if self.growth in (None, "fixed"):
            return None
        parts = (map(int, part.split("x")) for part in self.growth.split(","))
        return tuple(k for times, k in parts for _ in range(times))

    def network(self, shape):
        """The paper's network, or a variant of it."""
        own = {key: value for name in (self.variant or "plain").split("+") for key, value in VARIANTS[name].items()}
        return (pv.models.VAE if self.layers == 1 else pv.models.HierarchicalVAE)(shape, **own)

    def bound(self):
        """What it is trained on."""
        make = pv.ELBO if self.objective == "VAE" else getattr(pv, self.objective)
        own = {"num_groups": self.groups} if self.groups > 1 else {} if self.beta is None else {"beta": self.beta}
        return make(num_particles=self.particles, gradient=self.gradient, **own)

    def with_gradient(self, gradient):
        """The same cell with another gradient, but for the VAE's part in it, and for table D, which has its own."""
        if self.variant is not None:
            return self
        first = self.continues and self.continues.with_gradient(gradient)
        return replace(self, continues=first, gradient=self.gradient if self.objective == "VAE" else gradient)


SLOW, STEEP = "6x1,11x5,3x20", "8x1,8x5,2x20,1x50"


def beyond(layers, objective, particles, gradient="total", variant="plain", growth="fixed"):
    """A cell of table D."""
    return Cell("D", layers, objective, particles, gradient=gradient, variant=variant, growth=growth)


BOUNDS = [("VAE", 1), ("VAE", 5), ("VAE", 50), ("IWAE", 5), ("IWAE", 50)]  # IWAE with k = 1 is the VAE
TABLES = {
    "a": [Cell("A", layers, objective, k) for layers in (1, 2) for objective, k in BOUNDS],
    "b": [
        Cell("B", 1, "IWAE", 50, continues=Cell("A", 1, "VAE", 1)),
        Cell("B", 1, "VAE", 1, continues=Cell("A", 1, "IWAE", 50)),
    ],
    "c": [
        Cell("C", 1, "IWAE", 64),
        *(Cell("C", 1, objective, 64 // m, groups=m) for objective in ("PIWAE", "MIWAE") for m in (4, 8)),
        *(Cell("C", 1, "CIWAE", 64, beta=beta) for beta in (0.05, 0.5)),
        Cell("C", 1, "VAE", 64),
    ],
    "d": [
        *(beyond(layers, *bound) for layers in (1, 2) for bound in [("VAE", 1), ("IWAE", 5), ("IWAE", 50)]),
        *(beyond(layers, "IWAE", 50, gradient) for layers in (1, 2) for gradient in ("dreg", "stl")),
        *(beyond(layers, "IWAE", 20, "dreg", growth=SLOW) for layers in (1, 2)),
        *(beyond(layers, "IWAE", 50, "dreg", growth=STEEP) for layers in (1, 2)),
        *(beyond(1, "VAE", 1, variant=variant) for variant in ("vamp", "full", "flow", "iaf")),
        *(beyond(1, "IWAE", 20, "dreg", variant, SLOW) for variant in ("vamp", "flow", "flow+vamp")),
        *(beyond(2, "VAE", 1, variant=variant) for variant in ("vamp", "flow", "ladder")),
        *(beyond(2, "IWAE", 20, "dreg", variant, SLOW) for variant in ("vamp", "ladder", "ladder+vamp")),
    ],
}
SELECTORS = {
    "layers": int, "objective": str, "groups": int, "particles": int, "beta": float, "variant": str, "growth": str,
}  # fmt: skip
