"""LoRETTA, densely."""

import torch

from tests.common.references import apply

SMALL = [
    {"rank": 2, "bond": 2, "num_cores": 2},
    {"rank": 4, "bond": 3, "num_cores": 3, "alpha": 2.0},
    {"rank": 3, "bond": 2, "num_cores": 2, "form": "adapter"},
    {"rank": 2, "bond": 2, "num_cores": 2, "growths": 3},
]


def matrix(t, name, n):
    """[wide, R]"""
    full = t[f"{name}0"]
    for k in range(1, n + 1):
        full = torch.tensordot(full, t[f"{name}{k}"], 1)
    return full.reshape(-1, full.shape[-2])


def dense(method, t, W, b, x):
    A, B = (matrix(t, name, method.num_cores) for name in "AB")
    if method.form == "adapter":
        y = apply(W, b, x)
        return y + torch.tanh(y @ A + t["a"]) @ B.T + t["b"]
    return apply(W + (method.alpha / method.rank * B @ A.T).view(W.shape), b, x)
