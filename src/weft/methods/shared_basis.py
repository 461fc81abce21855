"""Shared basis: a small matrix between two frozen ones that many adapters have in common."""

import math
from dataclasses import dataclass

import torch

from weft.core import Frozen, Method, option


@dataclass(frozen=True)
class SharedBasis(Method):
    """y = W x + U S V x,  U [O, R] and V [R, I] frozen, S [R, R] or diagonal.

    U and V are found for many adapters together by `weft compress --way joint`, which stores them once; in a fresh
    adapter they are random and orthonormal, and S, which is what trains, is zero.
    Brüel Gabrielsson et al. 2024, arXiv 2407.00066.
    """

    name = "shared_basis"
    paper = "2407.00066"
    rank: int = option(64, help="directions of the basis on each side", minimum=1)
    diagonal: bool = option(False, help="S has a diagonal only")

    def check(self, site):
        if site.groups > 1:
            raise ValueError(f"directions are of all channels, and this convolution has {site.groups} groups")
        if self.rank > (most := min(site.out_features, math.prod(site.shape[1:]))):
            raise ValueError(f"rank={self.rank} is more than the {most} directions that there are")

    def init(self, site, op):
        precise = torch.promote_types(site.dtype, torch.float32)
        sizes = math.prod(site.shape[1:]), site.out_features
        v, u = (torch.linalg.qr(site.normal(n, self.rank).to(precise))[0].to(site.dtype) for n in sizes)
        return {
            "U": Frozen(u),
            "V": Frozen(v.mT.reshape(self.rank, *site.shape[1:])),
            "S": site.zeros(self.rank) if self.diagonal else site.zeros(self.rank, self.rank),
        }

    def coefficients(self, t, op):
        return t if self.diagonal else {**t, "S": t["S"].unsqueeze(0)}  # one block; U and V stay those of all

    def forward(self, c, x, op):
        h = op.project(x, c["V"])
        h = op.scale(h, c["S"]) if self.diagonal else op.rotate(h, c["S"])
        return op.expand(h, c["U"], onto=op(x))
