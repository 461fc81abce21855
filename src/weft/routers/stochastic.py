"""Stochastic routing: every step trains one expert that is drawn, and all of them are averaged in the end."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from weft.core import option
from weft.core.fused import value
from weft.core.means import check_means, means
from weft.core.router import Router


@dataclass(frozen=True)
class Stochastic(Router):
    """y = f_k(x) in training, k drawn for a step at a site; else y = f(x), f of the means of the experts' parameters.

    average="changes" takes the mean of what experts add, where they have no parameters in common. redundancy times
    sum_ij C_ij^2 / B, i != j, is added to the loss, C = U^T H: U what the expert adds, H the map's result, each token's
    of norm 1 (MixPHM, there 0.0039; its second term, on the last layer, is left out).
    Wang et al. 2022 (AdaMix, without the divergence of two passes), arXiv 2205.12410; Jiang and Zheng 2023 (MixPHM),
    arXiv 2303.01239, whose experts share factors: the method compacter with num_experts.
    """

    name = "stochastic"
    paper = "2205.12410"
    random = True
    kinds = frozenset({"linear", "conv", "embedding", "block"})
    average: Literal["parameters", "changes"] = option("parameters", help="what is averaged when training is over")
    redundancy: float = option(0.0, help="weight of the correlations of what is added with what is there", minimum=0)

    def check_experts(self):
        super().check_experts()
        if self.average == "parameters" and len({e.method for e in self.experts}) > 1:
            raise ValueError("stochastic averages parameters of alike experts: for others, give average='changes'")

    def check(self, site):
        super().check(site)
        if self.redundancy and site.kind not in ("linear", "block"):
            raise ValueError(f"redundancy is of tokens with channels, and {site.address} is of kind {site.kind}")

    def own(self, site, op, made):
        if self.average == "parameters":
            check_means([*made.values()])
        return {}

    def coefficients(self, t, op):
        drawn = op.chance(1)
        if drawn is not None or self.average == "changes":
            return {**super().coefficients(t, op), **({} if drawn is None else {"drawn": drawn})}
        first, mean = self.experts[0], means([*self._apart(t).values()])
        return {f"{first.name}:{k}": v for k, v in first.method.coefficients(mean, op).items()}

    def route(self, t, x, op):
        if "drawn" not in t:
            even = torch.full((len(self.experts),), 1 / len(self.experts), device=op.site.device, dtype=op.site.dtype)
            return op.only(0, x) if self.average == "parameters" else op.mix(x, even)
        y = op.drawn(x, t["drawn"])
        if not self.redundancy:
            return y
        h, y = value(op(x)), value(y)
        u, v = (F.normalize(z.flatten(0, -2), dim=-1) for z in (y - h, h))
        return op.penalise(y, self.redundancy * (u.mT @ v).fill_diagonal_(0).square().sum() / len(x))
