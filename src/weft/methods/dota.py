"""DoTA: the weight's own matrix product decomposition trains, and what it leaves out stays frozen."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from weft.core import Frozen, Method, option
from weft.core.tensors import chain, drop_directions, factors, matrix_chain, packed_bonds


@dataclass(frozen=True)
class DoTA(Method):
    """y = (W - M0) x + M x,  M[o1 ... on, i1 ... in] = T1[o1, i1] T2[o2, i2] ... Tn[on, in].

    The cores Tk [r, o, i, r'] start as the decomposition of W with bonds of at most R, of which M0 keeps a copy.
    With a tolerance, directions of a bond with small singular values are dropped for good, every so many steps.
    Hu et al. 2024, arXiv 2412.20891. Drops: Stoudenmire & Schwab 2016, 1605.05775; choose: Ghadiri 2023, 2302.03886.
    """

    name = "dota"
    paper = "2412.20891"
    rank: int = option(16, help="largest size of a bond between cores (R)", minimum=1)
    num_cores: int = option(3, help="cores of the decomposition (n)", minimum=2)
    choose: Literal["rank", "weight"] = option("rank", help="bonds of size rank, or of as many numbers fitted to W")
    bonds: tuple[int, ...] = option((), help="the sizes of the bonds, instead of rank; chosen where choose is weight")
    tolerance: float = option(0.0, help="share of a bond's largest singular value to drop below", minimum=0, maximum=1)
    drop_every: int = option(100, help="steps between two droppings", minimum=1)

    def check(self, site):
        if len(self.bonds) not in (0, self.num_cores - 1) or min(self.bonds, default=1) < 1:
            raise ValueError(f"bonds={self.bonds}: {self.num_cores} cores have {self.num_cores - 1} bonds")

    def deal(self, sites, ops):
        if self.choose == "rank" or self.bonds:
            return super().deal(sites, ops)
        each = zip(map(self._sizes, sites), ops, strict=True)
        return [replace(self, bonds=packed_bonds(op.weight(), *sizes, self.rank)) for sizes, op in each]

    def init(self, site, op):
        w = op.weight().flatten(1).to(torch.promote_types(site.dtype, torch.float32))
        cores = [c.to(site.dtype).contiguous() for c in matrix_chain(w, *self._sizes(site), self.bonds or self.rank)]
        starts = {f"start{k}": Frozen(core.clone()) for k, core in enumerate(cores)}
        return {f"core{k}": core for k, core in enumerate(cores)} | starts

    def coefficients(self, t, op):
        now, before = ([t[f"{name}{k}"] for k in range(self.num_cores)] for name in ("core", "start"))
        left = torch.cat([chain(now[:-1]), -chain(before[:-1])], -1)  # [1, o, i, 2 R]: both are multiplied out at once
        return {"delta": chain([left, torch.cat([now[-1], before[-1]])]).view(op.site.shape)}

    def forward(self, c, x, op):
        return op.with_delta(x, c["delta"])

    def evolve(self, parts, progress):
        if self.tolerance and progress.step % self.drop_every == 0:
            drop_directions(parts, [f"core{k}" for k in range(self.num_cores)], self.tolerance)

    def _sizes(self, site) -> tuple[tuple[int, ...], tuple[int, ...]]:  # of every core: large rows have small columns
        return factors(site.out_features, self.num_cores), factors(math.prod(site.shape[1:]), self.num_cores)[::-1]
