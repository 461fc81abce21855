"""LoHa: the Hadamard product of two low-rank products, of rank up to R^2."""

import math
from dataclasses import dataclass

import torch

from weft.core import Method, option


@dataclass(frozen=True)
class LoHa(Method):
    """y = W x + (alpha / R) ((B1 A1) * (B2 A2)) x,  * elementwise.

    The product has the factors [b1_i * b2_j] [a1_i * a2_j] of rank R^2, which are used where they are the cheaper form.

    Hyeon-Woo et al. 2021 (FedPara), arXiv 2108.06098; Yeh et al. 2023 (LyCORIS), arXiv 2309.14859.
    """

    name = "loha"
    paper = "2108.06098"
    rank: int = option(8, help="inner size of both products", minimum=1)
    alpha: float = option(8.0, help="scale numerator", above=0)
    effective_conv: bool = option(False, help="factor the kernel as well (FedPara's proposition 3)")

    def init(self, site, op):
        rows, columns, r = site.out_features, math.prod(site.shape[1:]), self.rank
        core = self.effective_conv and math.prod(site.shape[2:]) > 1
        b, a = ((r, rows), (r, site.shape[1])) if core else ((rows, r), (r, columns))
        t = {
            "w1_b": site.uniform(*b, bound=b[1] ** -0.5, salt="1"),
            "w1_a": site.uniform(*a, bound=a[1] ** -0.5, salt="1"),
            "w2_b": site.uniform(*b, bound=b[1] ** -0.5, salt="2"),
            "w2_a": site.zeros(*a),
        }
        if core:
            kernel = site.shape[2:]
            bound = (r * math.prod(kernel)) ** -0.5
            t |= {f"t{n}": site.uniform(r, r, *kernel, bound=bound, salt=f"core {n}") for n in (1, 2)}
        return t

    def coefficients(self, t, op):
        scale, site = self.alpha / self.rank, op.site
        rows, columns = site.out_features, math.prod(site.shape[1:])
        if "t1" in t:
            one, two = (torch.einsum("ij...,jc,ir->rc...", t[f"t{n}"], t[f"w{n}_a"], t[f"w{n}_b"]) for n in (1, 2))
            return {"delta": scale * one * two}
        if site.groups > 1 or self.rank**2 * (rows + columns) >= rows * columns:
            return {"delta": scale * ((t["w1_b"] @ t["w1_a"]) * (t["w2_b"] @ t["w2_a"])).view(site.shape)}
        a = (t["w1_a"][:, None] * t["w2_a"]).view(-1, *site.shape[1:])  # [R^2, I, *kernel]
        b = (t["w1_b"][:, :, None] * t["w2_b"][:, None]).flatten(1)  # [O, R^2]
        return {"A": a, "B": scale * b}

    def forward(self, c, x, op):
        if "delta" in c:
            return op.with_delta(x, c["delta"])
        return op.expand(op.project(x, c["A"]), c["B"], onto=op(x))
