"""SVFT, densely."""

import torch

from tests.common.references import apply

SMALL = [{"pattern": "plain"}, {"pattern": "banded", "width": 1}, {"pattern": "random", "width": 1}]


def dense(method, t, W, b, x):
    size = min(W.flatten(1).shape)
    M = torch.zeros(size, size, dtype=W.dtype)
    for value, place in zip(t["M"], t["places"].tolist(), strict=True):
        M[divmod(place, size)] = value
    delta = t["U"] @ M @ t["V"].flatten(1)
    return apply(W + delta.view(W.shape), b, x)
