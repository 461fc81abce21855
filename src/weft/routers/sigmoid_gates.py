"""Sigmoid gates: every expert counts for every token by itself, or not at all where its gate is small."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from weft.core import Frozen, option
from weft.core.router import Router


@dataclass(frozen=True)
class SigmoidGates(Router):
    """y = W x + sum_k g_k(x) (f_k(x) - W x),  g = sigmoid(G z + c),  and 0 where it is below `threshold`;  z = x, or
    z = silu(P x + p) * (Q x + q) of `hidden` channels.

    With threshold 0 all experts count (soft); above it a token uses as many of them as it needs (sparse). They do not
    compete as under a softmax, and may well be of different methods. per_token: the threshold counts
    sigmoid(v x + e) for a token.
    Cao et al. 2025 (MoA), arXiv 2506.05928. Its code has hidden = 4 K, threshold 0.5 per token, and one router for all
    maps of a layer; no gradient reaches its v and e, which are drawn and frozen here.
    """

    name = "sigmoid_gates"
    paper = "2506.05928"
    threshold: float = option(
        0.0, help="gates below it are 0; those of a fresh router are about 0.5", minimum=0, maximum=1
    )
    per_token: bool = option(False, help="let it differ from token to token, between 0 and `threshold`")
    hidden: int | None = option(None, help="channels of a hidden layer of the router", minimum=1)

    def own(self, site, op, made):
        size, read, bound = len(self.experts), site.in_features, site.in_features**-0.5
        t = {"c": site.zeros(size)}
        if self.hidden is None:
            t["G"] = site.normal(size, read, std=0.02)
        else:
            t |= {name: site.uniform(self.hidden, read, bound=bound, salt=name) for name in "PQ"}
            t |= {name: site.zeros(self.hidden) for name in "pq"}
            t["G"] = site.uniform(size, self.hidden, bound=self.hidden**-0.5, salt="G")
        if self.threshold and self.per_token:
            t |= {"v": Frozen(site.uniform(1, read, bound=bound, salt="v")), "e": Frozen(site.uniform(1, bound=bound))}
        return t

    def route(self, t, x, op):
        z = x
        if self.hidden is not None:
            z = F.silu(op.project(x, t["P"]) + t["p"]) * (op.project(x, t["Q"]) + t["q"])
        score = op.expand(z, t["G"]) + t["c"]  # [..., K]
        gates = score.to(torch.promote_types(score.dtype, torch.float32)).sigmoid()
        if not self.threshold:
            return op.mix(x, gates)
        least = self.threshold * ((op.project(x, t["v"]) + t["e"]).sigmoid() if self.per_token else 1)
        return op.mix(x, torch.where(gates < least, 0.0, gates))
