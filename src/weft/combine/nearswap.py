"""NearSwap: take the other tensor where it is close to the base, and less of it the further it is."""

from dataclasses import dataclass

from weft.combine.rule import Rule
from weft.core import option


@dataclass(frozen=True)
class NearSwap(Rule):
    """W = W0 + min(t / |W1 - W0|, 1) (W1 - W0): no entry moves by more than t.

    As mergekit has it.
    """

    name = "nearswap"
    by_entry = True
    needs_base = True
    most = 1
    weighted = False
    t: float = option(0.001, help="the furthest that an entry moves", above=0)

    def combine(self, tensors, given):
        base = given.base
        delta = tensors[0] - base
        return base + (self.t / delta.abs().clamp(min=1e-6)).clamp(max=1.0) * delta
