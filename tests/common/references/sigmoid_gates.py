"""Experts that count by a gate of their own, densely."""

from tests.common.references import apply, expert_outputs
from weft.core.router import Expert, experts
from weft.methods.bottleneck import Bottleneck
from weft.methods.ia3 import IA3
from weft.methods.lora import LoRA

SMALL = [
    {"experts": (Expert("low", LoRA(rank=1)), Expert("gain", IA3()))},
    {"experts": experts(Bottleneck(reduction_factor=2.0), 2), "threshold": 0.5},
    {"experts": experts(LoRA(rank=1), 2), "threshold": 0.9, "per_token": True, "hidden": 3},
]
FROZEN = {"v", "e"}


def sigmoid(s):
    return 1 / (1 + (-s).exp())


def dense(method, t, W, b, x):
    z, least = x, method.threshold
    if method.hidden:
        p = x @ t["P"].T + t["p"]
        z = p * sigmoid(p) * (x @ t["Q"].T + t["q"])
    if method.per_token:
        least = least * sigmoid(x @ t["v"].T + t["e"])
    weight = sigmoid(z @ t["G"].T + t["c"])  # [..., K]
    weight = weight * (weight >= least)
    base = apply(W, b, x)
    for k, y in enumerate(expert_outputs(method, t, W, b, x)):
        base = base + weight[..., k : k + 1] * (y - apply(W, b, x))
    return base
