"""PVeRA: VeRA with a learned Gaussian inside, drawn from in training and its mean used otherwise."""

from dataclasses import dataclass

import torch

from weft.core import Frozen, Method, option


@dataclass(frozen=True)
class PVeRA(Method):
    """y = W x + diag(b) B (m + e * exp(v / 2)),  m = diag(d_m) A_m drop(x),  v = diag(d_v) A_v drop(x).

    e is standard Gaussian in training and zero otherwise; A and B are frozen, random, shared and cut to size as in
    VeRA. The mean over tokens of KL(N(m, exp v) || N(0, 1)) is added to the loss, times `kl_weight`.
    Fillioux et al. 2025, arXiv 2512.07703.
    """

    name = "pvera"
    paper = "2512.07703"
    kinds = frozenset({"linear"})
    rank: int = option(256, help="inner size of the update", minimum=1)
    d_initial: float = option(0.1, help="start of d")
    kl_weight: float = option(1e-3, help="weight of the divergence from N(0, 1) in the loss", minimum=0)
    dropout: float = option(0.0, help="dropout on the update's input", minimum=0, maximum=1)
    projection_seed: int = option(0, help="seed of A and B", minimum=0)

    def shared(self, sites):
        device, dtype, r = sites[0].device, sites[0].dtype, self.rank
        wide, tall = max(s.in_features for s in sites), max(s.out_features for s in sites)
        if torch.device(device).type == "meta":
            return {
                "A": Frozen(torch.empty(2 * r, wide, device=device)),
                "B": Frozen(torch.empty(tall, r, device=device)),
            }
        generator = torch.Generator().manual_seed(self.projection_seed)  # on the CPU, A first: the numbers of PEFT
        a, b = torch.empty(2 * r, wide, device="cpu"), torch.empty(tall, r, device="cpu")
        for v in (a, b):
            v.uniform_(-((6 / v.shape[1]) ** 0.5), (6 / v.shape[1]) ** 0.5, generator=generator)
        return {"A": Frozen(a.to(device, dtype)), "B": Frozen(b.to(device, dtype))}

    def init(self, site, op):
        return {"d": self.d_initial * site.ones(2 * self.rank), "b": site.zeros(site.out_features)}

    def coefficients(self, t, op):
        a, d, b, r = t["A"][:, : op.site.in_features], t["d"], t["B"][: op.site.out_features], self.rank
        return {"A": a, "A_m": a[:r], "d_m": d[:r], "d_v": d[r:], "B": b, "b": t["b"]}

    def forward(self, c, x, op):
        y, inner = op(x), op.drop(x, self.dropout)
        if op.chance(0) is None:
            return y + op.scale(op.expand(op.scale(op.project(inner, c["A_m"]), c["d_m"]), c["B"]), c["b"])
        h_m, h_v = op.project(inner, c["A"]).chunk(2, -1)  # [..., R]
        deviation = torch.exp(op.scale(h_v, c["d_v"] / 2))
        drawn = torch.addcmul(op.scale(h_m, c["d_m"]), torch.randn_like(deviation), deviation)
        y = y + op.scale(op.expand(drawn, c["B"]), c["b"])
        square = h_m.square().flatten(0, -2).mean(0) * c["d_m"].square()  # by means over tokens: no m or v is kept
        log = h_v.flatten(0, -2).mean(0) * c["d_v"]
        divergence = (square.mean() + deviation.square().mean() - log.mean() - 1) / 2
        return op.penalise(y, self.kl_weight * divergence)
