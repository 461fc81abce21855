"""QWHA, densely: the Walsh-Hadamard matrix by its signs, (-1)^(bits that i and j share)."""

import torch

from tests.common.references import apply

SMALL = [{"rank": 1, "scaling": 0.5}]


def dense(method, t, W, b, x):
    rows, columns = W.flatten(1).shape
    block = columns & -columns
    H = torch.zeros(columns, columns).to(W)
    for i in range(columns):
        for j in range(i // block * block, (i // block + 1) * block):
            H[i, j] = (-1) ** ((i % block) & (j % block)).bit_count() / block**0.5
    F = torch.zeros_like(W).flatten()
    for value, place in zip(t["values"], t["places"].tolist(), strict=True):
        F[place] = value
    return apply(W + method.scaling * (F.view(rows, columns) @ H).view(W.shape), b, x)
