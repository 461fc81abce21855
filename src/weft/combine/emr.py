"""EMR: one difference for all tasks, of the elected sign and the largest size at every entry."""

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.combine.rule import Rule
from weft.core import option

__all__ = ["EMR", "task_mask"]


@dataclass(frozen=True)
class EMR(Rule):
    """W = W0 + l g max_k {|D_k| : sign D_k = g},  g = sign sum_k D_k, D_k = w_k (W_k - W0), entry by entry.

    What belongs to one task again is this difference under `task_mask`. Huang et al. 2024, arXiv 2405.17461.
    """

    name = "emr"
    paper = "2405.17461"
    by_entry = True
    needs_base = True
    scale: float = option(1.0, help="factor on what is added (l)")

    def combine(self, tensors, given):
        deltas = torch.stack([w * (t - given.base) for w, t in zip(given.weights, tensors, strict=True)])
        sign = (deltas.sum(0) > 0) * 2 - 1
        return given.base + self.scale * sign * (deltas * sign).clamp(min=0).amax(0)


def task_mask(unified: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Where a task agrees with the unified difference, and the factor that restores its mean size.

    W_k ~ W0 + factor * mask * unified.
    """
    mask = unified * delta > 0
    size = (unified * mask).abs().sum()
    return mask, torch.where(size > 0, delta.abs().sum() / size.clamp(min=torch.finfo(size.dtype).tiny), 1.0)
