"""Stochastic routing once trained, densely: one expert of mean parameters, or the mean of what experts add."""

from dataclasses import replace

import torch

from tests.common.references import apply, expert_outputs
from weft.core.router import Expert, experts
from weft.methods.bottleneck import Bottleneck
from weft.methods.ia3 import IA3
from weft.methods.lora import LoRA

SMALL = [
    {"experts": experts(LoRA(rank=1), 2)},
    {"experts": (Expert("low", LoRA(rank=4)), Expert("gain", IA3())), "average": "changes"},
    {"experts": experts(Bottleneck(reduction_factor=2.0), 3), "redundancy": 0.1},
]


def dense(method, t, W, b, x):
    if method.average == "changes":
        outputs = expert_outputs(method, t, W, b, x)
        return apply(W, b, x) + sum(y - apply(W, b, x) for y in outputs) / len(outputs)
    mean = {}
    for key in t:
        name, _, own = key.partition(":")
        if name == "0":
            mean[f"0:{own}"] = torch.stack([t[f"{e.name}:{own}"] for e in method.experts]).mean(0)
    return expert_outputs(replace(method, experts=method.experts[:1]), mean, W, b, x)[0]
