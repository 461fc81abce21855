"""Bottleneck adapters, densely."""

import torch

from tests.common.references import apply

SMALL = [
    {"width": 3},
    {"reduction_factor": 2.0, "activation": "relu", "scale": 0.5},
    {"width": 2, "placement": "parallel", "activation": "silu", "scale": 4.0, "learn_scale": True},
    {"width": 2, "placement": "parallel", "activation": "tanh", "layer_norm": True, "dropout": 0.3},
    {"width": 2, "layer_norm": True},
]


def dense(method, t, W, b, x):
    f = {"relu": torch.relu, "gelu": torch.nn.GELU(), "silu": torch.nn.SiLU(), "tanh": torch.tanh}[method.activation]
    y = apply(W, b, x)
    z = y if method.placement == "sequential" else x
    if method.layer_norm:
        z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        z = z * t["norm"] + t["norm_bias"]
    z = f(z @ t["down"].T + t["down_bias"]) @ t["up"].T + t["up_bias"]
    return y + (t["scale"] if method.learn_scale else method.scale) * z
