"""Passthrough: one tensor as it is, or scaled; for models that are stacked out of layers of others."""

from dataclasses import dataclass

from weft.combine.rule import Rule
from weft.core import option


@dataclass(frozen=True)
class Passthrough(Rule):
    """W = s W1.

    As mergekit has it.
    """

    name = "passthrough"
    by_entry = True
    most = 1
    weighted = False
    scale: float = option(1.0, help="factor (s)")

    def combine(self, tensors, given):
        return tensors[0] if self.scale == 1 else self.scale * tensors[0]
