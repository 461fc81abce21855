"""SpIEL: a few entries are trained; now and then those nearest to their start make room for more promising ones."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from weft.core import Frozen, Method, option
from weft.core.entries import added, entries, exchange, largest, observe


@dataclass(frozen=True)
class SpIEL(Method):
    """y = (W + S) x,  S zero but for trained entries, at random places first. Every `interval` steps some of them, with
    the smallest |S|, are dropped for the untrained ones with the largest

    `moments`: r_i c_j, the SM3 estimate of squared gradients, made of the gradients of the entries that train;
    `gradients`: |sum of gradients since then|, of candidates drawn with chances sqrt(r_i c_j): these are in S as well,
    trained, and set back to zero after every step.

    Ansell et al. 2024, arXiv 2401.16405.
    """

    name = "spiel"
    paper = "2401.16405"
    kinds = frozenset({"linear", "conv", "embedding"})
    density: float = option(0.01, help="part of each matrix's entries", above=0, maximum=0.3)
    regrow: Literal["gradients", "moments"] = option("gradients", help="which entries are promising")
    interval: int = option(20, help="steps between two selections", minimum=1)
    rate: float = option(
        0.2, help="part that is dropped at first; it falls to 0 with the training", minimum=0, maximum=1
    )

    def init(self, site, op):
        count, score = (
            max(1, round(self.density * math.prod(site.shape))),
            site.uniform(math.prod(site.shape), bound=1.0),
        )
        t = {"values": site.zeros(count), "places": Frozen(largest(score, count))}
        others = {"candidates": site.zeros(count), "candidate_places": Frozen(largest(-score, count))}
        return t | others if self.regrow == "gradients" else t

    def coefficients(self, t, op):
        values, places = t["values"], t["places"]
        if "candidates" in t:
            values, places = torch.cat([values, t["candidates"]]), torch.cat([places, t["candidate_places"]])
        return entries(values, places, op.site.shape)

    def forward(self, c, x, op):
        return added(c, x, op)

    def evolve(self, parts, progress):
        for part in parts:
            observe(part)
            if progress.step % self.interval == 0:
                exchange(part, int(self.rate * (1 - progress.share) * len(part.tensors["values"])))
