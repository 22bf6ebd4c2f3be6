"""What data are, in a line: how many of which shape, and a digest of their content; and which rows come twice."""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyrovae.data.images import Images

CHUNK_BYTES = {"cpu": 2**20, "cuda": 2**26}  # what stays in a cache, what is worth a kernel


def held(data: object) -> tuple[Tensor, ...]:
    """The tensors that a data set, or a loader's, holds; none of one that reads its data from elsewhere."""
    if isinstance(data, DataLoader):
        return held(data.dataset)
    if isinstance(data, Images):
        return data.columns
    return data.tensors if isinstance(data, TensorDataset) else ()


def fingerprint(*columns: Tensor) -> str:
    """What tensors ``[N, ...]`` hold, in a line: number, shape, type, and a digest of all values and their order.

    The same on every device. Two sets that differ have one digest by chance only, once in some 2^40 pairs; it is no
    protection against who looks for such.

    >>> fingerprint(torch.zeros(3, 2), torch.arange(3))
    '3 of [2] float32, labelled, be9203e01bdb'
    """
    digest = hashlib.sha256()
    for column in columns:
        digest.update(f"{column.dtype} {list(column.shape)}".encode() + row_hashes(column).cpu().numpy().tobytes())
    x, *labels = columns
    kind = f"{len(x):,} of {list(x.shape[1:])} {str(x.dtype).removeprefix('torch.')}"
    return f"{kind}{', labelled' * bool(labels)}, {digest.hexdigest()[:12]}"


def repeated(rows: Tensor, among: Tensor) -> int:
    """How many rows of ``rows`` are rows of ``among`` as well.

    >>> repeated(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    1
    """
    if rows.shape[1:] != among.shape[1:] or rows.dtype != among.dtype:
        return 0
    hashes, order = row_hashes(among.to(rows.device)).sort()
    mine = row_hashes(rows)
    place = torch.searchsorted(hashes, mine).clamp(max=len(hashes) - 1)
    met = (hashes[place] == mine).nonzero().squeeze(1)
    same = rows[met] == among[order[place[met]].to(among.device)].to(rows.device)
    return int(same.flatten(1).all(1).sum()) if len(met) else 0


def row_hashes(x: Tensor) -> Tensor:
    """A 64-bit hash of every row of ``x`` ``[N, ...]``: a sum of its words, each times an odd number of its own.

    A word's upper bits are mixed into its lower ones first, which floats that are 0 or 1 leave empty.
    """
    if not x.numel():
        return torch.zeros(len(x), dtype=torch.int64)
    rows = x.detach().reshape(len(x), -1).contiguous()
    size = rows[:1].nbytes
    weights = odd_numbers(-(-size // 8)).to(x.device)
    found = []
    for part in rows.split(max(1, CHUNK_BYTES.get(x.device.type, 2**20) // max(size, 1))):
        octets = part.view(torch.uint8)
        words = (torch.nn.functional.pad(octets, (0, -size % 8)) if size % 8 else octets).view(torch.int64)
        mixed = words >> 29
        mixed ^= words
        mixed *= weights
        found.append(mixed.sum(1))
    return torch.cat(found)


@cache
def odd_numbers(count: int) -> Tensor:
    """Numbers of 64 bits that are always the same."""
    octets = hashlib.shake_128(b"pyrovae").digest(8 * count)
    return torch.from_numpy(np.frombuffer(octets, "<i8").copy()) | 1
