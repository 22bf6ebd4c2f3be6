"""Where tensors stand in others, so that what is drawn for a part can be written there."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Places(TorchFunctionMode):
    """Knows where tensors stand in a few held ones: views of them, and copies that hold the same numbers."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.held = {storage(t): t for t in held}
        self.copies: dict[int, tuple[Tensor, Tensor, Any]] = {}  # by storage: a copy, of what, and which part of it

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in COPYING and isinstance(found, Tensor) and self.root(args[0]) is not None is self.root(found):
            self.copies[storage(found)] = found, args[0], args[1] if func is Tensor.__getitem__ else None
        return found

    def root(self, value: object) -> Tensor | None:
        """The held tensor that a value is a part of, None for any other."""
        while isinstance(value, Tensor) and (at := storage(value)) in self.copies:
            value = self.copies[at][1]
        return self.held.get(storage(value)) if isinstance(value, Tensor) else None

    def write(self, place: Tensor, value: Tensor) -> None:
        """Put a value into a part of a held tensor, and in the copies between them."""
        place.copy_(value)
        while (at := storage(place)) in self.copies:
            copy, place, index = self.copies[at]
            if index is None:
                place.copy_(copy.reshape(place.shape))
            else:
                place[index] = copy


#: What gives copies, or views, of the same numbers.
COPYING = {
    Tensor.__getitem__, Tensor.clone, Tensor.contiguous, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten,
    Tensor.to, Tensor.type_as, Tensor.float, Tensor.double, Tensor.long, Tensor.int, Tensor.bool,
}  # fmt: skip


def storage(t: Tensor) -> int:
    """Which memory a tensor has; of what shows none (the tensors of torch.func, empty ones), which it is."""
    with suppress(NotImplementedError):
        if at := t.untyped_storage().data_ptr():
            return at
    return -id(t)
