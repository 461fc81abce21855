"""OFT, densely."""

import torch

from tests.common.references import apply

SMALL = [
    {"block_size": 4},
    {"block_size": 2, "neumann_terms": None, "constrained": True, "eps": 0.5},
    {"block_size": 4, "neumann_terms": None, "block_share": True},
]
FROZEN = set()


def rotation(method, t, width):
    b, blocks = method.block_size, []
    for v in t["weight"]:
        q, upper, n = torch.zeros(b, b, dtype=v.dtype), list(v), 0
        for i in range(b):
            for j in range(i + 1, b):
                q[i, j], q[j, i], n = upper[n], -upper[n], n + 1
        bound = method.eps / len(t["weight"]) ** 0.5
        if method.constrained and q.norm() > bound:
            q = q * bound / q.norm()
        eye = torch.eye(b, dtype=v.dtype)
        series = eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        blocks.append(series if method.neumann_terms else (eye - q) @ torch.linalg.inv(eye + q))
    return torch.block_diag(*(blocks * (width // b // len(blocks))))


def dense(method, t, W, b, x):
    if W.shape[1] == 20:  # the embedding
        return apply(W, b, x) @ rotation(method, t, len(W))
    R = rotation(method, t, W[0].numel())
    return apply((W.flatten(1) @ R.T).view(W.shape), b, x)
