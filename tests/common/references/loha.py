"""LoHa, densely."""

import torch

from tests.common.references import apply

SMALL = [{"rank": 1, "alpha": 3.0}, {"rank": 2}, {"rank": 4}, {"rank": 2, "effective_conv": True}]


def factor(t, n, W):
    b, a = t[f"w{n}_b"], t[f"w{n}_a"]
    if f"t{n}" in t:  # a core over the kernel between the two factors
        return torch.tensordot(b.T, torch.tensordot(a.T, t[f"t{n}"], ([1], [1])), ([1], [1]))
    return (b @ a).view(W.shape)


def dense(method, t, W, b, x):
    return apply(W + method.alpha / method.rank * factor(t, 1, W) * factor(t, 2, W), b, x)
