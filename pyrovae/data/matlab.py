"""MATLAB's files of version 5 to 7: their numeric matrices, by a reader that trusts no size in them.

SciPy's crashes on files that are damaged or made up.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pyrovae.data.files import content_of, require

COMPRESSED, MATRIX, COMPLEX = 15, 14, 0x800
STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}


def read_matrices(path: Path, names: set[str], fix: str) -> dict[str, np.ndarray]:
    """The matrices of these names in a file, those of them that are there and hold numbers."""
    content = memoryview(content_of(path, fix))
    order = {b"IM": "<", b"MI": ">"}.get(bytes(content[126:128]), "")
    if not order or content[124 if order == ">" else 125] != 1:
        raise ValueError("no MATLAB file of version 5 to 7, which save -v7 writes")
    found: dict[str, np.ndarray] = {}
    for kind, part in elements(content[128:], order):
        if kind == COMPRESSED:
            unpacker = zlib.decompressobj()
            kind, size = struct.unpack(f"{order}II", unpacker.decompress(part, 8))
            require(path, [((size,), 1)], len(part), fix)
            part = memoryview(unpacker.decompress(unpacker.unconsumed_tail, max(size, 1)))
            if unpacker.decompress(unpacker.unconsumed_tail, 1) or not unpacker.eof:  # its checksum stands at the end
                raise ValueError("a packed matrix is not of the size that it declares")
        name, array = matrix(part, order) if kind == MATRIX else ("", None)
        if array is not None and name in names:
            if name in found:
                raise ValueError(f"it holds {name} twice")
            found[name] = array
    return found


def elements(content: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """The elements that a stretch of a file consists of: their kinds and their contents."""
    at = 0
    while at < len(content):
        kind, size = struct.unpack_from(f"{order}II", content, at)
        start = at + 8
        if small := kind >> 16:  # up to four bytes stand in the place of the size
            kind, size, start = kind & 0xFFFF, small, at + 4
        end = start + size
        if end > len(content) or small > 4:
            raise ValueError("an element is longer than what holds it")
        at = start + 4 if small else end if kind == COMPRESSED else end + -size % 8
        yield kind, content[start:end]


def matrix(content: memoryview, order: str) -> tuple[str, np.ndarray | None]:
    """The name of a matrix, and its values if they are numbers."""
    (_, flags), (_, dims), (_, characters), *values = elements(content, order)
    (flag,), name = struct.unpack_from(f"{order}I", flags), str(bytes(characters), "ascii")
    number = CLASSES.get(flag & 0xFF)
    if number is None:
        return name, None
    if flag & COMPLEX:
        raise ValueError(f"{name} is complex")
    shape, [(kind, stored)] = struct.unpack(f"{order}{len(dims) // 4}i", dims), values
    array = np.frombuffer(stored, order + STORED.get(kind, "V1"))
    if kind not in STORED or min(shape, default=0) < 0 or array.size != math.prod(shape):
        raise ValueError(f"{name} does not hold the numbers {list(shape)} that it declares")
    return name, array.astype(number, copy=False).reshape(shape, order="F")
