"""What can go wrong, by class, and the code that the command line exits with.

=====  ==================================================================================================
0      all is done
1      an error of this package or of a user's program that no class below names
2      arguments: ``ValueError``, ``TypeError``
3      data: :class:`DataError`
4      a run or checkpoint: :class:`CheckpointError`
5      numbers: :class:`NumericalError`, or any ``FloatingPointError`` (``ArithmeticError``)
6      resources: :class:`ResourceError`, or any ``OSError`` or ``MemoryError`` (disk, lock, permission, memory)
129    the terminal is gone (SIGHUP)
130    interrupted (SIGINT)
143    terminated (SIGTERM)
=====  ==================================================================================================
"""

from __future__ import annotations

__all__ = ["CheckpointError", "DataError", "NumericalError", "ResourceError", "exit_code"]

INTERRUPTED, TERMINATED = 130, 143


class DataError(ValueError):
    """The data themselves are bad or absent; a wrong *argument* is a plain ``ValueError``.

    :ivar datum: the place of the one that is at fault, where there is one.
    """

    def __init__(self, *args: object, datum: int | None = None) -> None:
        super().__init__(*args)
        self.datum = datum


class CheckpointError(ValueError):
    """A run directory or a checkpoint in it is absent, damaged, changed, or of another model."""


class NumericalError(FloatingPointError):
    """What was computed is no number: a loss, a gradient or a weight is NaN or infinite where it must not be."""


class ResourceError(OSError):
    """The machine lacks what was asked of it: memory, disk, a lock that another process holds, a permission."""


EXIT_CODES: dict[type[BaseException], int] = {  # the first that fits
    DataError: 3, CheckpointError: 4, ArithmeticError: 5, OSError: 6, MemoryError: 6,
    ValueError: 2, TypeError: 2, KeyboardInterrupt: INTERRUPTED,
}  # fmt: skip
#: What torch's plain RuntimeErrors say where the machine has not got the memory, or no machine could.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory: you tried", "Storage size calculation overflowed")


def exit_code(error: BaseException) -> int:
    """The code that the command line exits with after an error.

    >>> exit_code(DataError("labels are needed")), exit_code(KeyError("x"))
    (3, 1)
    """
    return 6 if is_out_of_memory(error) else next((c for kind, c in EXIT_CODES.items() if isinstance(error, kind)), 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on any device."""
    torchs = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)  # torch may not be here yet
    return torchs or any(words in str(error) for words in OUT_OF_MEMORY)
