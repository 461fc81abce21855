"""Task arithmetic: differences to the base, weighted and added; a negative weight takes a task away."""

from dataclasses import dataclass

import torch

from weft.combine.consensus import added
from weft.combine.rule import Rule
from weft.core import option


@dataclass(frozen=True)
class TaskArithmetic(Rule):
    """W = W0 + l sum_k w_k (W_k - W0); divided by sum_k w_k where normalised.

    Ilharco et al. 2022, arXiv 2212.04089; additions, negations and analogies of modules: Zhang et al. 2023, arXiv
    2306.14870.
    """

    name = "task_arithmetic"
    paper = "2212.04089"
    by_entry = True
    needs_base = True
    scale: float = option(1.0, help="factor on what is added (l)")
    normalise: bool = option(False, help="divide by the sum of the weights")

    def factors(self, weights):
        total = sum(weights) if self.normalise else 1.0
        return tuple(self.scale * w / (total if abs(total) > 1e-8 else 1.0) for w in weights)

    def combine(self, tensors, given):
        weights, base = given.weights, given.base
        deltas = torch.stack([t - base for t in tensors])
        return base + self.scale * added(deltas, deltas.new_tensor(weights), elect=False, normalise=self.normalise)
