"""SMoRA: a LoRA every rank of which is an expert; each token uses a few of them."""

from dataclasses import dataclass

import torch

from weft.core import Method, option


@dataclass(frozen=True)
class SMoRA(Method):
    """y = W x + alpha B (g(x) * A x),  g = softmax(G x) over the `k` ranks with the largest G x + c, and 0 for others.

    The gates sum to 1, so a rank counts alpha / k as in a LoRA of rank k. c has no part in them: training lowers it for
    ranks that more tokens choose than others, and raises it for those that fewer do.
    Zhao et al. 2025, arXiv 2501.15103.
    """

    name = "smora"
    paper = "2501.15103"
    kinds = frozenset({"linear"})
    pairs = (("A", "B"),)
    aside = ("c",)
    alone = True  # its load is that of the tokens of one adapter
    rank: int = option(64, help="ranks of the update, each an expert", minimum=1)
    k: int = option(8, help="ranks that a token uses", minimum=1)
    alpha: float = option(16.0, help="scale", above=0)
    dropout: float = option(0.0, help="dropout on the update's input", minimum=0, maximum=1)
    balance: float = option(0.01, help="weight of the loss by which c balances the ranks' load", minimum=0)

    def check(self, site):
        if self.k > self.rank:
            raise ValueError(f"smora.k={self.k} is more than its rank of {self.rank}")

    def init(self, site, op):
        own = {
            "A": site.uniform(self.rank, site.in_features, bound=site.in_features**-0.5),
            "B": site.zeros(site.out_features, self.rank),
            "G": site.normal(self.rank, site.in_features, std=0.02),
        }
        return own | {"c": site.zeros(self.rank)} if self.balance else own

    def forward(self, c, x, op):
        score = op.project(x, c["G"])  # [..., R]
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        order = (score + c["c"] if self.balance else score).detach()
        chosen = order >= order.topk(self.k).values[..., -1:]
        gates = score.masked_fill(~chosen, -torch.inf).softmax(-1)
        h = op.project(op.drop(x, self.dropout), c["A"])
        y = op.expand(h * gates.to(x.dtype), self.alpha * c["B"], onto=op(x))
        if not self.balance:
            return y
        load = chosen.flatten(0, -2).to(score.dtype).mean(0) - self.k / self.rank  # of every rank, less its fair share
        return op.penalise(y, self.balance * (c["c"] * load).sum())
