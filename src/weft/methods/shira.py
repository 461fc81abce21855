"""SHiRA: a few chosen entries of the weight are trained."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from weft.core import Frozen, Method, option
from weft.core.entries import added, entries


@dataclass(frozen=True)
class SHiRA(Method):
    """y = W x + S x,  S zero but for R (O + I) trained entries: as many numbers as a LoRA of the same rank has.

    mask: `random`; the largest by `magnitude` |W|, `gradient` |g|, `snip` |W g| or `grasp` W H g (Wang et al. 2020,
    2002.07376); `structured`: the diagonal and evenly spaced rows. Bhardwaj et al. 2024, arXiv 2406.13175.
    """

    name = "shira"
    paper = "2406.13175"
    rank: int = option(8, help="train rank x (O + I) entries", minimum=1)
    mask: Literal["random", "magnitude", "gradient", "snip", "grasp", "structured"] = option("random", help="which")

    def needs(self):
        return frozenset({"grasp": ["curvature"], "gradient": ["gradient"], "snip": ["gradient"]}.get(self.mask, ()))

    def check(self, site):
        rows, columns = site.out_features, math.prod(site.shape[1:])
        if self.rank * (rows + columns) > rows * columns:
            raise ValueError(
                f"rank {self.rank} trains {self.rank * (rows + columns)} entries and the weight has {rows * columns}; "
                f"use a rank of at most {rows * columns // (rows + columns)}"
            )

    def init(self, site, op):
        columns = math.prod(site.shape[1:])
        chosen = self._score(site, op).flatten().topk(self.rank * (site.out_features + columns)).indices.sort().values
        indices = torch.stack([chosen // columns, chosen % columns]).int()  # [2, entries]
        return {"values": site.zeros(indices.shape[1]), "indices": Frozen(indices)}

    def coefficients(self, t, op):
        row, column = t["indices"].long()
        return entries(t["values"], row * math.prod(op.site.shape[1:]) + column, op.site.shape)

    def forward(self, c, x, op):
        return added(c, x, op)

    def _score(self, site, op):  # what ranks the entries, [O, I * kernel]
        rows, columns = site.out_features, math.prod(site.shape[1:])
        if self.mask == "random":
            return site.uniform(rows, columns, bound=1.0)
        if self.mask == "structured":
            spread = torch.arange(rows, device=site.device) * self.rank % rows  # a row is early where this is small
            return torch.eye(rows, columns, device=site.device) * 2 * rows - spread[:, None]
        if self.mask == "grasp":
            return op.weight() * op.curvature()
        by_weight = 1 if self.mask == "gradient" else op.weight().abs()
        return by_weight * (1 if self.mask == "magnitude" else op.gradient().abs())
