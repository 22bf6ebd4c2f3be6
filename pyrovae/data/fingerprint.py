"""What data are, in a line: how many of which shape, and a digest of their content; and which rows come twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyrovae.data.images import Images
from pyrovae.engine.support import rows_at_a_time


def held(data: object) -> tuple[Tensor, ...]:
    """The tensors that a data set, or a loader's, holds; none of one that reads its data from elsewhere."""
    if isinstance(data, DataLoader):
        return held(data.dataset)
    if isinstance(data, Images):
        return data.columns
    return data.tensors if isinstance(data, TensorDataset) else ()


def fingerprint(*columns: Tensor) -> str:
    """What tensors ``[N, ...]`` hold, in a line: number, shape, type, and a digest of all values and their order.

    It digests the sums of words along every row, each times an odd number of its own, and those down every column. A
    changed value that is alone in its row or its column is found for certain, others but by chance, once in some 2^16
    at the worst; it is no protection against who looks for such. The same on every device.

    >>> fingerprint(torch.zeros(3, 2), torch.arange(3))
    '3 of [2] float32, labelled, 0ac1fd64f0c7'
    """
    digest = hashlib.sha256()
    for column in columns:
        digest.update(f"{column.dtype} {list(column.shape)}".encode())
        parts = [(weighed(words), words.sum(0)) for words in pieces(column)]
        along, down = zip(*parts, strict=True) if parts else ((), ())
        for sums in (*along, *(torch.stack(down).sum(0, keepdim=True) if down else ())):
            digest.update(sums.cpu().numpy().tobytes())
    x, *labels = columns
    kind = f"{len(x):,} of {list(x.shape[1:])} {str(x.dtype).removeprefix('torch.')}"
    return f"{kind}{', labelled' * bool(labels)}, {digest.hexdigest()[:12]}"


def repeated(rows: Tensor, among: Tensor) -> int:
    """How many rows of ``rows`` are rows of ``among`` as well.

    >>> repeated(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    1
    """
    if rows.shape[1:] != among.shape[1:] or rows.dtype != among.dtype or not min(rows.numel(), among.numel()):
        return 0
    rows, among = (x.detach().reshape(len(x), -1) for x in (rows, among))
    mine, others = (torch.cat([weighed(words) for words in pieces(x)]) for x in (rows, among))
    among = among[met(others, mine)]  # few are left for hashes that take longer
    rows = rows[met(mine, others)]
    if not len(rows) or not len(among):
        return 0
    hashes, order = row_hashes(among.to(rows.device)).sort()
    mine = row_hashes(rows)
    place = torch.searchsorted(hashes, mine).clamp(max=len(hashes) - 1)
    alike = (hashes[place] == mine).nonzero().squeeze(1)
    same = rows[alike] == among[order[place[alike]].to(among.device)].to(rows.device)
    return int(same.all(1).sum())


def met(hashes: Tensor, others: Tensor) -> Tensor:
    """Which hashes are among others, and some more, by a table of 20 bits of them."""
    table = torch.zeros(2**20, dtype=torch.bool, device=hashes.device)
    table[(others.to(hashes.device) >> 44) & 2**20 - 1] = True
    return table[(hashes >> 44) & 2**20 - 1]


def row_hashes(x: Tensor) -> Tensor:
    """A 64-bit hash of every row of ``x`` ``[N, ...]``.

    A word's upper bits are mixed into its lower ones, which floats that are 0 or 1 leave empty.
    """
    return torch.cat([weighed((words >> 29).bitwise_xor_(words)) for words in pieces(x)])


def pieces(x: Tensor) -> Iterator[Tensor]:
    """The bytes of the rows of ``x`` ``[N, ...]`` as 64-bit words, some rows at a time."""
    if not x.numel():
        return
    rows = x.detach().reshape(len(x), -1).contiguous()
    size = rows[:1].nbytes
    for part in rows.split(rows_at_a_time(rows)):
        octets = part.view(torch.uint8)
        yield (torch.nn.functional.pad(octets, (0, -size % 8)) if size % 8 else octets).view(torch.int64)


def weighed(words: Tensor) -> Tensor:
    """The sum of every row of words ``[n, size]``, each word times an odd number of its own."""
    weights = odd_numbers(words.shape[1])
    if words.is_cpu:  # in one pass
        return torch.from_numpy(np.einsum("ij,j->i", words.numpy(), weights.numpy()))
    return (words * weights.to(words.device)).sum(1)


@cache
def odd_numbers(count: int) -> Tensor:
    """Numbers of 64 bits that are always the same."""
    octets = hashlib.shake_128(b"pyrovae").digest(8 * count)
    return torch.from_numpy(np.frombuffer(octets, "<i8").copy()) | 1
