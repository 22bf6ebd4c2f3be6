"""Priors over grids of codes: uniform over a codebook, and autoregressive."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn.functional import pad

from pyrovae.arguments import in_range, positive_int
from pyrovae.nn.mlp import fold, glorot, module_list
from pyrovae.parts.quantizer import VectorQuantizer
from pyrovae.parts.shared import Broadcasting, Shape


class GatedLayer(nn.Module):
    """One layer of both stacks; each is given its input padded, all of it or the part that one output hangs on."""

    def __init__(self, channels: int, radius: int) -> None:
        super().__init__()
        self.radius = radius
        self.vertical = glorot(nn.Conv2d(channels, 2 * channels, (radius + 1, 2 * radius + 1)), 2)
        self.horizontal = glorot(nn.Conv2d(channels, 2 * channels, (1, radius + 1)), 2)
        self.link = glorot(nn.Conv2d(2 * channels, 2 * channels, 1), 2)
        self.out = glorot(nn.Conv2d(channels, channels, 1))

    def down(self, above: Tensor) -> tuple[Tensor, Tensor]:
        """The vertical stack's next layer, and what the horizontal one sees of it."""
        wide = self.vertical(above)
        return gated(wide), self.link(wide)

    def along(self, left: Tensor, link: Tensor) -> Tensor:
        """The horizontal stack's next layer."""
        return left[..., self.radius :] + self.out(gated(self.horizontal(left) + link))


def gated(wide: Tensor) -> Tensor:
    """tanh of one half of the channels times the sigmoid of the other."""
    a, b = wide.chunk(2, 1)
    return a.tanh() * b.sigmoid()


class GatedConvolutions(nn.Module):
    r"""Logits of every code of a grid given the codes before it, row by row from the top left.

    .. math:: y = \tanh(W_f * x) \odot \sigma(W_g * x)

    in two stacks: a vertical one that sees the rows above, and a horizontal one that sees what is left in the same row
    and the vertical one, so that nothing before a position is hidden from it. Inputs are shifted by one row and one
    column in place of a mask on the first kernel. Each position has a bias of its own.

    Shapes: integers ``[N, h, w]`` to ``[N, num_codes, h, w]``.

    :param grid: ``(h, w)``.
    :param num_codes: K.
    :param channels: units of every layer.
    :param num_layers: L; with r = kernel_size // 2 a position sees r L + 1 rows up and r L columns to either side.
    :param kernel_size: an odd number, 3 at least.

    van den Oord et al., *Conditional image generation with PixelCNN decoders*, 2016.
    """

    def __init__(
        self, grid: Sequence[int], num_codes: int, channels: int = 64, num_layers: int = 6, kernel_size: int = 3
    ) -> None:
        super().__init__()
        if positive_int("kernel_size", kernel_size, 3) % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}: pass {kernel_size + 1}")
        width, self.grid = positive_int("channels", channels), tuple(grid)
        self.radius = kernel_size // 2
        self.embedding = nn.Embedding(num_codes, width)
        self.position = nn.Parameter(torch.zeros(width, *grid))
        count = positive_int("num_layers", num_layers)
        self.layers = module_list(GatedLayer(width, self.radius) for _ in range(count))
        self.output = glorot(nn.Conv2d(width, num_codes, 1))
        self.head = nn.Sequential(nn.ReLU(), glorot(nn.Conv2d(width, width, 1)), nn.ReLU(), self.output)

    def forward(self, codes: Tensor) -> Tensor:
        r, seen = self.radius, self.embedding(codes).movedim(-1, 1)
        above = pad(seen[:, :, :-1], (0, 0, 1, 0)) + self.position
        left = pad(seen[..., :-1], (1, 0)) + self.position
        for layer in self.layers:
            above, link = layer.down(pad(above, (r, r, r, 0)))
            left = layer.along(pad(left, (r, 0)), link)
        return self.head(left)

    @torch.no_grad()
    def generate(self, number: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """Grids ``[number, h, w]`` code by code; ``choose`` makes codes ``[number]`` of logits ``[number, num_codes]``.

        Every layer keeps its inputs: a row is convolved once and a position once, so that a whole grid costs what one
        call of :meth:`forward` costs.
        """
        (height, width), r, like = self.grid, self.radius, self.position
        rows = [like.new_zeros(number, len(like), height + r, width + 2 * r) for _ in self.layers]
        codes = torch.zeros(number, height, width, dtype=torch.long, device=like.device)
        for i in range(height):
            step = like[:, i : i + 1].expand(number, -1, -1, -1)
            if i:
                step = step + self.embedding(codes[:, i - 1 : i]).movedim(-1, 1)
            links = []
            for held, layer in zip(rows, self.layers, strict=True):
                held[:, :, i + r : i + r + 1, r : r + width] = step
                step, link = layer.down(held[:, :, i : i + r + 1])
                links.append(link)
            row = [like.new_zeros(number, len(like), 1, width + r) for _ in self.layers]
            for j in range(width):
                step = like[:, i : i + 1, j : j + 1].expand(number, -1, -1, -1)
                if j:
                    step = step + self.embedding(codes[:, i, j - 1])[..., None, None]
                for held, layer, link in zip(row, self.layers, links, strict=True):
                    held[..., j + r : j + r + 1] = step
                    step = layer.along(held[..., j : j + r + 1], link[..., j : j + 1])
                codes[:, i, j] = choose(self.head(step).flatten(1))
        return codes


class AutoregressiveCodes(Broadcasting):
    r"""Grids of codes, each code given those before it.

    .. math:: \log p(k) = \sum_{ij} \log \mathrm{softmax}(f_{ij}(k_{<ij}) / T)_{k_{ij}}

    Shapes: event ``[h, w]`` of integers (floats that hold integers pass as well); nats of probability per grid.
    :meth:`log_prob` is one pass over all positions, :meth:`sample` goes from one to the next.

    :param network: a :class:`GatedConvolutions`.
    :param temperature: T, by which logits are divided.
    """

    def __init__(self, network: GatedConvolutions, temperature: float = 1.0, batch_shape: Sequence[int] = ()) -> None:
        self.network, self.temperature = network, temperature
        super().__init__(torch.Size(batch_shape), torch.Size(network.grid))

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.integer_interval(0, self.network.embedding.num_embeddings - 1), 2)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        codes = value.long()
        logits = fold(self.network, codes, 2) / self.temperature
        each = logits.log_softmax(-3).gather(-3, codes.unsqueeze(-3))
        return each.sum((-3, -2, -1)).expand(torch.broadcast_shapes(self.batch_shape, codes.shape[:-2]))

    @torch.no_grad()
    def sample(self, sample_shape: Shape = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape

        def draw(logits: Tensor) -> Tensor:
            return (logits / self.temperature).softmax(-1).multinomial(1).squeeze(-1)

        return self.network.generate(math.prod(shape), draw).view(*shape, *self.network.grid)

    def tempered(self, temperature: float) -> AutoregressiveCodes:
        """The same with its logits divided by ``temperature``: below 1 it keeps to what is likely."""
        if in_range("temperature", temperature, 0.0) == 0:
            raise ValueError("temperature must be above 0, got 0: pass a small one")
        return AutoregressiveCodes(self.network, self.temperature * temperature, self.batch_shape)


class CodebookRows(constraints.Constraint):
    """Grids of a codebook's rows: a discrete set, whose membership is not tested."""

    is_discrete = True
    event_dim = 3

    def check(self, value: Tensor) -> Tensor:
        return torch.ones(value.shape[:-3], dtype=torch.bool, device=value.device)


class CodebookPrior(Broadcasting):
    r"""A prior over grids of codes, as a distribution of the vectors that the codes stand for.

    .. math:: \log p(z) = -h w \log K \text{ (times the number of codebooks)}, \qquad \text{or} \qquad
              \log p(z) = \log p(k_{11}, \dots, k_{hw}) \text{ with } z_{ij} = e_{k_{ij}}

    The uniform one does not look whether z lies in the codebook. A learned one finds the codes again, in float64; what
    is no row of the codebook has probability 0.

    Shapes: event ``[h, w, code_dim]``; nats of probability per grid.

    :param quantizer: what holds the codebook.
    :param grid: ``(h, w)``.
    :param learned: a distribution of codes ``[h, w]``; None is uniform.
    """

    support = CodebookRows()

    def __init__(
        self,
        quantizer: VectorQuantizer,
        grid: Sequence[int],
        learned: AutoregressiveCodes | None = None,
        batch_shape: Sequence[int] = (),
    ) -> None:
        self.quantizer, self.grid, self.learned = quantizer, tuple(grid), learned
        event = torch.Size((*self.grid, quantizer.code_dim))
        super().__init__(torch.Size(batch_shape), event, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(self.batch_shape, value.shape[:-3])
        if self.learned is None:
            number = math.prod(self.grid) * self.quantizer.num_quantizers
            return self.quantizer.codebook.new_full(shape, -number * math.log(self.quantizer.num_codes))
        codes = self.quantizer.encode(value.detach().double())
        rows = self.quantizer.lookup(codes).to(value.dtype)
        found = torch.isclose(rows, value.detach()).flatten(-3).all(-1)
        return torch.where(found, self.learned.log_prob(codes), -math.inf).expand(shape)

    @torch.no_grad()
    def sample(self, sample_shape: Shape = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        if self.learned is not None:
            return self.quantizer.lookup(self.learned.sample(shape))
        several = (self.quantizer.num_quantizers,) if self.quantizer.num_quantizers > 1 else ()
        size = (*shape, *self.grid, *several)
        codes = torch.randint(self.quantizer.num_codes, size, device=self.quantizer.codebook.device)
        return self.quantizer.lookup(codes)

    def tempered(self, temperature: float) -> CodebookPrior:
        """The same with a learned prior's logits divided by ``temperature``; the uniform one stays uniform."""
        if self.learned is None:
            return self
        learned = self.learned.tempered(temperature)
        return CodebookPrior(self.quantizer, self.grid, learned, self.batch_shape)
