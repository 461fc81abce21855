"""VeRA: random matrices that all layers share, and two trained vectors per layer."""

from dataclasses import dataclass

import torch

from weft.core import Frozen, Method, option


@dataclass(frozen=True)
class VeRA(Method):
    """y = W x + diag(b) B diag(d) A drop(x),  A and B frozen, random, and cut to the layer's size.

    Kopiczko et al. 2023, arXiv 2310.11454.
    """

    name = "vera"
    paper = "2310.11454"
    kinds = frozenset({"linear", "embedding", "experts"})
    rank: int = option(256, help="inner size of the update", minimum=1)
    d_initial: float = option(0.1, help="start of d")
    dropout: float = option(0.0, help="dropout on the update's input", minimum=0, maximum=1)
    projection_seed: int = option(0, help="seed of A and B", minimum=0)

    def shared(self, sites):
        device, dtype = sites[0].device, sites[0].dtype
        wide, tall = max(s.in_features for s in sites), max(s.out_features for s in sites)
        if torch.device(device).type == "meta":
            a, b = torch.empty(self.rank, wide, device=device), torch.empty(tall, self.rank, device=device)
        else:  # drawn on the CPU, A before B: the same numbers as PEFT's for the same seed, wherever the model is
            generator = torch.Generator().manual_seed(self.projection_seed)
            a, b = torch.empty(self.rank, wide, device="cpu"), torch.empty(tall, self.rank, device="cpu")
            a.uniform_(-((6 / wide) ** 0.5), (6 / wide) ** 0.5, generator=generator)
            b.uniform_(-((6 / self.rank) ** 0.5), (6 / self.rank) ** 0.5, generator=generator)
        return {"A": Frozen(a.to(device, dtype)), "B": Frozen(b.to(device, dtype))}

    def init(self, site, op):
        return {"d": self.d_initial * site.ones(self.rank), "b": site.zeros(site.out_features)}

    def coefficients(self, t, op):
        site = op.site
        return {"A": t["A"][:, : site.in_features], "B": op.with_gains(t["B"][: site.out_features], t["b"], t["d"])}

    def forward(self, c, x, op):
        return op.expand(op.project(op.drop(x, self.dropout), c["A"]), c["B"], onto=op(x))
