"""MoSA, densely: what is left when training is done, an ordinary bottleneck of all pieces."""

from tests.common.references import apply
from tests.common.references.bottleneck import ACTIVATIONS

SMALL = [
    {"pieces": 2, "width": 3, "scale": 0.5},
    {"width": 4, "placement": "sequential", "consistency": 0.1, "cut": "both"},
]
FROZEN = {"down_start"}


def dense(method, t, W, b, x):
    k = method.pieces
    y = apply(W, b, x)
    z = y if method.placement == "sequential" else x
    down, up = t["down"], sum(t["up"] * (t["up_piece"] == i) for i in range(k)) / k
    if method.cut == "both":
        assert sum((t["down_piece"] == i).sum() for i in range(k)) == down.numel()
        first = t["down_start"]
        down = sum(first + (down - first) * (t["down_piece"] == i) for i in range(k)) / k
    f = ACTIVATIONS[method.activation]
    return y + method.scale * (f(z @ down.T + t["down_bias"]) @ up.T + t["up_bias"])
