"""A linear VAE by hand, under torch's own DistributedDataParallel: what nobody here wrote, to compare with.

``python -m tests.ddp RANK SIZE FOLDER``, in each of SIZE processes; FOLDER/ddp.pt holds its weights and losses.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel

SEED, BATCH, EPOCHS, RATE = 5, 8, 3, 1e-2


def data() -> Tensor:
    """Bits."""
    return (torch.rand(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) > 0.5).double()


class Loss(nn.Module):
    """Minus the ELBO per datum, at noise that is given."""

    def __init__(self, encoder: nn.Linear, decoder: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        mean, log_scale = self.encoder(x).chunk(2, -1)
        z = mean + log_scale.exp() * noise
        likelihood = -binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(-1)
        prior, posterior = -0.5 * z.square().sum(-1), (-0.5 * noise.square() - log_scale).sum(-1)
        return -(likelihood + prior - posterior).mean()


def networks() -> tuple[nn.Linear, nn.Linear]:
    """Encoder and decoder at their start."""
    torch.manual_seed(1)
    return nn.Linear(6, 4, dtype=torch.float64), nn.Linear(2, 6, dtype=torch.float64)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Batches and their noise, whole, in the order in which a generator of this seed gives them."""
    torch.manual_seed(SEED)
    x = data()
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x)).split(BATCH):
            yield x[index], torch.empty(len(index), 2, dtype=torch.float64).normal_()


def main(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/ddp", rank=rank, world_size=size)
    loss = Loss(*networks())
    model = DistributedDataParallel(loss)
    optimizer = torch.optim.Adam(loss.parameters(), RATE)
    for x, noise in batches():
        optimizer.zero_grad()
        model(x.chunk(size)[rank], noise.chunk(size)[rank]).backward()
        optimizer.step()
    if rank == 0:
        torch.save(loss.state_dict(), f"{folder}/ddp.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
