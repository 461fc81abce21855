"""DoRA: LoRA on the direction of every row of the weight, and a trained length."""

from dataclasses import dataclass

import torch

from weft.core import Method, option
from weft.core.starts import check_start, low_rank


@dataclass(frozen=True)
class DoRA(Method):
    """y = diag(m / |W + s B A|) (W x + s B A drop(x)),  |.| the length of each row, a constant for autograd (sec. 4.3).

    |W + s B A|^2 = |W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B> by rows: no matrix of W's size is built.

    Liu et al. 2024, arXiv 2402.09353.
    """

    name = "dora"
    paper = "2402.09353"
    pairs = (("A", "B"),)
    bias_outside = True
    rank: int = option(8, help="inner size of the update", minimum=1)
    alpha: float = option(16.0, help="scale numerator", above=0)
    rank_stabilised: bool = option(False, help="scale by alpha / sqrt(rank) instead of alpha / rank")
    dropout: float = option(0.0, help="dropout on the update's input", minimum=0, maximum=1)

    @property
    def scale(self) -> float:
        """s of the equation."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    def check(self, site):
        check_start("kaiming", site, rank=self.rank)

    def init(self, site, op):
        a, b = low_rank("kaiming", site, op, rank=self.rank, scale=self.scale)
        return {"A": a, "B": b, "magnitude": torch.linalg.vector_norm(op.weight().flatten(1), dim=1)}

    def coefficients(self, t, op):
        groups = op.site.groups
        b = self.scale * t["B"]
        w, a_rows, b_rows = (  # [G, O / G, I], [G, R / G, I], [G, O / G, R / G]
            v.detach().flatten(1).unflatten(0, (groups, -1)) for v in (op.weight(), t["A"], b)
        )
        length = torch.linalg.vector_norm(w, dim=-1, dtype=torch.promote_types(w.dtype, b.dtype))
        cross = (w @ a_rows.mT.to(w.dtype)).to(b.dtype)  # W A^T
        square = length**2 + ((2 * cross + b_rows @ (a_rows @ a_rows.mT)) * b_rows).sum(-1)
        # rounding may take the square of a row of zeros just below zero
        gain = t["magnitude"] / square.clamp_min(torch.finfo(b.dtype).tiny).sqrt().flatten()
        return {"A": t["A"], "B": b, "gain": gain}

    def forward(self, c, x, op):
        return op.scale(op.expand(op.project(op.drop(x, self.dropout), c["A"]), c["B"], onto=op(x)), c["gain"])
