"""VeRA, densely."""

import torch

from tests.common.references import apply

SMALL = [{"rank": 5}, {"rank": 3, "d_initial": 1.0, "projection_seed": 3, "dropout": 0.3}]
FROZEN = {"A", "B"}


def dense(method, t, W, b, x):
    A, B = t["A"][:, : W.shape[1]], t["B"][: W.shape[0]]
    return apply(W + torch.diag(t["b"]) @ B @ torch.diag(t["d"]) @ A, b, x)
