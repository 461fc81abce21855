"""SVFT: a sparse map between the singular vectors of the weight."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from weft.core import Frozen, Method, option


@dataclass(frozen=True)
class SVFT(Method):
    """y = W x + U M V x,  W = U S V (singular vectors: saved, not trained), M [K, K] sparse and trained.

    pattern: `plain`, the diagonal; `banded`, `width` diagonals on each side too; `random`, as many entries anywhere;
    `top_k`, where left and right singular vectors agree most, |u_i . v_j|. Lingam et al. 2024, arXiv 2405.19597.
    """

    name = "svft"
    paper = "2405.19597"
    pattern: Literal["plain", "banded", "random", "top_k"] = option("banded", help="which entries of M train")
    width: int = option(2, help="diagonals on each side of the main one", minimum=1)

    def check(self, site):
        rows, columns = site.out_features, math.prod(site.shape[1:])
        if self.pattern == "top_k" and rows != columns:
            raise ValueError(
                f"pattern='top_k' compares left with right singular vectors, which have {rows} and {columns} entries; "
                "use 'banded' or 'random' where the weight is not square"
            )

    def init(self, site, op):
        u, _, v = torch.linalg.svd(op.weight().flatten(1), full_matrices=False)  # [O, K], [K, I]
        size, offset = len(v), torch.arange(len(v), device=site.device)
        width = 0 if self.pattern == "plain" else min(self.width, size - 1)
        score = -(offset[:, None] - offset).abs()  # [K, K]
        if self.pattern in ("random", "top_k"):
            score = site.uniform(size, size, bound=1.0) if self.pattern == "random" else (u.mT @ v.mT).abs()
        count = size * (2 * width + 1) - width * (width + 1)
        places = score.flatten().topk(count).indices.sort().values.int()
        frozen = {"places": places, "U": u.contiguous(), "V": v.reshape(size, *site.shape[1:])}
        return {"M": site.zeros(count)} | {k: Frozen(tensor) for k, tensor in frozen.items()}

    def coefficients(self, t, op):
        if self.pattern == "plain":
            return {"delta": ((t["U"] * t["M"]) @ t["V"].flatten(1)).view(op.site.shape)}
        size = len(t["V"])
        m = t["M"].new_zeros(size * size).scatter(0, t["places"].long(), t["M"]).view(size, size)
        return {"delta": (t["U"] @ m @ t["V"].flatten(1)).view(op.site.shape)}

    def forward(self, c, x, op):
        # three maps of W's size on every token would cost more than one new weight
        return op.with_delta(x, c["delta"])
