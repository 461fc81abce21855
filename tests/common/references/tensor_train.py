"""Tensor train (LoTR), densely."""

from tests.common.references import apply

SMALL = [{"rank": 4, "alpha": 2.0}]


def dense(method, t, W, b, x):
    shape = "x".join(map(str, W.shape))
    A, B, G = t[f"A_{shape}"], t[f"B_{shape}"], t["G"]
    delta = method.alpha / method.rank * B @ G @ A.flatten(1)
    return apply(W + delta.view(W.shape), b, x)
