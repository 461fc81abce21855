"""Experts on mixtures of tokens, densely: row by row."""

from importlib import import_module

import torch

from weft.core.router import experts
from weft.methods.bottleneck import Bottleneck

SMALL = [
    {"experts": experts(Bottleneck(reduction_factor=2.0), 2)},
    {"experts": experts(Bottleneck(width=3, placement="parallel"), 2), "slots": 2},
]


def dense(method, t, W, b, x):
    rows = []
    for tokens, h in zip(x, W(x), strict=True):
        unit = tokens / tokens.norm(dim=-1, keepdim=True)
        score = t["scale"] * unit @ (t["P"] / t["P"].norm(dim=-1, keepdim=True)).T  # [T, K slots]
        dispatch, combine = score.exp() / score.exp().sum(0), score.exp() / score.exp().sum(1, keepdim=True)
        y = h
        for s in range(score.shape[1]):
            expert = method.experts[s // method.slots]
            own = {k.partition(":")[2]: v for k, v in t.items() if k.startswith(f"{expert.name}:")}
            reads, gives = dispatch[:, s] @ tokens, dispatch[:, s] @ h
            reference = import_module(f"tests.common.references.{expert.method.name}")
            change = reference.dense(expert.method, own, lambda _, g=gives: g, None, reads) - gives
            y = y + torch.outer(combine[:, s], change)
        rows.append(y)
    return torch.stack(rows)
