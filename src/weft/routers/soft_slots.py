"""Soft slots: experts work on mixtures of tokens, and every token gets a mixture of what they make of these."""

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from weft.core import option
from weft.core.fused import value
from weft.core.router import Router


@dataclass(frozen=True)
class SoftSlots(Router):
    """Y = H + C [f_k(D_k^T X) - D_k^T H]_k,  H = W(X) of a row's tokens X,  L = scale * unit(X) unit(P)^T.

    D = softmax of L over the tokens, C over the slots, `slots` of each expert; every expert works on its slots only, of
    what a block reads and gives. It looks at all tokens of a row: for encoders, and refused where a model is causal, by
    its attentions or because it generates, and for rows that hold several texts. Padding is in no slot.

    Cappellazzo et al. 2024 (Soft-MoA), arXiv 2402.00828; Wu et al. 2024 (Omni-SMoLA, at linear maps, which know no
    padding here), arXiv 2312.00968; Puigcerver et al. 2024 (Soft MoE), arXiv 2308.00951.
    """

    name = "soft_slots"
    paper = "2402.00828"
    kinds = frozenset({"block"})
    default_targets = "attention-blocks"
    slots: int = option(1, help="mixtures of tokens that each expert works on", minimum=1)

    def own(self, site, op, made):
        total = self.slots * len(self.experts)
        return {"P": site.normal(total, site.in_features, std=site.in_features**-0.5), "scale": site.ones(1)}

    def route(self, t, x, op):
        where = op.positions(x)
        if where.causal or where.packed:
            why = "its tokens see earlier ones only" if where.causal else "its rows hold several texts each"
            raise ValueError(f"{op.site.address}: soft_slots mixes all tokens of a row, and this model may not: {why}")
        wide = torch.promote_types(x.dtype, torch.float32)
        score = normalize(x.to(wide), dim=-1) @ normalize(t["P"].to(wide), dim=-1).mT * t["scale"]  # [B, T, K slots]
        into = score if where.real is None else score.masked_fill(~where.real.unsqueeze(-1), torch.finfo(wide).min)
        dispatch, combine = into.softmax(-2).to(x.dtype), score.softmax(-1)
        h = value(op(x))
        slots, known = (dispatch.mT @ each for each in (x, h))  # [B, K slots, C]
        pairs = zip(slots.split(self.slots, -2), known.split(self.slots, -2), strict=True)
        changes = torch.cat([op.change_of(k, *pair) for k, pair in enumerate(pairs)], -2)
        op.note(x, combine.unflatten(-1, (len(self.experts), self.slots)).sum(-1))
        return h + combine.to(changes.dtype) @ changes
