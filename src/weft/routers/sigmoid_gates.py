"""Sigmoid gates: every expert counts for every token by itself, or not at all where its gate is small."""

from dataclasses import dataclass

import torch

from weft.core import option
from weft.core.router import Router


@dataclass(frozen=True)
class SigmoidGates(Router):
    """y = W x + sum_k g_k(x) (f_k(x) - W x),  g = sigmoid(G x + c),  and 0 where it is below `threshold`.

    With threshold 0 all experts count (soft); above it a token uses as many of them as it needs (sparse). They do not
    compete as under a softmax, and may well be of different methods.
    Cao et al. 2025 (MoA), arXiv 2506.05928.
    """

    name = "sigmoid_gates"
    paper = "2506.05928"
    threshold: float = option(
        0.0, help="gates below it are 0; those of a fresh router are about 0.5", minimum=0, maximum=1
    )

    def own(self, site, op, made):
        size = len(self.experts)
        return {"G": site.normal(size, site.in_features, std=0.02), "c": site.zeros(size)}

    def route(self, t, x, op):
        score = op.project(x, t["G"]) + t["c"]  # [..., K]
        gates = score.to(torch.promote_types(score.dtype, torch.float32)).sigmoid()
        return op.mix(x, torch.where(gates < self.threshold, 0.0, gates) if self.threshold else gates)
