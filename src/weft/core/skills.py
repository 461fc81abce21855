"""Skills that tasks share: how much each counts for a task, and an inventory of low-rank factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from weft.core.fused import value
from weft.core.op import Op
from weft.core.rowwise import project
from weft.core.site import Site

__all__ = ["add_update", "averaged", "gates", "inventory", "products"]


def gates(op: Op, z: Tensor, temperature: float = 1.0) -> Tensor:
    """sigmoid(z) / sum over the last dimension, of logits z [..., K].

    In training the sigmoids are relaxed Bernoulli draws: sigmoid((z + log u - log(1 - u)) / temperature), u uniform.
    """
    u = op.chance(*z.shape)
    if u is not None:
        z = (z + u.clamp(1e-6, 1 - 1e-6).to(z.dtype).logit()) / temperature
    skills = torch.sigmoid(z)
    return skills / (skills.sum(-1, keepdim=True) + 1e-12)


def inventory(site: Site, num_splits: int, num_rows: int, order: int) -> dict[str, Tensor]:
    """A and B of all skills, their ranks one after another: vectors [order, N, S R, n] for `products`, B's at zero.

    A has the spread of LoRA's, whatever the order.
    """
    t = {}
    for name, channels in {"A": site.in_features, "B": site.out_features}.items():
        size = channels // num_splits
        n = next(n for n in range(1, size + 1) if n**order >= size)
        bound = 3**0.5 * (3 * size) ** (-0.5 / order)
        t[name] = site.uniform(order, num_splits, num_rows, n, bound=bound, salt=name)
    t["B"][:1] = 0
    return t


def products(vectors: Tensor, size: int) -> Tensor:
    """The tensor products of vectors [order, ..., n], cut to size: [..., size]."""
    made = vectors[0]
    for v in vectors[1:]:
        made = (made.unsqueeze(-1) * v.unsqueeze(-2)).flatten(-2)
    return made[..., :size]


def averaged(factors: Tensor, gates: Tensor) -> Tensor:
    """The weighted sums of skills, [K, R, C], of factors [N, S R, C / N] and K gates [K, N, S] of every block."""
    each = factors.unflatten(1, (gates.shape[-1], -1))  # [N, S, R, C / N]
    return torch.einsum("kns,nsrc->krnc", gates.to(factors.dtype), each).flatten(2)


def add_update(y: Any, x: Tensor, a: Tensor, b: Tensor, gates: Tensor, which: Tensor, *, scale: float) -> Tensor:
    """y + scale B A x for x [..., I], of factors and gates as in `averaged`; which: the task of every row or token.

    Factors are averaged for the tasks that x has, not for all.
    """
    y = value(y)
    if x.ndim == 3 and which.numel() in (1, len(x)):  # one per row
        g = gates[which.flatten()]
        a, b = (averaged(m, g).expand(len(x), -1, -1).to(x.dtype) for m in (a, b))
        return torch.baddbmm(y, x @ a.mT, b, alpha=scale)
    if which.numel() == 1:
        gates, which = gates[which.flatten()], torch.zeros_like(which)
    elif not is_fake(which):
        tasks, which = which.unique(return_inverse=True)
        gates = gates[tasks]
    h = scale * project(x, averaged(a, gates), which)
    return y + project(h, averaged(b, gates).mT, which)
