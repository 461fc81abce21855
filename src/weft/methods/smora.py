"""SMoRA: a LoRA every rank of which is an expert; each token uses a few of them."""

from dataclasses import dataclass

import torch

from weft.core import Frozen, Method, option


@dataclass(frozen=True)
class SMoRA(Method):
    """y = W x + alpha B (g(x) * A x),  g = p / sum(p),  p = sigmoid(G x) + c at its `k` largest, and 0 elsewhere.

    The gates sum to 1, so a rank counts alpha / k as in a LoRA of rank k. After every step c rises by `bias_rate` for
    ranks that fewer tokens than the mean chose, and falls for the others. `load` is zero: its gradient counts them.
    Zhao et al. 2025, arXiv 2501.15103; gates, c and defaults are those of the authors' code.
    """

    name = "smora"
    paper = "2501.15103"
    kinds = frozenset({"linear"})
    pairs = (("A", "B"),)
    aside = ("load",)
    alone = True  # its load is that of the tokens of one adapter
    rank: int = option(64, help="ranks of the update, each an expert", minimum=1)
    k: int = option(8, help="ranks that a token uses", minimum=1)
    alpha: float = option(16.0, help="scale", above=0)
    dropout: float = option(0.0, help="dropout on the update's input", minimum=0, maximum=1)
    bias_rate: float = option(1e-5, help="by how much c moves in a step; 0: no c", minimum=0)

    def check(self, site):
        if self.k > self.rank:
            raise ValueError(f"smora.k={self.k} is more than its rank of {self.rank}")

    def init(self, site, op):
        own = {k: site.uniform(self.rank, site.in_features, bound=site.in_features**-0.5, salt=k) for k in "AG"}
        own["B"] = site.zeros(site.out_features, self.rank)
        return own | {"c": Frozen(site.zeros(self.rank)), "load": site.zeros(self.rank)} if self.bias_rate else own

    def forward(self, c, x, op):
        z = op.drop(x, self.dropout)
        score = op.project(z, c["G"])  # [..., R]
        p = score.to(torch.promote_types(score.dtype, torch.float32)).sigmoid()
        p = p + c["c"] if self.bias_rate else p
        chosen = p.detach() >= p.detach().topk(self.k).values[..., -1:]
        gates = (p * chosen / (p * chosen).sum(-1, keepdim=True)).to(x.dtype)
        y = op.expand(op.project(z, c["A"]) * gates, self.alpha * c["B"], onto=op(x))
        if not self.bias_rate:
            return y
        load = chosen.flatten(0, -2).to(p.dtype).mean(0) - self.k / self.rank  # of every rank, less its fair share
        return op.penalise(y, 1e-6 * (c["load"] * load).sum())  # small, since gradients may be clipped together

    def evolve(self, parts, progress):
        for part in parts if self.bias_rate else ():
            load = part.tensors["load"]
            if load.grad is not None:
                part.tensors["c"].sub_(self.bias_rate * load.grad.sign())
            load.zero_()
