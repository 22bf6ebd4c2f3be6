"""Vector quantisation: every vector becomes the nearest row of a learned codebook."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from pyrovae.arguments import in_range, positive_int

_SMOOTHING = 1e-5  # Laplace's, of the moving counts


# Distances computed at one time: what a CPU's cache holds; on a GPU, what its memory does not notice.
_DISTANCES = {"cpu": 2**19, "cuda": 2**26}


class Quantized(NamedTuple):
    r"""What a :class:`VectorQuantizer` makes of vectors ``[..., code_dim]``.

    .. math:: \text{codebook loss} = |\mathrm{sg}(z_e) - e|^2, \qquad \text{commitment loss} = |z_e - \mathrm{sg}(e)|^2

    with sg the stop-gradient: one moves the codebook's row :math:`e`, the other the vector. Both are summed over
    ``code_dim`` (and over codebooks), without the commitment weight.

    :ivar z_q: the rows themselves, ``[..., code_dim]``; gradients pass straight through to :math:`z_e`.
    :ivar codes: their numbers, int64 ``[...]``; of several codebooks ``[..., num_quantizers]``.
    :ivar codebook_loss: mean over all vectors, 0-d.
    :ivar commitment_loss: mean over all vectors, 0-d.
    :ivar perplexity: exp of the entropy of the codes' frequencies, 0-d; of several codebooks ``[num_quantizers]``.
    :ivar codebook_losses: per vector, ``[...]``.
    :ivar commitment_losses: per vector, ``[...]``.
    """

    z_q: Tensor
    codes: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    perplexity: Tensor
    codebook_losses: Tensor
    commitment_losses: Tensor


class VectorQuantizer(nn.Module):
    r"""Replaces every vector by the nearest row of a codebook.

    .. math:: k = \arg\min_j |z_e - e_j|^2, \qquad z_q = z_e + \mathrm{sg}(e_k - z_e)

    The codebook is a parameter that the codebook loss moves; or, with ``ema_decay`` :math:`\gamma`, a buffer that
    follows the vectors by moving averages in training mode, with :math:`n_k` and :math:`s_k` the count and the sum of
    the vectors at code k in the batch:

    .. math:: N_k \leftarrow \gamma N_k + (1 - \gamma) n_k, \quad m_k \leftarrow \gamma m_k + (1 - \gamma) s_k, \quad
              e_k = m_k \Big/ \frac{N_k + \epsilon}{\sum_j N_j + K \epsilon} \sum\nolimits_j N_j

    Evaluation never moves it. Rows start uniform in :math:`\pm 1 / K`, every :math:`N_k` at 1. The arithmetic is
    float32 at least, also under autocast; float64 stays float64.

    Shapes: vectors ``[..., code_dim]`` to a :class:`Quantized`. With several codebooks (residual quantisation) each
    quantises what the ones before left over, and :math:`z_q` is the sum of their rows.

    :param num_codes: K, at least 2.
    :param code_dim: size of the vectors.
    :param commitment_weight: of the commitment loss beside the codebook loss, for :meth:`loss`; 0.1 to 2 all work.
    :param ema_decay: :math:`\gamma`, usually 0.99; None makes the codebook a parameter.
    :param revive_below: with ``ema_decay``, put a code whose :math:`N_k` falls below this onto a random vector of the
        batch, its averages with it; usually 1 or 2, well below vectors per batch / K.
    :param num_quantizers: number of codebooks.
    :ivar codebook: ``[num_codes, code_dim]``; with several ``[num_quantizers, num_codes, code_dim]``.
    :raises ValueError: for arguments out of range, and for ``revive_below`` without ``ema_decay``.

    >>> quantizer = VectorQuantizer(512, 64)
    >>> found = quantizer(torch.randn(20, 7, 7, 64))
    >>> found.codes.shape, torch.equal(found.z_q, quantizer.lookup(found.codes))
    (torch.Size([20, 7, 7]), True)

    van den Oord, Vinyals and Kavukcuoglu, *Neural discrete representation learning*, 2017; Zeghidour et al.,
    *SoundStream*, 2021 (residual quantisation); Dhariwal et al., *Jukebox*, 2020 (codes revived).
    """

    codebook: Tensor
    ema_count: Tensor
    ema_sum: Tensor

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        commitment_weight: float = 0.25,
        ema_decay: float | None = None,
        *,
        revive_below: float | None = None,
        num_quantizers: int = 1,
    ) -> None:
        super().__init__()
        self.num_codes = positive_int("num_codes", num_codes, minimum=2)
        self.code_dim = positive_int("code_dim", code_dim)
        self.num_quantizers = positive_int("num_quantizers", num_quantizers)
        self.commitment_weight = in_range("commitment_weight", commitment_weight, 0.0)
        self.ema_decay = None if ema_decay is None else in_range("ema_decay", ema_decay, 0.0, 1.0)
        self.revive_below = None if revive_below is None else in_range("revive_below", revive_below, 0.0)
        if revive_below is not None and ema_decay is None:
            raise ValueError(f"revive_below={revive_below} needs the moving counts: pass ema_decay, such as 0.99")
        several = (num_quantizers,) if num_quantizers > 1 else ()
        start = torch.empty(*several, num_codes, code_dim).uniform_(-1 / num_codes, 1 / num_codes)
        if ema_decay is None:
            self.codebook = nn.Parameter(start)
        else:
            self.register_buffer("codebook", start)
            self.register_buffer("ema_count", torch.ones(*several, num_codes))
            self.register_buffer("ema_sum", start.clone())

    def forward(self, z_e: Tensor) -> Quantized:
        leading = z_e.shape[:-1]
        codebook_losses: Any = 0.0
        commitment_losses: Any = 0.0
        rows: Any = 0.0
        codes, counts = [], []
        with _full_precision(z_e):
            start = residual = self._flat(z_e)
            for i, codebook in enumerate(self._codebooks(residual.dtype)):
                vectors = residual.detach()
                nearest = _nearest(vectors, codebook.detach())
                row = embedding(nearest, codebook)
                residual = residual - row.detach()
                codebook_losses = codebook_losses + (row - vectors).square().sum(-1)
                commitment_losses = commitment_losses + residual.square().sum(-1)
                rows = rows + row.detach()
                codes.append(nearest)
                counts.append(vectors.new_zeros(self.num_codes).index_add_(0, nearest, vectors.new_ones(len(vectors))))
                if self.training and self.ema_decay is not None:
                    self._follow(i, vectors, nearest, counts[-1])
            z_q = rows + (start - start.detach())
            return Quantized(
                z_q.view(*leading, self.code_dim),
                self._together(codes, -1).view(*leading, *self._several),
                codebook_losses.mean(),
                commitment_losses.mean(),
                self._together([_perplexity(count) for count in counts], 0),
                codebook_losses.view(leading),
                commitment_losses.view(leading),
            )

    def loss(self, found: Quantized) -> Tensor:
        """Codebook loss + commitment_weight * commitment loss of each vector, ``[...]``."""
        return found.codebook_losses + self.commitment_weight * found.commitment_losses

    @torch.no_grad()
    def encode(self, z_e: Tensor) -> Tensor:
        """The codes of vectors ``[..., code_dim]``, as of :class:`Quantized`; the codebook stays where it is."""
        with _full_precision(z_e):
            residual = self._flat(z_e)
            codes = []
            for codebook in self._codebooks(residual.dtype):
                codes.append(_nearest(residual, codebook))
                residual = residual - embedding(codes[-1], codebook)
            return self._together(codes, -1).view(*z_e.shape[:-1], *self._several)

    def lookup(self, codes: Tensor) -> Tensor:
        """The vectors that codes stand for, ``[..., code_dim]``."""
        if self.num_quantizers == 1:
            return embedding(codes, self.codebook)
        rows: Any = 0.0
        for code, codebook in zip(codes.unbind(-1), self.codebook, strict=True):
            rows = rows + embedding(code, codebook)
        return rows

    def perplexity(self, codes: Tensor) -> Tensor:
        """exp of the entropy of the codes' frequencies, as of :class:`Quantized`."""
        columns = codes.reshape(-1, self.num_quantizers).unbind(-1)
        return self._together([_perplexity(torch.bincount(c, minlength=self.num_codes).double()) for c in columns], 0)

    @torch.no_grad()
    def initialise(self, z_e: Tensor) -> VectorQuantizer:
        """Start every codebook at some of the vectors ``[..., code_dim]``, far from one another; returns itself.

        The first is drawn at random, each further one with probability proportional to its squared distance from the
        nearest so far (Arthur and Vassilvitskii, *k-means++*, 2007). Codes without a vector to start at stay as they
        are.
        """
        residual = self._flat(z_e).to(self.codebook.dtype)
        number = min(self.num_codes, len(residual))
        everywhere = torch.ones(self.num_codes, dtype=torch.bool, device=residual.device)
        for i, codebook in enumerate(self._codebooks(residual.dtype)):
            self._place(i, everywhere, torch.cat([_spread(residual, number), codebook[number:]]), 1.0)
            residual = residual - embedding(_nearest(residual, codebook), codebook)
        return self

    def extra_repr(self) -> str:
        options = {"ema_decay": self.ema_decay, "revive_below": self.revive_below}
        shown = "".join(f", {name}={value}" for name, value in options.items() if value is not None)
        several = f", num_quantizers={self.num_quantizers}" if self._several else ""
        return f"{self.num_codes}, {self.code_dim}, commitment_weight={self.commitment_weight}{shown}{several}"

    # --- the parts ---------------------------------------------------------------------------------------------------

    @property
    def _several(self) -> tuple[int, ...]:
        return (self.num_quantizers,) if self.num_quantizers > 1 else ()

    def _together(self, each: list[Tensor], dim: int) -> Tensor:
        """One tensor of what there is for each codebook: an axis more where there are several."""
        return torch.stack(each, dim) if self._several else each[0]

    def _flat(self, z_e: Tensor) -> Tensor:
        """The vectors ``[n, code_dim]``, in the precision to work in."""
        if z_e.shape[-1:] != (self.code_dim,):
            raise ValueError(
                f"vectors must be [..., code_dim] with code_dim={self.code_dim}, got {tuple(z_e.shape)}: "
                "move the channels last, or give the quantizer their size"
            )
        wide = torch.promote_types(torch.promote_types(z_e.dtype, self.codebook.dtype), torch.float32)
        return z_e.reshape(-1, self.code_dim).to(wide)

    def _codebooks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The codebooks, each ``[num_codes, code_dim]``."""
        yield from self.codebook.to(dtype).unbind() if self._several else (self.codebook.to(dtype),)

    @torch.no_grad()
    def _follow(self, i: int, vectors: Tensor, codes: Tensor, count: Tensor) -> None:
        """Move codebook i towards the vectors at its codes, all in place."""
        codebook, ema_count, ema_sum = self._averages(i)
        sums = torch.zeros_like(ema_sum).index_add_(0, codes, vectors.to(ema_sum.dtype))
        weight = 1 - self.ema_decay  # type: ignore[operator]
        ema_count.lerp_(count.to(ema_count.dtype), weight)
        ema_sum.lerp_(sums, weight)
        total = ema_count.sum()
        smooth = (ema_count + _SMOOTHING) / (total + self.num_codes * _SMOOTHING) * total
        codebook.copy_(ema_sum / smooth.unsqueeze(-1))
        if self.revive_below is not None:
            drawn = torch.randint(len(vectors), (self.num_codes,), device=vectors.device)
            self._place(i, ema_count < self.revive_below, vectors[drawn].to(codebook.dtype), self.revive_below)

    def _averages(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        held = (self.codebook, self.ema_count, self.ema_sum)
        return (held[0][i], held[1][i], held[2][i]) if self._several else held

    def _place(self, i: int, which: Tensor, rows: Tensor, count: float) -> None:
        """Put the codes ``which`` of codebook i onto ``rows``, as if ``count`` vectors lay at each."""
        if self.ema_decay is None:
            (self.codebook[i] if self._several else self.codebook).copy_(rows)
            return
        codebook, ema_count, ema_sum = self._averages(i)
        chosen = which.unsqueeze(-1)
        codebook.copy_(torch.where(chosen, rows, codebook))
        ema_sum.copy_(torch.where(chosen, count * rows, ema_sum))
        ema_count.copy_(torch.where(which, count, ema_count))


def _full_precision(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)


def _nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The number of the nearest row of ``codebook`` for each of ``vectors`` ``[n, code_dim]``.

    |z|^2 is the same for every row, so that |e|^2 - 2 z e decides, one matrix product.
    """
    norms = codebook.square().sum(-1)
    rows = max(1, _DISTANCES.get(vectors.device.type, _DISTANCES["cpu"]) // len(codebook))
    parts = (torch.addmm(norms, some, codebook.T, alpha=-2).min(-1).indices for some in vectors.split(rows))
    return torch.cat(list(parts))


def _perplexity(count: Tensor) -> Tensor:
    share = count / count.sum()
    return torch.xlogy(share, share).sum().neg().exp()


def _spread(vectors: Tensor, number: int) -> Tensor:
    """Some of ``vectors`` far from one another, as k-means++ chooses them."""
    chosen = [vectors[torch.randint(len(vectors), ())]]
    distance = (vectors - chosen[0]).square().sum(-1)
    for _ in range(number - 1):
        chosen.append(vectors[(distance / torch.empty_like(distance).exponential_()).argmax()])
        distance = torch.minimum(distance, (vectors - chosen[-1]).square().sum(-1))
    return torch.stack(chosen)
