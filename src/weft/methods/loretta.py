"""LoRETTA: low-rank updates or bottleneck adapters whose two matrices are tensor trains."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from weft.core import LINEAR, Method, option
from weft.core.tensors import chain, factors, grow_bonds, trains


@dataclass(frozen=True)
class LoRETTA(Method):
    """reparameterised: h = W x + (alpha / R) B A x,  adapter: h = y + B tanh(A y + a) + b,  y = W x or a block of x.

    A[r, i1 ... in] = G1[i1] ... Gn[in] Gn+1[r], B alike with cores of its own; the last core of B starts at zero.
    Yang et al. 2024, arXiv 2402.11417; its adapter without gradients: Yang et al. 2024 (AdaZeta), 2406.18060. Growths:
    Hashemizadeh et al. 2020, 2008.05437, where each bond is tried; here the one whose next row is steepest in the loss.
    """

    name = "loretta"
    paper = "2402.11417"
    kinds = LINEAR | {"block"}
    form: Literal["reparameterised", "adapter"] = option("reparameterised", help="an update, or a bottleneck after it")
    rank: int = option(8, help="inner size of the update, or of the bottleneck", minimum=1)
    bond: int = option(5, help="largest size of a bond between cores", minimum=1)
    num_cores: int = option(3, help="cores that the wide side of a matrix is cut into (n)", minimum=1)
    growths: int = option(0, help="of a site's bonds, from 1, in the first half of the steps; 0: none", minimum=0)
    alpha: float = option(8.0, help="scale numerator of the update", above=0)

    def check(self, site):
        if (self.form == "adapter") != (site.kind == "block") and site.kind != "linear":
            raise ValueError(f"form={self.form!r} does not fit a site of kind {site.kind!r}")
        if site.groups > 1:
            raise ValueError(f"the update reads all channels, and this convolution has {site.groups} groups")

    def init(self, site, op):
        read = site.out_features if self.form == "adapter" else math.prod(site.shape[1:])
        sizes = {n: (*factors(size, self.num_cores), self.rank) for n, size in (("A", read), ("B", site.out_features))}
        t = trains(site, sizes, self.bond, growing=self.growths > 0)
        t[f"B{self.num_cores}"].zero_()
        return t | ({"a": site.zeros(self.rank), "b": site.zeros(site.out_features)} if self.form == "adapter" else {})

    def coefficients(self, t, op):
        a, b = (chain([t[f"{n}{k}"] for k in range(self.num_cores + 1)]).view(-1, self.rank) for n in "AB")
        shape, scale = ((-1,), 1.0) if self.form == "adapter" else (op.site.shape[1:], self.alpha / self.rank)
        return {k: t[k] for k in "ab" if k in t} | {"A": a.mT.reshape(self.rank, *shape), "B": scale * b}

    def forward(self, c, x, op):
        if self.form == "reparameterised":
            return op.expand(op.project(x, c["A"]), c["B"], onto=op(x))
        y = op(x)
        return y + op.shift(op.expand(torch.tanh(op.shift(op.expand(y, c["A"]), c["a"])), c["B"]), c["b"])

    def evolves(self):
        return self.growths > 0

    def evolve(self, parts, progress):
        grow_bonds(parts, [f"{n}{k}" for n in "AB" for k in range(1, self.num_cores + 1)], self.growths, progress)
