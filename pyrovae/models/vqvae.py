"""The VQ-VAE: a grid of codes per image, each code a row of a learned codebook."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyrovae.engine.randomness import isolated_rng
from pyrovae.errors import DataError
from pyrovae.models.code_prior import CodePrior
from pyrovae.models.vae import OneLatent
from pyrovae.nn.residual import ResidualDecoder, ResidualEncoder, code_grid
from pyrovae.parts.codes import CodebookPrior
from pyrovae.parts.likelihoods import make_likelihood
from pyrovae.parts.quantizer import Quantized, VectorQuantizer

START = 16  # vectors per code that a start from the data chooses from, at most


class VQVAE(OneLatent):
    r"""Vector-quantised VAE: an image as a grid of codes, each a row of a learned codebook.

    .. math:: z_{ij} \sim U(e_1, \dots, e_K), \qquad x \mid z \sim p(x; f_\theta(z)), \qquad
              q_\phi(z \mid x) = \delta(z - \mathrm{VQ}(\mathrm{enc}_\phi(x)))

    In training mode the guide adds a factor ``"vq"``,

    .. math:: \sum_{ij} |\mathrm{sg}(z_e) - e|^2 + \beta |z_e - \mathrm{sg}(e)|^2,

    so that the plain :class:`pyrovae.ELBO` descends the paper's loss, reconstruction in nats (a kl_weight weighs the
    factor as well). In eval mode there is none, and the log-weight is :math:`\log p(x, z)` at the codes of x, a lower
    bound on :math:`\log p(x)` that more particles do not tighten: one sample measures it. ``free_bits``, the gradients
    "stl" and "dreg", RWS and TVO have no meaning for this guide, and are refused.

    Training keeps the prior uniform. Afterwards a :class:`CodePrior`, trained on the codes, takes its place
    (:meth:`with_prior`) for the bound in eval mode and for sampling.

    The networks are the paper's: convolutions of stride 2 (4x4), residual blocks, and their mirror image. Residual
    quantisation (``num_quantizers``) adds codes per position, uniform in the prior.

    Shapes: Data is ``[B, *input_shape]``; the plate ``"data"`` is at dim -1, with sites ``"z"`` of event
    ``[h, w, code_dim]`` and ``"x"`` of event ``input_shape``. Codes are integers ``[B, h, w]``, with several codebooks
    ``[B, num_quantizers, h, w]``. Nats throughout.

    :param input_shape: ``(channels, height, width)``, both sides multiples of ``2^num_downsamplings``.
    :param num_codes: K, rows of the codebook.
    :param code_dim: size of a row.
    :param channels: units of every hidden layer; the paper's 256 are slow without a GPU.
    :param likelihood: as for :class:`VAE`, with ``scale`` and ``levels``.
    :param residual_layers: residual blocks in encoder and decoder each.
    :param num_downsamplings: convolutions of stride 2; each halves the grid.
    :param commitment_weight: :math:`\beta`.
    :param ema_decay: moving averages in place of the codebook loss's gradient; see :class:`VectorQuantizer`.
    :param revive_below: moves codes that fall out of use onto data; see :class:`VectorQuantizer`.
    :param num_quantizers: number of codebooks.
    :param prior: the arguments of a :class:`CodePrior`, as :attr:`config` keeps them; None is uniform.
    :raises TypeError, ValueError: at construction, for arguments that are out of range, unknown or do not go together,
        and for images that the strides do not divide.
    :raises DataError: from the programs, for data of another shape.

    >>> vqvae = VQVAE((1, 8, 8), num_codes=16, code_dim=4, channels=8, ema_decay=0.99, revive_below=1.0)
    >>> x = torch.rand(20, 1, 8, 8).round()
    >>> loss = pyro.infer.Trace_ELBO()(vqvae.initialise(x).model, vqvae.guide)(x)
    >>> codes = vqvae.encode(x)
    >>> codes.shape, vqvae.decode(codes).shape
    (torch.Size([20, 2, 2]), torch.Size([20, 1, 8, 8]))

    van den Oord, Vinyals and Kavukcuoglu, *Neural discrete representation learning*, 2017.
    """

    likelihood_is = "bound"

    def __init__(
        self,
        input_shape: Sequence[int],
        num_codes: int = 512,
        code_dim: int = 64,
        channels: int = 256,
        likelihood: str = "bernoulli",
        scale: float | str = "learned",
        *,
        levels: int | None = None,
        residual_layers: int = 2,
        num_downsamplings: int = 2,
        commitment_weight: float = 0.25,
        ema_decay: float | None = None,
        revive_below: float | None = None,
        num_quantizers: int = 1,
        prior: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        shape = self.set_shape(input_shape)
        self.grid = code_grid(shape, num_downsamplings)
        self.observation = make_likelihood(likelihood, shape, scale, levels)
        self.quantizer = VectorQuantizer(
            num_codes, code_dim, commitment_weight, ema_decay, revive_below=revive_below, num_quantizers=num_quantizers
        )
        layers = (channels, residual_layers, num_downsamplings)
        self.encoder = ResidualEncoder(shape, code_dim, *layers)
        self.decoder = ResidualDecoder(code_dim, shape, *layers, heads=self.observation.outputs)
        self.code_prior: CodePrior | None = None
        if prior is not None:
            self.with_prior(CodePrior(**prior))

    def guide(self, x: Tensor) -> Tensor:
        """The codebook's rows for x over the plate ``"data"``; in training mode with the factor ``"vq"``."""
        self.check(x)
        with pyro.plate("data", len(x)):
            found: Quantized = self.quantizer(self.vectors(x))
            if self.training:
                pyro.factor("vq", self.quantizer.loss(found).sum((-2, -1)), has_rsample=True)
            return pyro.sample("z", dist.Delta(found.z_q, event_dim=3))

    def prior(self, like: Tensor | None = None) -> CodebookPrior:
        """p(z): uniform in training mode, the learned prior, where there is one, in eval mode."""
        learned = None if self.training or self.code_prior is None else self.code_prior.distribution()
        return CodebookPrior(self.quantizer, self.grid, learned)

    def likelihood(self, z: Tensor) -> TorchDistribution:  # type: ignore[override]
        """p(x | z) of vectors ``[..., h, w, code_dim]``."""
        return self.observation.distribution(self.decoder(z.movedim(-1, -3)))

    def vectors(self, x: Tensor) -> Tensor:
        """The encoder's output before it is quantised, ``[..., *input_shape]`` to ``[..., h, w, code_dim]``."""
        return self.encoder(x).movedim(-3, -1)

    def encode(self, x: Tensor) -> Tensor:
        """The codes, ``[..., *input_shape]`` to integers ``[..., h, w]``, or ``[..., num_quantizers, h, w]``."""
        codes = self.quantizer.encode(self.vectors(x))
        return codes.movedim(-1, -3) if self.quantizer.num_quantizers > 1 else codes

    def decode(self, z: Tensor) -> Tensor:
        """The likelihood's mean of codes as :meth:`encode` gives them, to ``[..., *input_shape]``."""
        number, several = self.quantizer.num_codes, self.quantizer.num_quantizers > 1
        wanted = (self.quantizer.num_quantizers, *self.grid) if several else self.grid
        if z.is_floating_point() or z.shape[-len(wanted) :] != wanted:
            raise DataError(
                f"codes must be integers [..., {', '.join(map(str, wanted))}], got {z.dtype} of shape "
                f"{tuple(z.shape)}: pass what encode returns"
            )
        known = z.numel() and not torch.compiler.is_exporting()
        if known and not 0 <= int(z.min()) <= int(z.max()) < number:
            raise DataError(f"codes must be among 0 ... {number - 1}, got {int(z.min())} to {int(z.max())}: pass such")
        return self.likelihood(self.quantizer.lookup(z.movedim(-3, -1) if several else z)).mean

    def interpolate(self, a: Tensor, b: Tensor, *labels: Any, **where: Any) -> Tensor:
        """Refused: between two codes there is nothing."""
        self.refuse("interpolate", "its codes are names of rows, and between two names lies nothing")

    def traverse(self, x: Tensor, *labels: Any, **where: Any) -> Tensor:
        """Refused: a code has no neighbours to move to."""
        self.refuse("traverse", "its codes are names of rows, which have no order to move along")

    def with_prior(self, prior: CodePrior) -> VQVAE:
        """Let a learned prior take the uniform one's place in eval mode; returns the model itself.

        :raises ValueError: the prior is of another grid or number of codes, or there are several codebooks, whose sum
            does not say which rows it is made of.
        """
        if self.quantizer.num_quantizers > 1:
            raise ValueError(
                f"a learned prior needs one codebook, got num_quantizers={self.quantizer.num_quantizers}: the codes "
                "behind a sum of rows are not determined; keep the uniform prior, or pass num_quantizers=1"
            )
        wanted, given = (self.grid, self.quantizer.num_codes), (prior.input_shape, prior.num_codes)
        if wanted != given:
            raise ValueError(
                f"the prior must be over grids {wanted[0]} of {wanted[1]} codes, got {given[0]} of {given[1]}: "
                f"make it CodePrior({wanted[0]}, {wanted[1]})"
            )
        self.code_prior = prior
        self.config = self.config | {"prior": prior.config}
        return self

    @torch.no_grad()
    def initialise(self, x: Tensor) -> VQVAE:
        """Start the decoder's output bias at the mean of the data, and the codebook at vectors of some of them.

        The choice depends on the data and the weights alone.
        """
        super().initialise(x)
        number = min(len(x), -(-START * self.quantizer.num_codes // math.prod(self.grid)))
        some = x[torch.linspace(0, len(x) - 1, number, device=x.device).long()]
        with isolated_rng(0):
            self.quantizer.initialise(self.vectors(some))
        return self

    @torch.no_grad()
    def metrics(self, x: Tensor) -> dict[str, object]:
        """``perplexity``: of the codes of x (of each codebook); K at most, where all are used alike."""
        return {"perplexity": self.quantizer.perplexity(self.quantizer.encode(self.vectors(x))).tolist()}
