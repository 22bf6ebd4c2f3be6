"""What can happen to a file: cut short, bits turned, pieces zeroed, doubled, moved, or replaced by anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

T = TypeVar("T")
ANY_JSON: SearchStrategy[object] = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes, most: int = 3) -> bytes:
    """The content of a file after one or several such accidents; also, rarely, as it was."""
    for _ in range(draw(st.integers(1, most))):
        size = len(content)
        place, end = sorted(draw(st.tuples(*[st.integers(0, max(size - 1, 0))] * 2)))
        match draw(st.sampled_from(["bit", "bit", "cut", "start", "zeros", "double", "without", "noise", "junk"])):
            case "bit" if size:
                turned = content[place] ^ (1 << draw(st.integers(0, 7)))
                content = content[:place] + bytes([turned]) + content[place + 1 :]
            case "cut":
                content = content[:place]
            case "start":
                content = content[place:]
            case "zeros":
                content = content[:place] + bytes(end - place) + content[end:]
            case "double":
                content = content[:end] + content[place:end] + content[end:]
            case "without":
                content = content[:place] + content[end:]
            case "noise":
                noise = draw(st.binary(max_size=16))
                content = content[:place] + noise + content[place + len(noise) :]
            case "junk":
                content = draw(st.binary(max_size=64))
    return content


def answer(do: Callable[[], T], *errors: type[Exception]) -> T | None:
    """What is returned, or None after one of these errors that says so in one line; any other passes."""
    try:
        return do()
    except errors as error:
        short(str(error))
        return None


def short(message: str) -> None:
    """What a person reads of an error: one line, without tensors."""
    assert message
    assert "\n" not in message
    assert "tensor(" not in message
    assert len(message) < 1000
