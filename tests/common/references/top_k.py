"""A linear router over experts, densely."""

from tests.common.references import apply, expert_outputs
from weft.core.router import Expert, experts
from weft.methods.bottleneck import Bottleneck
from weft.methods.ia3 import IA3
from weft.methods.lora import LoRA

SMALL = [
    {"experts": experts(LoRA(rank=1), 3)},
    {"experts": (Expert("low", LoRA(rank=4)), Expert("gain", IA3())), "k": 1, "z_loss": 0.1},
    {"experts": experts(Bottleneck(reduction_factor=2.0), 2), "k": None},
]


def dense(method, t, W, b, x):
    weight = (x @ t["G"].T).exp()  # [N, K]
    weight = weight / weight.sum(-1, keepdim=True)
    if method.k is not None:
        weight = weight * (weight >= weight.sort(-1, descending=True).values[..., method.k - 1 : method.k])
        weight = weight / weight.sum(-1, keepdim=True)
    base = apply(W, b, x)
    for k, y in enumerate(expert_outputs(method, t, W, b, x)):
        base = base + weight[..., k : k + 1] * (y - apply(W, b, x))
    return base
