"""User-conditioned routing over experts, densely."""

from tests.common.references import apply, expert_outputs
from weft.core.router import Expert, experts
from weft.methods.bottleneck import Bottleneck
from weft.methods.ia3 import IA3
from weft.methods.lora import LoRA

SMALL = [
    {"experts": experts(LoRA(rank=1), 2), "num_users": 3, "user": 1, "embedding_size": 4, "hidden": None},
    {
        "experts": (Expert("net", Bottleneck(reduction_factor=2.0)), Expert("other", Bottleneck(reduction_factor=4.0))),
        "user": 0,
        "embedding_size": 3,
        "train_users": False,
        "temperature": 2.0,
        "hidden": 5,
    },
    {"experts": (Expert("low", LoRA(rank=4)), Expert("gain", IA3())), "user": 1, "embedding_size": 3},
]
FROZEN = {"users"}


def dense(method, t, W, b, x):
    z = t["users"][method.user]
    if method.hidden:
        z = (z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt()
        z = (t["H"] @ z + t["h"]).clamp(min=0)
    weight = ((t["G"] @ z + t["b"]) / method.temperature).exp()
    weight = weight / weight.sum()
    base = apply(W, b, x)
    y = base
    for k, own in enumerate(expert_outputs(method, t, W, b, x)):
        y = y + weight[k] * (own - base)
    return y
