"""BOFT: rotate the input by a product of sparse orthogonal matrices, as in a fast Fourier transform."""

import math
from dataclasses import dataclass

import torch

from weft.core import Method, option
from weft.core.rotations import butterfly_order, cayley, join_blocks


@dataclass(frozen=True)
class BOFT(Method):
    """y = diag(s) W R_1^T ... R_m^T x + b,  R_i = P_i blockdiag(cayley((A_i - A_i^T) / 2)) P_i^T.

    P_i is the i-th order of a butterfly; cayley(Q) = (I - Q)(I + Q)^-1. Liu et al. 2024, arXiv 2311.06243.
    """

    name = "boft"
    paper = "2311.06243"
    kinds = frozenset({"linear", "conv", "experts"})
    bias_outside = True
    block_size: int = option(4, help="channels that are rotated together", minimum=2)
    factors: int = option(1, help="m: sparse factors in the product; 1 is block-diagonal", minimum=1)

    def check(self, site):
        width, reach = math.prod(site.shape[1:]), self.block_size << (self.factors - 1)
        if width % reach or (self.factors > 1 and self.block_size % 2):
            raise ValueError(f"its {width} channels are no multiple of {reach}, or block_size is odd and factors > 1")

    def init(self, site, op):
        blocks, size = math.prod(site.shape[1:]) // self.block_size, self.block_size
        return {"A": site.zeros(self.factors, blocks, size, size), "s": site.ones(site.out_features)}

    def coefficients(self, t, op):
        steps = self._steps(cayley((t["A"] - t["A"].mT) / 2).mT)
        if op.site.kind != "conv":
            each = [{f"R{i}": q, f"order{i}": o, f"back{i}": o.argsort()} for i, (q, o) in enumerate(steps)]
            return {"s": t["s"], **{k: v for c in each for k, v in c.items()}}
        w = op.weight().flatten(1).to(t["A"].dtype)  # a kernel's channels and positions are rotated together
        for q, order in steps:
            w = (w[:, order.argsort()].unflatten(1, (len(q), 1, -1)) @ q).flatten(1)[:, order]
        return {"s": t["s"], "weight": w.view(op.site.shape)}

    def _steps(self, r):
        """Block rotations and the orders around them; factors that reach at most 32 channels are one rotation."""
        width, near = r.shape[1] * r.shape[2], sum(self.block_size << i <= 32 for i in range(self.factors)) or 1
        joined = join_blocks(r[0], 2 ** (near - 1))
        for level in range(1, near):
            order = butterfly_order(joined.shape[-1], self.block_size, level, r.device)
            joined = joined @ join_blocks(r[level], 2 ** (near - 1))[:, order][:, :, order]
        far = [(r[i], butterfly_order(width, self.block_size, i, r.device)) for i in range(near, self.factors)]
        return [(joined, torch.arange(width, device=r.device)), *far]

    def forward(self, c, x, op):
        if "weight" in c:
            return op.scale(op.project(x, c["weight"]), c["s"])
        for i in reversed(range(1, sum(name.startswith("R") for name in c))):
            x = op.permute(op.rotate(op.permute(x, c[f"back{i}"]), c[f"R{i}"]), c[f"order{i}"])
        return op.scale(op(op.rotate(x, c["R0"])), c["s"])
