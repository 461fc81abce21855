"""ETHER, densely."""

import torch

from tests.common.references import apply

SMALL = [{"num_blocks": 2}, {"num_blocks": 1}, {"num_blocks": 2, "plus": True}]
FROZEN = {"u0"}


def outer(vectors):
    return torch.block_diag(*[torch.outer(v, v) / (v @ v) for v in vectors])


def turn(method, t, first, second):
    if method.plus:
        minus, plus = outer(t[first]), outer(t[second])
        return torch.eye(len(minus), dtype=minus.dtype) - minus + plus
    start, now = outer(t["u0"]), outer(t["u"])
    eye = torch.eye(len(now), dtype=now.dtype)
    return (eye - 2 * now) @ (eye - 2 * start)


def dense(method, t, W, b, x):
    y = apply(W, None, torch.einsum("ij,nj...->ni...", turn(method, t, "u", "v"), x))
    y = y @ turn(method, t, "p", "q").T if method.plus else y
    return y if b is None else y + b
