"""Types that distributions share."""

from __future__ import annotations

from torch.distributions.constraints import Constraint

#: The shape of a sample or a batch, as torch takes it.
Shape = list[int] | tuple[int, ...]
#: Constraints of arguments, by name.
Constraints = dict[str, Constraint]
