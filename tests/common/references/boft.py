"""BOFT, densely."""

import torch

from tests.common.references import apply

SMALL = [{"block_size": 4}, {"block_size": 2, "factors": 2}, {"block_size": 2, "factors": 3}]
FROZEN = set()


def order(width, block, level):
    """Super-blocks of 2^level blocks: their even half-blocks, then their odd ones."""
    half, found = block // 2, []
    for start in range(0, width, block * 2**level):
        halves = [list(range(start + i * half, start + (i + 1) * half)) for i in range(2 ** (level + 1))]
        found += [n for h in halves[0::2] + halves[1::2] for n in h]
    return found


def dense(method, t, W, b, x):
    width = W[0].numel()
    total = torch.eye(width, dtype=W.dtype)
    for level, A in enumerate(t["A"]):
        Q = (A - A.mT) / 2
        eye = torch.eye(method.block_size, dtype=W.dtype)
        R = torch.block_diag(*[(eye - q) @ torch.linalg.inv(eye + q) for q in Q])
        P = torch.eye(width, dtype=W.dtype)[order(width, method.block_size, level)]
        total = P @ R @ P.T @ total
    V = t["s"][:, None] * W.flatten(1) @ total.T
    return apply(V.view(W.shape), b, x)
