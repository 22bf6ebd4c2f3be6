"""A constructor's arguments, remembered once, in types that JSON can hold."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature
from typing import Any, get_args, is_typeddict

import numpy as np


class Configured:
    """Remembers what its constructor was given, defaults filled in; no constructor of a subclass writes a line for it.

    The outermost constructor counts. What it takes as ``**options`` it passes to the next one in order of inheritance:
    the keywords of that one, with its defaults, or with ``**options: Unpack[...]`` those of the TypedDict alone. A
    constructor that takes ``*args`` is passed over. Copies and pickles keep what was remembered.

    :ivar config: the arguments by name, in types that JSON can hold; ``type(it)(**it.config)`` is another such.

    >>> class Layer(Configured):
    ...     def __init__(self, width, *, scale=1.0, bias=True): ...
    >>> class Wide(Layer):
    ...     def __init__(self, width=(200, 200), **options):
    ...         super().__init__(width, **options)
    >>> Wide(scale=np.float64(0.5)).config
    {'width': [200, 200], 'scale': 0.5, 'bias': True}
    >>> Wide.defaults(), Wide.positional()
    ({'width': (200, 200), 'scale': 1.0, 'bias': True}, ['width'])
    >>> Wide(depth=3)
    Traceback (most recent call last):
    ...
    TypeError: Wide.__init__() got an unexpected keyword argument 'depth'
    """

    config: dict[str, Any]

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        init = vars(cls).get("__init__")
        if init is None or inspect.getfullargspec(init).varargs is not None:
            return

        @functools.wraps(init)
        def remembers(self: Configured, *args: object, **kwargs: object) -> None:
            if "config" not in vars(self):  # else the constructor of a subclass has noted its own
                try:
                    bound = Signature(parameters(cls)).bind(*args, **kwargs)
                except TypeError as error:
                    raise TypeError(f"{cls.__qualname__}.__init__() {error}") from None
                bound.apply_defaults()
                given = dict(bound.arguments)
                for p in bound.signature.parameters.values():
                    if p.kind is p.VAR_KEYWORD:
                        given |= given.pop(p.name)
                vars(self)["config"] = plain(given)
            init(self, *args, **kwargs)

        cls.__init__ = remembers  # type: ignore[assignment, method-assign]

    @classmethod
    def defaults(cls) -> dict[str, object]:
        """The constructor's arguments and their defaults; ``Parameter.empty`` where there is none."""
        return {p.name: p.default for p in parameters(cls) if p.kind is not p.VAR_KEYWORD}

    @classmethod
    def positional(cls) -> list[str]:
        """The arguments that the constructor takes by position."""
        return [p.name for p in parameters(cls) if p.kind is p.POSITIONAL_OR_KEYWORD]


def parameters(cls: type[Configured]) -> list[Parameter]:
    """What the constructor of a class takes, with what it passes on."""
    return joined([vars(c)["__init__"] for c in cls.__mro__ if issubclass(c, Configured) and "__init__" in vars(c)])


def joined(constructors: Sequence[Callable[..., None]]) -> list[Parameter]:
    """The parameters of the first of some constructors, of which each passes its ``**options`` to the next."""
    if not constructors:
        return []
    try:
        signature = inspect.signature(constructors[0], eval_str=True)
    except Exception:  # an annotation that only type checkers can read
        signature = inspect.signature(constructors[0])
    own = list(signature.parameters.values())[1:]
    named = [p for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    options = next((p for p in own if p.kind is p.VAR_KEYWORD), None)
    if options is None:
        return named
    following = joined(constructors[1:])
    if not following:
        return [*named, options]
    taken = {p.name for p in named}
    typed = next((t for t in get_args(options.annotation) if is_typeddict(t)), None)
    return named + [
        p if p.kind is p.VAR_KEYWORD else p.replace(kind=p.KEYWORD_ONLY)
        for p in following
        if p.name not in taken and (typed is None or p.name in typed.__annotations__)
    ]


def plain(value: object) -> Any:
    """A value in types that JSON can hold, where there are such.

    >>> plain({"hidden": (200, 200), "latent_dim": np.int64(5)})
    {'hidden': [200, 200], 'latent_dim': 5}
    """
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(each) for each in value]
    return value
