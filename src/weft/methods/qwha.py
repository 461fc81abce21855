"""QWHA: a sparse update in the Walsh-Hadamard domain, which can start by making up for a quantisation error."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from weft.core import Frozen, Method, option
from weft.core.hadamard import allocate, refit, transform


@dataclass(frozen=True)
class QWHA(Method):
    """y = W x + s F H x,  H the orthonormal Walsh-Hadamard matrix, F [O, I] zero but for R (O + I) trained entries.

    start: `zero` puts zeros at random places; `repair` gives every output entries in proportion to its quantisation
    error, takes those that matter most for the data, and refits their values. Where I is no power of two, H is one of
    each block of the largest power of two that divides it. Jeon et al. 2025, arXiv 2509.17428.
    """

    name = "qwha"
    paper = "2509.17428"
    rank: int = option(8, help="train rank x (O + I) entries", minimum=1)
    scaling: float = option(1.0, help="factor on the update", above=0)
    start: Literal["zero", "repair"] = option("zero", help="repair needs data and a base that Weft quantises")

    def needs(self):
        return frozenset({"original", "covariance"} if self.start == "repair" else ())

    def check(self, site):
        if self._total(site) > math.prod(site.shape):
            entries = f"{self._total(site)} entries and the weight has {math.prod(site.shape)}"
            raise ValueError(f"rank {self.rank} trains {entries}; use a smaller rank")
        if self.start == "repair" and site.kind != "linear":
            raise ValueError(f"start='repair' repairs a quantised linear layer; this is a site of kind {site.kind}")

    def init(self, site, op):
        total = self._total(site)
        if self.start == "zero" or torch.device(site.device).type == "meta":
            random = site.uniform(math.prod(site.shape), bound=1.0)
            places, values = random.topk(total).indices.sort().values, site.zeros(total)
        else:
            c = op.covariance()
            c = c + 1e-4 * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype, device=c.device)
            spectrum = transform(op.original().to(c) - op.weight().to(c))  # [O, I]: the whole error, were F dense
            places, values = refit(spectrum, transform(transform(c).mT), allocate(spectrum, total))
        return {"values": values.to(site.dtype) / self.scaling, "places": Frozen(places.int())}

    def coefficients(self, t, op):
        flat = t["values"].new_zeros(math.prod(op.site.shape)).scatter(0, t["places"].long(), t["values"])
        delta = self.scaling * transform(flat.view(op.site.out_features, -1))
        return {"delta": delta.view(op.site.shape)}  # [O, I, *kernel]

    def forward(self, c, x, op):
        return op(x) + op.project(x, c["delta"])

    def _total(self, site):
        return self.rank * (site.out_features + math.prod(site.shape[1:]))
