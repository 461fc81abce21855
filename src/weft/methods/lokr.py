"""LoKr: a Kronecker product of two small matrices, each of low rank where that is smaller."""

import math
from dataclasses import dataclass

import torch

from weft.core import Method, option


@dataclass(frozen=True)
class LoKr(Method):
    """y = W x + (alpha / R) (w1 ⊗ w2) x,  w1 [a, c], w2 [b, d, *kernel], O = a b, I = c d.

    Yeh et al. 2023 (LyCORIS), arXiv 2309.14859; Edalati et al. 2022 (KronA), arXiv 2212.10650.
    """

    name = "lokr"
    paper = "2309.14859"
    rank: int = option(8, help="inner size of a factor that is itself a product", minimum=1)
    alpha: float = option(8.0, help="scale numerator", above=0)
    decompose_both: bool = option(False, help="make the first factor a product as well")
    decompose_factor: int | None = option(None, help="size of the first factor; by default near sqrt", minimum=1)
    effective_conv: bool = option(False, help="factor the kernel of w2 as well (FedPara's proposition 3)")

    def init(self, site, op):
        (a, b), (c, d), r, kernel = *map(self._split, site.shape[:2]), self.rank, site.shape[2:]
        zero, draw = {"w1": site.zeros(a, c)}, {"w2_a": (b, r), "w2_b": (r, d * math.prod(kernel))}
        if r >= max(b, d) / 2:
            draw = {"w2": (b, d, *kernel)}
        elif self.effective_conv and math.prod(kernel) > 1:
            draw = {"t2": (r, r, *kernel), "w2_a": (r, b), "w2_b": (r, d)}
        if self.decompose_both and r < max(a, c) / 2:
            zero, draw["w1_b"] = {"w1_a": site.zeros(a, r)}, (r, c)
        return zero | {k: site.uniform(*v, bound=math.prod(v[1:]) ** -0.5, salt=k) for k, v in draw.items()}

    def coefficients(self, t, op):
        w1 = self.alpha / self.rank * (t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"])
        w2 = t["w2"] if "w2" in t else None if "t2" in t else t["w2_a"] @ t["w2_b"]
        if w2 is None:
            w2 = torch.einsum("ij...,ip,jr->pr...", t["t2"], t["w2_a"], t["w2_b"])  # [b, d, *kernel]
        if op.site.kind != "linear":
            return {"delta": torch.kron(w1, w2.flatten(1)).view(op.site.shape)}
        return {"w1": w1, "w2": w2}

    def forward(self, c, x, op):
        if "delta" in c:
            return op.with_delta(x, c["delta"])
        return op(x) + op.kron(x, c["w1"], c["w2"])

    def _split(self, size):
        """Two factors of `size`: the wanted one first, else the most equal ones with the smaller first."""
        first = self.decompose_factor or size
        if size % first or self.decompose_factor is None:
            first = max(m for m in range(1, min(math.isqrt(size), first) + 1) if size % m == 0)
        return first, size // first
