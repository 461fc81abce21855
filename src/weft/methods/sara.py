"""SaRA: the entries of the weight that are closest to zero are trained, and kept of low rank together."""

import math
from dataclasses import dataclass

import torch

from weft.core import LINEAR, Frozen, Method, option
from weft.core.entries import added, entries, largest, scattered


@dataclass(frozen=True)
class SaRA(Method):
    """y = (W + P - W_S) x,  W_S holding the entries S of W with the smallest |w| and zeros, P trained, from W_S.

    A step adds rank_penalty |P|_* (nuclear norm) for one matrix by chance. Half-way, entries that are larger than every
    one of S was stay what they are, and the others train on. Hu et al. 2024, arXiv 2409.06633.
    """

    name = "sara"
    paper = "2409.06633"
    copies = ("values",)
    kinds = LINEAR
    share: float = option(0.1, help="part of each matrix's entries", above=0, maximum=1)
    rank_penalty: float = option(0.0005, help="weight of the nuclear norm", minimum=0)
    reselect_at: float = option(0.5, help="part of the training before entries that have grown stay", minimum=0)

    def init(self, site, op):
        weight = op.weight()
        places = largest(-weight.abs(), max(1, round(self.share * math.prod(site.shape))))
        values = weight.flatten()[places.long()]
        return {"values": values, "places": Frozen(places), "threshold": Frozen(values.abs().max().view(1))}

    def coefficients(self, t, op):
        taken = op.weight().flatten()[t["places"].long()]
        return entries(t["values"] - taken, t["places"], op.site.shape)

    def forward(self, c, x, op):
        return added(c, x, op)

    def penalty(self, t, site):
        if not self.rank_penalty or torch.rand(()) * site.count >= 1:
            return None
        matrix = scattered(t["values"], t["places"], site.shape).flatten(1)
        return self.rank_penalty * torch.linalg.matrix_norm(matrix.float(), "nuc")

    def evolve(self, parts, progress):
        if progress.share < self.reselect_at:
            return
        for part in parts:
            values = part.tensors["values"]
            if "grown" not in part.state:
                part.state["grown"] = values.abs() > part.tensors["threshold"]
                part.state["kept"] = values.clone()
                part.restart("values", torch.ones_like(part.state["grown"]))
            values.copy_(torch.where(part.state["grown"], part.state["kept"], values))
