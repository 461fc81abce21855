"""ETHER: reflect blocks of the input at trained hyperplanes; ETHER+ transforms the outputs as well."""

from dataclasses import dataclass

import torch

from weft.core import Frozen, Method, option


@dataclass(frozen=True)
class ETHER(Method):
    """y = W H(u) H(u0) x + b, H(u) = I - 2 u u^T in blocks, |u| = 1; u0 is the start of u, and undoes it at first.

    ETHER+ (`plus`): y = G(p, q) W G(u, v) x + b, G(u, v) = I - u u^T + v v^T, where v starts as u and q as p.
    Bini et al. 2024, arXiv 2405.20271.
    """

    name = "ether"
    paper = "2405.20271"
    kinds = frozenset({"linear", "conv", "experts"})
    bias_outside = True
    num_blocks: int = option(4, help="blocks that turn on their own; divides the numbers of channels", minimum=1)
    plus: bool = option(False, help="ETHER+: two vectors a side, on both sides")

    def check(self, site):
        sizes = [site.in_features, site.out_features] if self.plus else [site.in_features]
        if any(size % self.num_blocks for size in sizes):
            raise ValueError(f"num_blocks={self.num_blocks} does not divide its channels: {sizes}")

    def init(self, site, op):
        u = site.normal(self.num_blocks, site.in_features // self.num_blocks, salt="u")
        if not self.plus:
            return {"u": u, "u0": Frozen(u.clone())}
        p = site.normal(self.num_blocks, site.out_features // self.num_blocks, salt="p")
        return {"u": u, "v": u.clone(), "p": p, "q": p.clone()}

    def coefficients(self, t, op):
        unit = {k: v / v.norm(dim=-1, keepdim=True) for k, v in t.items()}  # [N, block]
        if op.site.kind == "conv":  # a reflection of channels under a kernel is no pointwise update
            return {k: v.unsqueeze(1) for k, v in unit.items()}
        # W plus an update of rank 2 N (4 N) is the same map, without copies of x
        w, rows = op.weight().to(t["u"].dtype), {k: torch.block_diag(*v.unsqueeze(1)) for k, v in unit.items()}
        u, v = rows["u"], rows["v" if self.plus else "u0"]  # [N, I]
        a, wu, wv = torch.cat([u, v]), w @ u.mT, w @ v.mT
        if not self.plus:  # H(u) H(u0) = I - 2 u u^T - 2 u0 u0^T + 4 u (u^T u0) u0^T
            return {"A": a, "B": torch.cat([-2 * wu, 4 * wu @ (u @ v.mT) - 2 * wv], 1)}
        b, pq = torch.cat([-wu, wv], 1), torch.cat([rows["p"], rows["q"]])  # pq [2 N, O] reads W G(u, v)
        return {"A": torch.cat([a, pq @ w + pq @ b @ a]), "B": torch.cat([b, -rows["p"].mT, rows["q"].mT], 1)}

    def forward(self, c, x, op):
        def along(y, u):  # u u^T y, block by block
            return op.rotate(op.rotate(y, u), u.mT)

        if "A" in c:
            return op.expand(op.project(x, c["A"]), c["B"], onto=op(x))
        if not self.plus:
            x = x - 2 * along(x, c["u0"])
            return op(x - 2 * along(x, c["u"]))
        y = op(x - along(x, c["u"]) + along(x, c["v"]))
        return y - along(y, c["p"]) + along(y, c["q"])
