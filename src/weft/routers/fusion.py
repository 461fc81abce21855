"""AdapterFusion: every token reads from what the experts add to it, by an attention of its own."""

from dataclasses import dataclass

import torch

from weft.core import option
from weft.core.fused import value
from weft.core.router import Router


@dataclass(frozen=True)
class Fusion(Router):
    """y = h + V sum_k a_k c_k,  a = softmax_k (Q h + q)^T K c_k,  h = W x,  c_k = f_k(x) - h what expert k adds.

    V starts as the identity, and w ||V - I||^2 is minimised along (w: `regularisation`). A bias of the keys, which
    AdapterHub has, is the same for all experts and thus for nothing; K is applied to the query, V to the sum.
    Pfeiffer et al. 2021, arXiv 2005.00247.
    """

    name = "fusion"
    paper = "2005.00247"
    regularisation: float = option(0.01, help="weight of the loss that keeps V near the identity", minimum=0)
    dropout: float = option(0.0, help="dropout on the scores", minimum=0, maximum=1)
    values: bool = option(True, help="have a V; otherwise what experts add is added up as it is")

    def own(self, site, op, made):
        size = site.out_features
        q, k = (site.normal(size, size, std=0.02, salt=name) for name in "QK")
        own = {"Q": q, "K": k, "q": site.zeros(size)}
        return own | {"V": torch.eye(size, dtype=site.dtype, device=site.device)} if self.values else own

    def own_penalty(self, t, site):
        if not self.values or not self.regularisation:
            return None
        return (
            self.regularisation
            * (t["V"] - torch.eye(*t["V"].shape, dtype=site.dtype, device=site.device)).square().sum()
        )

    def route(self, t, x, op):
        h, changes = value(op(x)), torch.stack([value(c) for c in op.changes(x)], -2)  # [..., K, O]
        query = op.expand(op.shift(op.expand(h, t["Q"]), t["q"]), t["K"].mT)
        score = (value(changes) @ value(query).unsqueeze(-1)).squeeze(-1)  # [..., K]
        gates = op.drop(score.to(torch.promote_types(score.dtype, torch.float32)), self.dropout).softmax(-1)
        op.note(x, gates)
        read = (gates.to(changes.dtype).unsqueeze(-2) @ changes).squeeze(-2)
        return op.expand(read, t["V"], onto=h) if self.values else h + read
