"""A learned prior over the codes of a VQ-VAE: a pair whose data are grids of codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pyro
import torch
from torch import Tensor

from pyrovae.arguments import positive_int
from pyrovae.errors import DataError
from pyrovae.models.base import Pair
from pyrovae.parts.codes import AutoregressiveCodes, GatedConvolutions


class CodePrior(Pair):
    r"""The learned prior of a VQ-VAE: a model of its grids of codes, without latents.

    .. math:: p(k) = \prod_{i=1}^{h} \prod_{j=1}^{w} p(k_{ij} \mid k_{<ij})

    The guide is empty, so that the log-weight is :math:`\log p(k)`, exactly, and :class:`pyrovae.ELBO` maximises it:

        prior = CodePrior(vqvae.grid, vqvae.quantizer.num_codes)
        pv.fit(prior.model, prior.guide, vqvae.encode(x), objective=pv.ELBO(), epochs=20)
        vqvae.with_prior(prior)

    Shapes: Data is ``[B, h, w]``, integers or floats that hold integers; the plate ``"data"`` is at dim -1, with the
    site ``"x"`` of event ``[h, w]``. Nats throughout.

    :param input_shape: the grid, ``(h, w)``.
    :param num_codes: K, at least 2.
    :param channels: units of every layer; see :class:`GatedConvolutions`, also for the next two.
    :param num_layers: number of gated layers.
    :param kernel_size: an odd number, 3 at least.
    :raises TypeError, ValueError: at construction, for arguments that are out of range.
    :raises DataError: from the programs, for data of another shape.

    >>> prior = CodePrior((2, 2), 16, channels=8, num_layers=2)
    >>> codes = prior.distribution().tempered(0.8).sample((5,))
    >>> loss = pyro.infer.Trace_ELBO()(prior.initialise(codes).model, prior.guide)(codes)
    >>> codes.shape
    torch.Size([5, 2, 2])

    van den Oord et al., *Conditional image generation with PixelCNN decoders*, 2016; van den Oord, Vinyals and
    Kavukcuoglu, *Neural discrete representation learning*, 2017.
    """

    likelihood_is = "exact"

    def __init__(
        self, input_shape: Sequence[int], num_codes: int, channels: int = 64, num_layers: int = 6, kernel_size: int = 3
    ) -> None:
        super().__init__()
        grid = self.set_shape(input_shape)
        if len(grid) != 2:
            raise ValueError(f"input_shape must be a grid (height, width), got {grid}: pass the grid of the codes")
        self.num_codes = positive_int("num_codes", num_codes, minimum=2)
        self.network = GatedConvolutions(grid, self.num_codes, channels, num_layers, kernel_size)

    def model(self, x: Tensor) -> Tensor:
        """p(x) over the plate ``"data"``, with ``x`` observed."""
        self.check(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("x", self.distribution(), obs=x)

    def guide(self, x: Tensor) -> None:
        """Nothing: there is nothing to infer."""
        self.check(x)

    def distribution(self) -> AutoregressiveCodes:
        """p(x) of one grid."""
        return AutoregressiveCodes(self.network)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> CodePrior:
        """Start the logits at the frequencies of the codes in ``[N, h, w]``, each counted once more; returns itself."""
        self.check(x)
        if not self.distribution().support.check(x).all():
            raise DataError(f"codes must be integers among 0 ... {self.num_codes - 1}: pass what VQVAE.encode returns")
        counts = torch.bincount(x.flatten().long(), minlength=self.num_codes) + 1.0
        cast(Tensor, self.network.output.bias).copy_((counts / counts.sum()).log())
        return self
