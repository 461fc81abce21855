"""FRoD: the weights of a role share one basis, in which each is scaled and rotated by a few numbers."""

from dataclasses import dataclass

import torch

from weft.core import Frozen, Method, option
from weft.core.joint import basis, in_basis, off_diagonal


@dataclass(frozen=True)
class FRoD(Method):
    """y = W x + U (diag(d) + S) V^T drop(x),  W = U diag(l) V^T,  U of unit columns, S sparse; d and S start at 0.

    V [I, I] is made once of the weights W_k of all sites of a role: with [W_1; W_2; ...] = [Q_1; Q_2; ...] R, it is
    R^T Z, where Z are the eigenvectors of the mean of (Q_k^T Q_k + a 1)^-1. Directions that W does not have stay out.
    Wan et al. 2025, arXiv 2512.23485, which trains l + d: only weight decay tells them apart.
    """

    name = "frod"
    paper = "2512.23485"
    kinds = frozenset({"linear"})
    sparse_rate: float = option(0.01, help="share of the places off the diagonal where S trains", minimum=0, maximum=1)
    ridge: float = option(1e-3, help="a of the equation, for sites that are much alike", above=0)
    dropout: float = option(0.0, help="dropout on the update's input", minimum=0, maximum=1)
    places_seed: int = option(0, help="seed of the places of S", minimum=0)

    def shared(self, sites):
        made: dict[str, torch.Tensor | Frozen] = {}
        for each, size in {self.role(s): s.in_features for s in sites}.items():
            made |= {f"{k}{each}": Frozen(sites[0].zeros(size, size)) for k in ("V", "V_inverse")}
            made[f"places{each}"] = off_diagonal(size, self.count(size), self.places_seed, sites[0].device)
        return made

    def shared_start(self, sites, ops):
        made = dict(self.shared(sites))
        for each in dict.fromkeys(map(self.role, sites)):
            weights = [op.weight() for s, op in zip(sites, ops, strict=True) if self.role(s) == each]
            v, inverse = basis(weights, self.ridge)
            made |= {f"V{each}": Frozen(v), f"V_inverse{each}": Frozen(inverse)}
        return made

    def role(self, site):  # what sites of one have in common: how their address ends but for numbers, and their input
        return f"/{'/'.join(p for p in site.address.split('.')[-3:] if not p.isdigit())}/{site.in_features}"

    def count(self, size):  # of the places of S
        return min(max(1, int(size * size * self.sparse_rate)) if self.sparse_rate else 0, size * (size - 1))

    def init(self, site, op):
        return {"d": site.zeros(site.in_features), "s": site.zeros(self.count(site.in_features))}

    def coefficients(self, t, op):
        v, inverse, (rows, columns) = (t[f"{k}{self.role(op.site)}"] for k in ("V", "V_inverse", "places"))
        inner = torch.diag(t["d"]).index_put((rows, columns), t["s"])
        u = in_basis(op.weight(), inverse)[0]  # [O, I]
        return {"delta": u @ (inner @ v.mT) if len(u) > len(v) else (u @ inner) @ v.mT}

    def forward(self, c, x, op):
        dropped = op.drop(x, self.dropout)
        return op.project(dropped, c["delta"]) + op(x) if self.dropout else op.with_delta(x, c["delta"])
