"""What TIES, DARE, DELLA and breadcrumbs share: differences to the base, thinned out, perhaps elected, and added."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.combine.consensus import added
from weft.combine.rule import Given, Rule, each
from weft.combine.sparsify import Rescale, keep_, rescaled
from weft.core import option


@dataclass(frozen=True)
class TaskVectors(Rule):
    """W = W0 + l sum_k w_k c_k M_k (W_k - W0): a rule says how each mask M_k is found."""

    needs_base = True
    once = True
    density: float | tuple[float, ...] = option(0.5, help="share of each difference that is kept")
    elect: bool = option(False, help="add only what has the sign of the weighted sum, entry by entry")
    normalise: bool = option(False, help="divide by the weights that took part at an entry")
    rescale: Rescale = option("none", help="make differences as large as before: by 1 / density, or by sum of sizes")
    scale: float = option(1.0, help="factor on what is added (l)")

    @abstractmethod
    def mask(self, delta: Tensor, index: int, count: int, generator: torch.Generator | None) -> Tensor:
        """1 where the index-th of `count` differences is kept, 0 elsewhere."""

    def combine(self, tensors: Sequence[Tensor], given: Given) -> Tensor:
        base = given.base
        densities = each(self.density, len(tensors))
        deltas = base.new_empty((len(tensors), *base.shape))
        for k, density in enumerate(densities):
            delta = torch.sub(tensors[k], base, out=deltas[k])
            mask = self.mask(delta, k, len(tensors), given.generator)
            if self.rescale == "none":
                keep_(delta, mask)
            else:
                deltas[k] = rescaled(delta, mask, density, self.rescale)
        total = added(deltas, deltas.new_tensor(given.weights), elect=self.elect, normalise=self.normalise)
        return total.mul_(self.scale).add_(base)
