"""Experts weighed by how well an input is aligned with the direction of each, densely."""

import torch

from tests.common.references import apply, expert_outputs
from weft.core.router import Expert, experts
from weft.methods.ia3 import IA3
from weft.methods.lora import LoRA

FROZEN = {"V"}
SMALL = [
    {"experts": experts(LoRA(rank=1), 3), "k": 2},
    {
        "experts": (Expert("low", LoRA(rank=2)), Expert("gain", IA3()), Expert("all", LoRA(rank=1))),
        "k": None,
        "temperature": 0.5,
        "general": ("all",),
    },
]


def dense(method, t, W, b, x):
    outputs, base = expert_outputs(method, t, W, b, x), apply(W, b, x)
    common = torch.zeros_like(base)
    for e, y in zip(method.experts, outputs, strict=True):
        if e.name in method.general:
            common = common + (y - base) / len(method.general)
    chosen = [y - base - common for e, y in zip(method.experts, outputs, strict=True) if e.name not in method.general]
    score = (x @ t["V"].T).abs()  # [N, K]
    if method.k is not None:
        score = score.where(score >= score.sort(-1).values[:, -method.k, None], torch.tensor(-torch.inf))
    weight = torch.softmax(score / method.temperature, -1)
    return base + sum(weight[:, i, None] * y for i, y in enumerate(chosen))
