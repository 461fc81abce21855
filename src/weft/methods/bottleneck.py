"""Bottleneck adapters: a small two-layer network after a map, or beside it."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from weft.core import Method, option
from weft.core.two_layers import Activation, Placement, channels, start, through, width_of


@dataclass(frozen=True)
class Bottleneck(Method):
    """sequential: h = y + s g (U f(D y + d) + u),  parallel: h = y + s g (U f(D x + d) + u);  y = W x, or a block of x.

    g = 1; or sigmoid(G z + g0) of what is read, for every token, or its mean over a row (UniPELT's, for encoders).

    Houlsby et al. 2019, arXiv 1902.00751: sequential, targets=["attention-blocks", "mlp-blocks"]; Pfeiffer et al. 2020,
    2005.00247: activation="relu", targets="mlp-blocks".
    He et al. 2021, arXiv 2110.04366: form, placement, composition; parallel, width=512, activation="relu", scale=4.0;
    at attention blocks their multi-head form is that of U = W_o [U_1 ... U_H] for heads that W_o puts together.
    Chen et al. 2022 (AdaptFormer), 2205.13535: width=64, scale=0.1. Mao et al. 2022 (UniPELT), 2110.07577: gate="row".
    """

    name = "bottleneck"
    paper = "1902.00751"
    kinds = frozenset({"linear", "block"})
    placement: Placement = option("sequential", help="read the map's result, or its input")
    width: int | None = option(None, help="size of the bottleneck, instead of reduction_factor", minimum=1)
    reduction_factor: float = option(16.0, help="what the number of channels it reads is divided by", minimum=1)
    activation: Activation = option("gelu", help="f; none: a low-rank update, which merges where nothing else hinders")
    scale: float = option(1.0, help="s, or where it starts if it is learned")
    learn_scale: bool = option(False, help="train s")
    gate: Literal["none", "token", "row"] = option("none", help="g: 1, of every token, or the mean over a row")
    bias: bool = option(True, help="train d and u")
    layer_norm: bool = option(False, help="normalise what the adapter reads")
    dropout: float = option(0.0, help="dropout inside the bottleneck", minimum=0, maximum=1)

    def check(self, site):
        if self.gate == "row" and site.kind != "block":
            raise ValueError("gate='row' averages over a row, and only a block is sure to see rows; use gate='token'")

    def init(self, site, op):
        read, width = channels(site, self.placement), width_of(site, self.placement, self.width, self.reduction_factor)
        t = start(site, self.placement, width, bias=self.bias)
        t |= {"scale": self.scale * site.ones(1)} if self.learn_scale else {}
        t |= {"gate": site.normal(1, read, std=0.02), "gate_bias": site.zeros(1)} if self.gate != "none" else {}
        return t | ({"norm": site.ones(read), "norm_bias": site.zeros(read)} if self.layer_norm else {})

    def forward(self, c, x, op):
        y = op(x)
        z = read = y if self.placement == "sequential" else x
        if self.layer_norm:
            z = op.shift(op.scale(F.layer_norm(z, (channels(op.site, self.placement),)), c["norm"]), c["norm_bias"])
        z = through(op, z, c, self.activation, self.dropout)
        if self.gate != "none":
            g = torch.sigmoid(op.shift(op.expand(read, c["gate"]), c["gate_bias"]))  # [..., 1]
            z = z * (g.mean(-2, keepdim=True) if self.gate == "row" else g)
        return y + (op.scale(z, c["scale"]) if self.learn_scale else self.scale * z)
