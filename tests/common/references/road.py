"""RoAd, densely: one 2 x 2 matrix per pair."""

import torch

from tests.common.references import apply

SMALL = [{"group_size": 4}, {"variant": 2, "group_size": 2}, {"variant": 4, "group_size": 4}]
FROZEN = set()


def dense(method, t, W, b, x):
    y, g = apply(W, b, x), method.group_size
    R = torch.zeros(y.shape[1], y.shape[1], dtype=y.dtype)
    for i in range(y.shape[1]):
        group, k = divmod(i, g)
        pair, first = k % (g // 2), k < g // 2
        cos = sin = {1: group * (g // 2) + pair, 2: i, 4: group * 2 * g + k}[method.variant]
        if method.variant == 4:
            sin = cos + g
        partner = i + g // 2 if first else i - g // 2
        R[i, i] = t["alpha"][cos] * t["theta"][cos].cos()
        R[i, partner] = (-1 if first else 1) * t["alpha"][sin] * t["theta"][sin].sin()
    return y @ R.T
