"""What Inductor asks of the machine: which vector units it has, and the libraries that lie in its cache."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def found_quickly() -> Iterator[None]:
    """Take the processor's word for its vector units, and no library that is not whole.

    Inductor compiles a program for each unit. Every compiler that knows the C++ of torch's headers knows the units,
    except for the youngest (AMX): these it tries as ever.
    """
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.cpu_vec_isa import VecISA

    units: Any = VecISA
    libraries: Any = CppCodeCache
    if not (hasattr(units, "check_build") and hasattr(libraries, "_load_library")):  # another release of torch
        yield
        return
    tried, load = units.check_build, libraries._load_library.__func__

    def known(unit: VecISA, code: str) -> bool:
        return "amx" not in code or tried(unit, code)

    def load_whole(cache: type[CppCodeCache], path: str, key: str) -> object:
        if not is_whole(Path(path)):
            raise OSError(f'"{path}" is half-written')
        return load(cache, path, key)

    units.check_build, libraries._load_library = known, classmethod(load_whole)
    try:
        yield
    finally:
        units.check_build, libraries._load_library = tried, classmethod(load)


def is_whole(path: Path) -> bool:
    """Whether a shared library is there to its end; the loader says so itself only of those that lack their head.

    An ELF file of 64 bits ends with its table of sections, which a process that loads less of it dies of.
    """
    with path.open("rb") as file:
        head = file.read(64)
        if len(head) < 64 or head[:5] != b"\x7fELF\x02":
            return True
        start, size, number = *struct.unpack_from("<Q", head, 0x28), *struct.unpack_from("<HH", head, 0x3A)
        file.seek(start + size * (number - 1))
        last = file.read(size)
    return len(last) == size and any(last)
