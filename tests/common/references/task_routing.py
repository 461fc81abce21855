"""Task-level routing over experts, densely."""

from tests.common.references import apply, expert_outputs
from weft.core.router import Expert, experts
from weft.methods.bottleneck import Bottleneck
from weft.methods.ia3 import IA3
from weft.methods.lora import LoRA

SMALL = [
    {"experts": experts(LoRA(rank=1), 2), "num_tasks": 3, "task": 1},
    {"experts": (Expert("low", LoRA(rank=4)), Expert("gain", IA3())), "gate": "softmax", "task": 0},
    {"experts": experts(Bottleneck(reduction_factor=2.0), 2), "task": 0},
]


def dense(method, t, W, b, x):
    z = t["Z"][method.task]
    weight = z.exp() if method.gate == "softmax" else 1 / (1 + (-z).exp())
    weight = weight / weight.sum()
    base = apply(W, b, x)
    y = base
    for k, own in enumerate(expert_outputs(method, t, W, b, x)):
        y = y + weight[k] * (own - base)
    return y
