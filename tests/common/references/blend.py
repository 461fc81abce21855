"""A blend of experts by constant weights, densely."""

from tests.common.references import apply, expert_outputs
from weft.core.router import Expert, experts
from weft.methods.difffit import DiffFit
from weft.methods.ia3 import IA3
from weft.methods.lora import LoRA
from weft.methods.ssf import SSF

SMALL = [
    {"experts": experts(LoRA(rank=1), 2)},
    {"experts": (Expert("low", LoRA(rank=1)), Expert("gain", IA3())), "by_channel": True},
    {"experts": (Expert("gain", SSF()), Expert("more", DiffFit())), "share_weights": True},
    {"experts": experts(DiffFit(), 1)},
]


def dense(method, t, W, b, x):
    base = apply(W, b, x)
    y = base
    for expert, own in zip(method.experts, expert_outputs(method, t, W, b, x), strict=True):
        y = y + t[f"w_{expert.name}"] * (own - base)
    return y
