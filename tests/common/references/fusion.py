"""An attention over what experts add to a token, densely."""

import torch

from tests.common.references import apply, expert_outputs
from weft.core.router import Expert, experts
from weft.methods.bottleneck import Bottleneck
from weft.methods.ia3 import IA3
from weft.methods.lora import LoRA

SMALL = [
    {"experts": experts(LoRA(rank=1), 2)},
    {"experts": (Expert("low", LoRA(rank=4)), Expert("gain", IA3())), "values": False},
    {"experts": experts(Bottleneck(reduction_factor=2.0), 2), "regularisation": 0.0},
]


def dense(method, t, W, b, x):
    h = apply(W, b, x)
    added = torch.stack([y - h for y in expert_outputs(method, t, W, b, x)], -2)  # [..., K, O]
    queries, keys = h @ t["Q"].T + t["q"], added @ t["K"].T
    weight = torch.einsum("...o,...ko->...k", queries, keys).softmax(-1)
    values = added @ t["V"].T if method.values else added
    return h + (weight[..., None] * values).sum(-2)
