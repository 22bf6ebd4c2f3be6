"""A module of one's own as a pair of the zoo."""

from __future__ import annotations

from torch import Tensor, nn

from pyrovae.models.base import Pair

#: What a module may have beside its two programs, each as :class:`Pair` has it.
OPTIONAL = (
    "encode", "decode", "initialise", "metrics", "score_labels", "log_prob_error", "after_training", "conditional",
    "likelihood_is", "observes_bits", "sums_over_labels", "config",
)  # fmt: skip


class OwnPair(Pair):
    """A module with ``.model`` and ``.guide``, dressed as a pair: what it does not have is as in general.

    :param owner: the module, with any of :data:`OPTIONAL`.
    :raises ValueError: for a module without the two programs.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner, self.config = owner, {}
        for program in ("model", "guide"):
            if not callable(getattr(owner, program, None)):
                raise ValueError(f"{type(owner).__name__} has no .{program}(x): a model class needs .model and .guide")
        # Not by setattr, for which a program that is a module would be a part of this one.
        has = [name for name in ("model", "guide", *OPTIONAL) if hasattr(owner, name)]
        vars(self).update({name: getattr(owner, name) for name in has})

    @property
    def module(self) -> nn.Module:
        """The module itself."""
        return self.owner

    @property
    def decodes(self) -> bool:
        """Whether it has a ``.decode``."""
        return "decode" in vars(self)

    def initialise(self, x: Tensor) -> OwnPair:
        """Nothing, unless the module has this itself."""
        return self


def as_pair(module: nn.Module) -> Pair:
    """A module as a :class:`Pair`: the zoo's as they are, any other with ``.model`` and ``.guide`` dressed as one.

    >>> pair = nn.Module()
    >>> pair.model = pair.guide = lambda x: None
    >>> as_pair(pair).conditional, as_pair(pair).likelihood_is
    (False, 'estimate')
    """
    return module if isinstance(module, Pair) else OwnPair(module)
