"""LoKr, densely."""

import torch

from tests.common.references import apply

SMALL = [
    {"rank": 1, "alpha": 3.0},
    {"rank": 8},
    {"rank": 1, "decompose_both": True, "decompose_factor": 4},
    {"rank": 1, "effective_conv": True},
]


def dense(method, t, W, b, x):
    w1 = t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"]
    if "t2" in t:  # a core over the kernel between the two factors
        w2 = torch.tensordot(t["w2_a"].T, torch.tensordot(t["w2_b"].T, t["t2"], ([1], [1])), ([1], [1]))
    else:
        w2 = t["w2"] if "w2" in t else t["w2_a"] @ t["w2_b"]
    rows = [torch.cat([entry * w2.flatten(1) for entry in row], 1) for row in w1]
    return apply(W + method.alpha / method.rank * torch.cat(rows).view(W.shape), b, x)
