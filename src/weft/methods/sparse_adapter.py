"""SparseAdapter: a bottleneck adapter most of whose entries are pruned before they are trained."""

from dataclasses import dataclass
from typing import Literal

import torch

from weft.core import Frozen, Method, option
from weft.core.pruning import SCORES, prune
from weft.core.two_layers import Activation, Placement, largest, start, through, width_of


@dataclass(frozen=True)
class SparseAdapter(Method):
    """h = y + s ((M_u * U) f((M_d * D) z + d) + u),  z = y or x,  y = W x, or a block of x;  M are 0 or 1 and stay.

    random: any entries; magnitude: the largest of D, and any of U, whose start is zero; of each matrix a share
    1 - sparsity is left. snip: the largest |dL/dw w| of all D and U of the adapter together; synflow: those that most
    of 1^T |U| |D| 1 goes through. Both are found after `score_steps` steps: in the start every entry of D has no
    gradient, and every one of U is zero. GraSP is left out: it wants a second backward on one batch; in the start its
    score of U is zero, and that of D is what snip finds after one plain step of gradient descent, but for the sign.

    He et al. 2022, arXiv 2210.04284.
    """

    name = "sparse_adapter"
    paper = "2210.04284"
    kinds = frozenset({"linear", "block"})
    default_targets = "mlp-blocks"
    sparsity: float = option(0.8, help="share of the entries of D and U that are pruned", minimum=0, maximum=0.999)
    score: Literal["random", "magnitude", "snip", "synflow"] = option(
        "snip", help="what decides which entries are kept"
    )
    score_steps: int = option(10, help="steps of training before snip or synflow prunes", minimum=2)
    placement: Placement = option("sequential", help="read the map's result, or its input")
    width: int | None = option(None, help="size of the bottleneck, instead of reduction_factor", minimum=1)
    reduction_factor: float = option(16.0, help="what the number of channels it reads is divided by", minimum=1)
    activation: Activation = option("relu", help="f")
    scale: float = option(1.0, help="s")

    def init(self, site, op):
        t: dict = start(site, self.placement, width_of(site, self.placement, self.width, self.reduction_factor))
        for name in ("down", "up"):
            score = site.uniform(*t[name].shape, bound=1.0, salt=f"{name} score")
            score = t[name].abs() if self.score == "magnitude" and name == "down" else score
            kept = torch.ones_like(score) if self.score in SCORES else largest(score, 1 - self.sparsity)
            t[f"{name}_mask"] = Frozen(kept)
        return t

    def coefficients(self, t, op):
        return {**t, "down": t["down_mask"] * t["down"], "up": t["up_mask"] * t["up"]}

    def forward(self, c, x, op):
        y = op(x)
        return y + self.scale * through(op, y if self.placement == "sequential" else x, c, self.activation)

    def evolve(self, parts, progress):
        if self.score in SCORES and progress.step == min(self.score_steps, progress.num_steps):
            prune(parts, self.score, 1 - self.sparsity)
