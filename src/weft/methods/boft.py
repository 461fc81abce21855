"""BOFT: rotate the input by a product of sparse orthogonal matrices, as in a fast Fourier transform."""

import math
from dataclasses import dataclass

from weft.core import Method, option
from weft.core.rotations import butterfly_order, cayley


@dataclass(frozen=True)
class BOFT(Method):
    """y = diag(s) W R_1^T ... R_m^T x + b,  R_i = P_i blockdiag(cayley((A_i - A_i^T) / 2)) P_i^T.

    P_i is the i-th order of a butterfly; cayley(Q) = (I - Q)(I + Q)^-1.

    Liu et al. 2024, arXiv 2311.06243.
    """

    name = "boft"
    paper = "2311.06243"
    kinds = frozenset({"linear", "conv", "experts"})
    bias_outside = True
    block_size: int = option(4, help="channels that are rotated together", minimum=2)
    factors: int = option(1, help="m: sparse factors in the product; 1 is block-diagonal", minimum=1)

    def check(self, site):
        width, reach = math.prod(site.shape[1:]), self.block_size * 2 ** (self.factors - 1)
        if width % reach or (self.factors > 1 and self.block_size % 2):
            raise ValueError(
                f"its {width} channels are no multiple of block_size * 2^(factors - 1) = {reach}, "
                "or block_size is odd with several factors"
            )

    def init(self, site, op):
        blocks = math.prod(site.shape[1:]) // self.block_size
        return {
            "A": site.zeros(self.factors, blocks, self.block_size, self.block_size),
            "s": site.ones(site.out_features),
        }

    def coefficients(self, t, op):
        r = cayley((t["A"] - t["A"].mT) / 2)  # [m, N, block, block]
        width = r.shape[1] * r.shape[2]
        orders = [butterfly_order(width, self.block_size, level, r.device) for level in range(self.factors)]
        if op.site.kind != "conv":
            each = [{f"R{i}": r[i].mT, f"order{i}": o, f"back{i}": o.argsort()} for i, o in enumerate(orders)]
            return {"s": t["s"], **{k: v for c in each for k, v in c.items()}}
        w = op.weight().flatten(1).to(r.dtype)  # a kernel's channels and positions are rotated together
        for q, order in zip(r, orders, strict=True):
            turned = w[:, order.argsort()].unflatten(1, (-1, 1, self.block_size)) @ q.mT  # [O, N, 1, block]
            w = turned.flatten(1)[:, order]
        return {"s": t["s"], "weight": w.view(op.site.shape)}

    def forward(self, c, x, op):
        if "weight" in c:
            return op.scale(op.project(x, c["weight"]), c["s"])
        for i in reversed(range(self.factors)):
            x = op.permute(op.rotate(op.permute(x, c[f"back{i}"]), c[f"R{i}"]), c[f"order{i}"])
        return op.scale(op(x), c["s"])
