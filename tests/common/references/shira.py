"""SHiRA, densely."""

import torch

from tests.common.references import apply

SMALL = [{"rank": 2}, *({"rank": 1, "mask": m} for m in ("magnitude", "gradient", "snip", "grasp", "structured"))]


def dense(method, t, W, b, x):
    S = torch.zeros_like(W).flatten(1)
    for value, (row, column) in zip(t["values"], t["indices"].T.tolist(), strict=True):
        S[row, column] = value
    return apply(W + S.view(W.shape), b, x)
