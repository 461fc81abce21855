"""GraLoRA: the weight is cut into blocks, and each block has a low-rank update of its own."""

import math
from dataclasses import dataclass

import torch

from weft.core import Method, option
from weft.core.starts import low_rank


@dataclass(frozen=True)
class GraLoRA(Method):
    """y = W x + s (D + B' A') drop(x),  D_jn = B_jn A_nj  for block j of the outputs and block n of the inputs.

    Each of the K^2 blocks has rank R / K, so D has rank K R with as many numbers as a LoRA of rank R; B' A' is a plain
    update of rank R' (hybrid), s = alpha / (R + R'). Jung et al. 2025, arXiv 2505.20355.
    """

    name = "gralora"
    paper = "2505.20355"
    rank: int = option(32, help="ranks of the blocks of one row together", minimum=1)
    alpha: float = option(64.0, help="scale numerator", above=0)
    num_blocks: int = option(2, help="blocks per side (K)", minimum=1)
    hybrid_rank: int = option(0, help="rank of a plain update beside the blocks", minimum=0)
    dropout: float = option(0.0, help="dropout on the update's input", minimum=0, maximum=1)

    def check(self, site):
        for what, size in (("rank", self.rank), ("outputs", site.out_features), ("inputs", site.in_features)):
            if size % self.num_blocks:
                raise ValueError(f"{what} {size} is no multiple of num_blocks={self.num_blocks}")
        if site.groups > 1:
            raise ValueError(f"a convolution with {site.groups} groups is cut into blocks already")

    def init(self, site, op):
        k, r = self.num_blocks, self.rank
        a, b = (k, r, site.in_features // k, *site.kernel_size), (k, site.out_features // k, r)
        t = {"A": site.uniform(*a, bound=math.prod(a[2:]) ** -0.5), "B": site.zeros(*b)}
        if site.kind == "embedding":  # rows are looked up, not summed: B is the random one
            t = {"A": site.zeros(*a), "B": site.normal(*b)}
        if self.hybrid_rank:
            t["A_general"], t["B_general"] = low_rank("kaiming", site, op, rank=self.hybrid_rank, scale=1.0)
        return t

    def coefficients(self, t, op):
        k, r, scale, like = self.num_blocks, self.rank, self.alpha / (self.rank + self.hybrid_rank), t["A"]
        if op.site.kind == "linear" and torch.is_grad_enabled() and not self.hybrid_rank:  # no zeros between the blocks
            order = torch.arange(k * r, device=like.device).view(k, k, -1).transpose(0, 1).flatten()
            return {"A": t["A"], "B": scale * t["B"], "order": order}
        eye = torch.eye(k, dtype=like.dtype, device=like.device)
        a = torch.einsum("nm,nri...->nrmi...", eye, t["A"]).reshape(k * r, -1, *op.site.kernel_size)  # rows (n, j, s)
        b = scale * torch.einsum("jm,jons->jonms", eye, t["B"].unflatten(2, (k, r // k))).reshape(-1, k * r)
        if self.hybrid_rank:
            a, b = torch.cat([a, t["A_general"]]), torch.cat([b, scale * t["B_general"]], 1)
        return {"A": a, "B": b}

    def forward(self, c, x, op):
        if "order" in c:
            return op(x) + op.rotate(op.permute(op.rotate(op.drop(x, self.dropout), c["A"]), c["order"]), c["B"])
        return op.expand(op.project(op.drop(x, self.dropout), c["A"]), c["B"], onto=op(x))
