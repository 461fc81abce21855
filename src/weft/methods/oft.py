"""OFT: rotate blocks of the input by trained orthogonal matrices."""

import math
from dataclasses import dataclass

import torch

from weft.core import Method, option
from weft.core.rotations import cayley, cayley_series, skew


@dataclass(frozen=True)
class OFT(Method):
    """y = W blockdiag(R)^T x + b,  R = (I - Q)(I + Q)^-1, Q skew; at an embedding the outputs are rotated.

    With `neumann_terms`, R = I + 2 Q + 2 Q^2 + ... + Q^(terms - 1). With `constrained`, |Q| <= eps / sqrt(N) (COFT).

    Qiu et al. 2023, arXiv 2306.07280; on the input side: Qiu et al. 2025, arXiv 2506.19847.
    """

    name = "oft"
    paper = "2306.07280"
    block_size: int = option(32, help="channels that are rotated together; divides the number of channels", minimum=2)
    neumann_terms: int | None = option(5, help="terms of the inverse's series; null: the exact inverse", minimum=4)
    constrained: bool = option(False, help="keep the rotation near the identity (COFT)")
    eps: float = option(6e-5, help="how near, for constrained", above=0)
    block_share: bool = option(False, help="one rotation for all blocks")

    def check(self, site):
        if _width(site) % self.block_size:
            raise ValueError(f"block_size={self.block_size} does not divide its {_width(site)} channels")

    def init(self, site, op):
        blocks = 1 if self.block_share else _width(site) // self.block_size
        return {"weight": site.zeros(blocks, self.block_size * (self.block_size - 1) // 2)}

    def coefficients(self, t, op):
        blocks = _width(op.site) // self.block_size
        q = skew(t["weight"], self.block_size)
        if self.constrained:
            bound = self.eps / len(q) ** 0.5
            q = q * (bound / torch.linalg.vector_norm(q, dim=(1, 2), keepdim=True).clamp_min(bound))
        r = cayley(q) if self.neumann_terms is None else cayley_series(q, self.neumann_terms)
        r = r.expand(blocks, -1, -1)
        if op.site.kind != "conv":
            return {"R": r.mT}
        w = op.weight()  # a kernel's channels and positions are rotated together, which no rotation of its input is
        rows = w.flatten(1).unflatten(1, (blocks, 1, -1)).to(r.dtype)  # [O, N, 1, block]
        return {"weight": (rows @ r.mT).view(w.shape)}

    def forward(self, c, x, op):
        if "weight" in c:
            y, bias = op.project(x, c["weight"]), op.bias()
            return y if bias is None else op.shift(y, bias)
        return op.rotate(op(x), c["R"]) if op.site.kind == "embedding" else op(op.rotate(x, c["R"]))


def _width(site):
    return site.out_features if site.kind == "embedding" else math.prod(site.shape[1:])
