"""Vector quantisation: every vector becomes the nearest row of a learned codebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from pyrovae.arguments import in_range, positive_int

SMOOTHING = 1e-5  # Laplace's, of the moving counts
# Distances computed at one time: what a CPU's cache holds; on a GPU, what its memory does not notice.
DISTANCES = {"cpu": 2**19, "cuda": 2**26}


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
        with torch.autocast(z_e.device.type, enabled=False):
            start = left = self.flat(z_e)
            each = []
            for codebook in self.codebooks():
                each.append(self.quantise(left, codebook))
                left = each[-1][1]
            rows, _, numbers, codebook_losses, commitment_losses, perplexities = zip(*each, strict=True)
            z_q, codes, leading = summed(rows) + (start - start.detach()), stacked(numbers, -1), z_e.shape[:-1]
            codebook_loss, commitment_loss = summed(codebook_losses), summed(commitment_losses)
            return Quantized(
                z_q.view(*leading, self.code_dim), codes.view(*leading, *codes.shape[1:]), codebook_loss.mean(),
                commitment_loss.mean(), stacked(perplexities, 0), codebook_loss.view(leading),
                commitment_loss.view(leading),
            )  # fmt: skip

    def quantise(self, vectors: Tensor, codebook: Codebook) -> tuple[Tensor, ...]:
        """Nearest rows, what is left, codes, both losses, perplexity; in training its averages move on."""
        fixed, rows = vectors.detach(), codebook.rows.to(vectors.dtype)
        codes = nearest(fixed, rows.detach())
        row = embedding(codes, rows)
        count = fixed.new_zeros(self.num_codes).index_add_(0, codes, fixed.new_ones(len(fixed)))
        if self.training and self.ema_decay is not None:
            codebook.update(fixed, codes, count, self.ema_decay, self.revive_below)
        left = vectors - row.detach()
        losses = (row - fixed).square().sum(-1), left.square().sum(-1)
        return row.detach(), left, codes, *losses, perplexity_of(count)

    def loss(self, found: Quantized) -> Tensor:
        """Codebook loss + commitment_weight * commitment loss of each vector, ``[...]``."""
        return found.codebook_losses + self.commitment_weight * found.commitment_losses

    @torch.no_grad()
    def encode(self, z_e: Tensor) -> Tensor:
        """The codes of vectors ``[..., code_dim]``, as of :class:`Quantized`; the codebook stays where it is."""
        with torch.autocast(z_e.device.type, enabled=False):
            left = self.flat(z_e)
            each = []
            for codebook in self.codebooks():
                rows = codebook.rows.to(left.dtype)
                each.append(nearest(left, rows))
                left = left - embedding(each[-1], rows)
            codes = stacked(each, -1)
            return codes.view(*z_e.shape[:-1], *codes.shape[1:])

    def lookup(self, codes: Tensor) -> Tensor:
        """The vectors that codes stand for, ``[..., code_dim]``."""
        if self.num_quantizers == 1:
            return embedding(codes, self.codebook)
        return summed([embedding(code, rows) for code, rows in zip(codes.unbind(-1), self.codebook, strict=True)])

    def perplexity(self, codes: Tensor) -> Tensor:
        """exp of the entropy of the codes' frequencies, as of :class:`Quantized`."""
        columns = codes.reshape(-1, self.num_quantizers).unbind(-1)
        counts = [torch.bincount(column, minlength=self.num_codes).double() for column in columns]
        return stacked([perplexity_of(count) for count in counts], 0)

    @torch.no_grad()
    def initialise(self, z_e: Tensor) -> VectorQuantizer:
        """Start every codebook at some of the vectors ``[..., code_dim]``, far from one another; returns itself.

        The first is drawn at random, each further one with probability proportional to its squared distance from the
        nearest so far (Arthur and Vassilvitskii, *k-means++*, 2007). Codes without a vector to start at stay as they
        are.
        """
        left = self.flat(z_e).to(self.codebook.dtype)
        number = min(self.num_codes, len(left))
        everywhere = torch.ones(self.num_codes, dtype=torch.bool, device=left.device)
        for codebook in self.codebooks():
            codebook.place(everywhere, torch.cat([kmeans_plus_plus(left, number), codebook.rows[number:]]), 1.0)
            left = left - embedding(nearest(left, codebook.rows), codebook.rows)
        return self

    def extra_repr(self) -> str:
        options = {"ema_decay": self.ema_decay, "revive_below": self.revive_below}
        shown = "".join(f", {name}={value}" for name, value in options.items() if value is not None)
        several = f", num_quantizers={self.num_quantizers}" if self.num_quantizers > 1 else ""
        return f"{self.num_codes}, {self.code_dim}, commitment_weight={self.commitment_weight}{shown}{several}"

    def flat(self, z_e: Tensor) -> Tensor:
        """The vectors ``[n, code_dim]``, in the precision to work in."""
        if z_e.shape[-1:] != (self.code_dim,):
            raise ValueError(
                f"vectors must be [..., code_dim] with code_dim={self.code_dim}, got {tuple(z_e.shape)}: "
                "move the channels last, or give the quantizer their size"
            )
        wide = torch.promote_types(torch.promote_types(z_e.dtype, self.codebook.dtype), torch.float32)
        return z_e.reshape(-1, self.code_dim).to(wide)

    def averages(self) -> list[tuple[Tensor, float]]:
        """The moving averages of sums over data, and the share of its former value that each keeps at a step."""
        moves = self.training and self.ema_decay is not None
        return [(self.ema_count, self.ema_decay), (self.ema_sum, self.ema_decay)] if moves else []  # type: ignore[list-item]

    def settle(self) -> None:
        """Let the codebooks follow averages that were changed from outside."""
        for codebook in self.codebooks() if self.averages() else ():
            codebook.settle()

    def codebooks(self) -> list[Codebook]:
        """One, or several that quantise what the ones before left over."""
        held = [self.codebook] if self.ema_decay is None else [self.codebook, self.ema_count, self.ema_sum]
        if self.num_quantizers == 1:
            return [Codebook(*held)]
        return [Codebook(*(tensor[i] for tensor in held)) for i in range(self.num_quantizers)]


class Codebook(NamedTuple):
    """One codebook: its rows ``[num_codes, code_dim]``, and the moving averages that they follow, where they do.

    :ivar counts: moving counts of the vectors at each row, ``[num_codes]``.
    :ivar sums: moving sums of the vectors at each row, ``[num_codes, code_dim]``.
    """

    rows: Tensor
    counts: Tensor | None = None
    sums: Tensor | None = None

    @torch.no_grad()
    def update(self, vectors: Tensor, codes: Tensor, count: Tensor, decay: float, revive_below: float | None) -> None:
        """Move the rows towards the vectors at them, and those that fell out of use onto some; all in place."""
        assert self.counts is not None
        assert self.sums is not None
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors.to(self.sums.dtype))
        self.counts.lerp_(count.to(self.counts.dtype), 1 - decay)
        self.sums.lerp_(sums, 1 - decay)
        self.settle()
        if revive_below is not None:
            drawn = torch.randint(len(vectors), (len(self.rows),), device=vectors.device)
            self.place(self.counts < revive_below, vectors[drawn].to(self.rows.dtype), revive_below)

    @torch.no_grad()
    def settle(self) -> None:
        """Put the rows where the averages say."""
        assert self.counts is not None
        assert self.sums is not None
        number, everything = len(self.rows), self.counts.sum()
        smooth = (self.counts + SMOOTHING) / (everything + number * SMOOTHING) * everything
        self.rows.copy_(self.sums / smooth.unsqueeze(-1))

    @torch.no_grad()
    def place(self, which: Tensor, rows: Tensor, count: float) -> None:
        """Put the rows ``which`` onto others, as if ``count`` vectors lay at each."""
        chosen = which.unsqueeze(-1)
        self.rows.copy_(torch.where(chosen, rows, self.rows))
        if self.counts is not None and self.sums is not None:
            self.sums.copy_(torch.where(chosen, count * rows, self.sums))
            self.counts.copy_(torch.where(which, count, self.counts))


def summed(each: Sequence[Tensor]) -> Tensor:
    """The sum over codebooks."""
    total = each[0]
    for more in each[1:]:
        total = total + more
    return total


def stacked(each: Sequence[Tensor], dim: int) -> Tensor:
    """What there is for each codebook, along an axis of its own where there are several."""
    return torch.stack(list(each), dim) if len(each) > 1 else each[0]


def nearest(vectors: Tensor, rows: Tensor) -> Tensor:
    """The number of the nearest of ``rows`` for each of ``vectors`` ``[n, code_dim]``.

    |z|^2 is the same for every row, so that |e|^2 - 2 z e decides, one matrix product.
    """
    norms = rows.square().sum(-1)
    size = max(1, DISTANCES.get(vectors.device.type, DISTANCES["cpu"]) // len(rows))
    parts = (vectors,) if torch.compiler.is_exporting() else vectors.split(size)  # a graph takes any number
    return torch.cat([torch.addmm(norms, some, rows.T, alpha=-2).min(-1).indices for some in parts])


def perplexity_of(count: Tensor) -> Tensor:
    """exp of the entropy of the frequencies that belong to counts."""
    share = count / count.sum()
    return torch.xlogy(share, share).sum().neg().exp()


def kmeans_plus_plus(vectors: Tensor, number: int) -> Tensor:
    """Some of ``vectors``, each further one with a chance in proportion to its squared distance from those before."""
    chosen = [vectors[torch.randint(len(vectors), ())]]
    distance = (vectors - chosen[0]).square().sum(-1)
    for _ in range(number - 1):
        chosen.append(vectors[(distance / torch.empty_like(distance).exponential_()).argmax()])
        distance = torch.minimum(distance, (vectors - chosen[-1]).square().sum(-1))
    return torch.stack(chosen)
