"""Bottleneck adapters: a small two-layer network after a map, or beside it."""

from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F

from weft.core import Method, option

ACTIVATIONS: dict[str, Any] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": F.tanh}


@dataclass(frozen=True)
class Bottleneck(Method):
    """sequential: h = y + s (U f(D y + d) + u),  parallel: h = y + s (U f(D x + d) + u);  y = W x, or a block of x.

    Houlsby et al. 2019, arXiv 1902.00751: sequential, targets=["attention-blocks", "mlp-blocks"].
    Pfeiffer et al. 2020, arXiv 2005.00247: sequential, activation="relu", targets="mlp-blocks".
    He et al. 2021, arXiv 2110.04366: parallel, width=512, activation="relu", scale=4.0, targets="mlp-blocks".
    Chen et al. 2022 (AdaptFormer), arXiv 2205.13535: as He et al., with width=64, scale=0.1.
    """

    name = "bottleneck"
    paper = "1902.00751"
    kinds = frozenset({"linear", "block"})
    placement: Literal["sequential", "parallel"] = option("sequential", help="read the map's result, or its input")
    width: int | None = option(None, help="size of the bottleneck, instead of reduction_factor", minimum=1)
    reduction_factor: float = option(16.0, help="what the number of channels it reads is divided by", minimum=1)
    activation: Literal["relu", "gelu", "silu", "tanh"] = option("gelu", help="f")
    scale: float = option(1.0, help="s, or where it starts if it is learned")
    learn_scale: bool = option(False, help="train s")
    layer_norm: bool = option(False, help="normalise what the adapter reads")
    dropout: float = option(0.0, help="dropout inside the bottleneck", minimum=0, maximum=1)

    def init(self, site, op):
        read = site.out_features if self.placement == "sequential" else site.in_features
        width = self.width or max(1, round(read / self.reduction_factor))
        t = {
            "down": site.uniform(width, read, bound=read**-0.5),
            "down_bias": site.zeros(width),
            "up": site.zeros(site.out_features, width),
            "up_bias": site.zeros(site.out_features),
        }
        if self.learn_scale:
            t["scale"] = self.scale * site.ones(1)
        if self.layer_norm:
            t |= {"norm": site.ones(read), "norm_bias": site.zeros(read)}
        return t

    def forward(self, c, x, op):
        y = op(x)
        z = y if self.placement == "sequential" else x
        if self.layer_norm:
            size = op.site.out_features if self.placement == "sequential" else op.site.in_features
            z = op.shift(op.scale(F.layer_norm(z, (size,)), c["norm"]), c["norm_bias"])
        z = ACTIVATIONS[self.activation](op.shift(op.expand(z, c["down"]), c["down_bias"]))
        z = op.shift(op.expand(op.drop(z, self.dropout), c["up"]), c["up_bias"])
        return y + (op.scale(z, c["scale"]) if self.learn_scale else self.scale * z)
