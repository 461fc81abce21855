"""K-Adapter: a side network of a few transformer layers at some of the frozen model's layers."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from weft.core import Method, option
from weft.core.transformer import layer, layers_start, num_heads


@dataclass(frozen=True)
class KAdapter(Method):
    """y' = y + M [y; s_K];  s_k = f_k + u_k + U_k layers(D_k f_k + d_k),  f_k = norm(h_(l_k)) + s_(k-1),  s_0 = 0.

    Wang et al. 2020, arXiv 2002.01808: K places from the embeddings to the last layer's input, as 0, 11, 23 of 24. M
    starts at 0, so that y' = y; the paper's concatenation goes through M alone, as it is made for a new head. Its
    model normalises what every layer gives; here states grow from layer to layer, so they are normalised (without
    gains) where they are read. The small layers have their norms first and no biases in attention.
    """

    name = "k_adapter"
    paper = "2002.01808"
    kinds = frozenset({"side"})
    default_targets = "side"
    alone = True
    num_places: int = option(3, help="places along the model's layers (K)", minimum=1)
    num_layers: int = option(2, help="transformer layers at each of them", minimum=1)
    width: int | None = option(None, help="their width; three quarters of the model's when not given", minimum=1)
    head_size: int = option(64, help="channels of a head of their attentions, at most", minimum=1)

    def places(self, site):
        last = site.num_layers - 1
        return sorted({last * k // max(1, self.num_places - 1) for k in range(self.num_places)})

    def init(self, site, op):
        wide, num = site.out_features, len(self.places(site))
        width = self.width or max(1, 3 * wide // 4)
        return layers_start(site, num * self.num_layers, width) | {
            "down": site.normal(num, width, wide, std=0.0002),
            "down_bias": site.zeros(num, width),
            "up": site.normal(num, wide, width, std=0.0002, salt="up"),
            "up_bias": site.zeros(num, wide),
            "join": site.zeros(wide, 2 * wide),
        }

    def forward(self, c, x, op):
        states, heads = op.hidden(), num_heads(c["down"].shape[1], self.head_size)
        s: Any = 0.0
        for k, n in enumerate(self.places(op.site)):
            f = F.layer_norm(states[n], states[n].shape[-1:]) + s
            h = op.shift(op.expand(f, c["down"][k]), c["down_bias"][k])
            for i in range(self.num_layers):
                h = layer(op, c, k * self.num_layers + i, h, heads)
            s = f + op.shift(op.expand(h, c["up"][k]), c["up_bias"][k])
        y = op(x)
        return y + op.expand(torch.cat([y, s.to(y.dtype)], -1), c["join"])
