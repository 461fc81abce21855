"""FourierFT, densely: the two-dimensional inverse transform as a sum of waves."""

import torch

from tests.common.references import apply

SMALL = [{"num_frequencies": 9, "scaling": 20.0}]


def dense(method, t, W, b, x):
    rows, columns = W.flatten(1).shape
    p, q = torch.arange(rows).double()[:, None] / rows, torch.arange(columns).double() / columns
    delta = torch.zeros_like(W).flatten(1)
    for value, place in zip(t["spectrum"], t["places"].tolist(), strict=True):
        u, v = divmod(place, columns)
        wave = torch.cos(2 * torch.pi * (u * p + v * q))
        delta = delta + value * wave.to(W) / (rows * columns)
    return apply(W + method.scaling * delta.view(W.shape), b, x)
