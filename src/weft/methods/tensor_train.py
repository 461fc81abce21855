"""Tensor train: low-rank updates whose outer factors are shared across layers."""

import math
from dataclasses import dataclass

from weft.core import Method, option


@dataclass(frozen=True)
class TensorTrain(Method):
    """y = W x + (alpha / R) B G_s A x,  with one A [R, I] and B [O, R] for all sites s of a shape.

    The core G_s [R, R] starts at zero. Bershatsky et al. 2024 (LoTR), arXiv 2402.01376.
    """

    name = "tensor_train"
    paper = "2402.01376"
    rank: int = option(32, help="size of the cores", minimum=1)
    alpha: float = option(32.0, help="scale numerator", above=0)

    def shared(self, sites):
        t = {}
        for site in sites:
            a, b = _names(site)
            if a not in t:
                t[a] = site.uniform(self.rank, *site.shape[1:], bound=math.prod(site.shape[1:]) ** -0.5, salt="A")
                t[b] = site.uniform(site.out_features, self.rank, bound=self.rank**-0.5, salt="B")
        return t

    def init(self, site, op):
        return {"G": site.zeros(self.rank, self.rank)}

    def coefficients(self, t, op):
        a, b = (t[name] for name in _names(op.site))
        b = (self.alpha / self.rank) * b @ t["G"]  # [O, R]
        if op.site.groups > 1:  # every group reads all of A, which no grouped `expand` can say
            return {"delta": (b @ a.flatten(1)).view(op.site.shape)}
        return {"A": a, "B": b}

    def forward(self, c, x, op):
        if "delta" in c:
            return op.with_delta(x, c["delta"])
        return op.expand(op.project(x, c["A"]), c["B"], onto=op(x))


def _names(site):
    """What the outer cores of this site's shape are called."""
    shape = "x".join(map(str, site.shape))
    return f"A_{shape}", f"B_{shape}"
