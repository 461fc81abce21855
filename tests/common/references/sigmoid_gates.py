"""Experts that count by a gate of their own, densely."""

from tests.common.references import apply, expert_outputs
from weft.core.router import Expert, experts
from weft.methods.bottleneck import Bottleneck
from weft.methods.ia3 import IA3
from weft.methods.lora import LoRA

SMALL = [
    {"experts": (Expert("low", LoRA(rank=1)), Expert("gain", IA3()))},
    {"experts": experts(Bottleneck(reduction_factor=2.0), 2), "threshold": 0.5},
]


def dense(method, t, W, b, x):
    weight = 1 / (1 + (-x @ t["G"].T - t["c"]).exp())  # [..., K]
    weight = weight * (weight >= method.threshold)
    base = apply(W, b, x)
    for k, y in enumerate(expert_outputs(method, t, W, b, x)):
        base = base + weight[..., k : k + 1] * (y - apply(W, b, x))
    return base
