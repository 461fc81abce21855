"""The papers' equations written densely: one module per method, with `SMALL` and `dense(method, t, W, b, x) -> y`.

`t` holds every tensor of the site (and the shared ones) as a plain dict; `W` is [O, I / groups, *kernel] ([C] at a
norm, the block itself as a function at a block), `b` the bias or None, and x [N, I, *kernel] one patch per output row.
`SMALL` is a list of option dicts for maps of 4 to 20 channels: the first is the plainest, the others cover the options.
`FROZEN`, where a module has it, names the tensors that some variant saves and never trains.
`DETACHED`, where a module has it, is the reason why autograd must not agree with the equation's full derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from weft.core.router import Router


def apply(W: Tensor | Callable[[Tensor], Tensor], b: Tensor | None, x: Tensor) -> Tensor:
    """W x + b for rows x [N, I, *kernel]; a block is called."""
    if not isinstance(W, Tensor):
        return W(x)
    if W.ndim == 1:
        y = W * x
    else:
        groups = x.shape[1] // W.shape[1]
        parts = zip(x.chunk(groups, 1), W.chunk(groups, 0), strict=True)
        y = torch.cat([part.flatten(1) @ w.flatten(1).mT for part, w in parts], -1)
    return y if b is None else y + b


def product(b: Tensor, a: Tensor, groups: int = 1) -> Tensor:
    """B A as a weight [O, I / groups, *kernel], for a [R, I / groups, *kernel] and b [O, R / groups]."""
    pairs = zip(b.chunk(groups, 0), a.chunk(groups, 0), strict=True)
    return torch.cat([torch.einsum("or,r...->o...", one, two) for one, two in pairs])


def expert_outputs(
    router: Router, t: dict[str, Tensor], W: Tensor | Callable[[Tensor], Tensor], b: Tensor | None, x: Tensor
) -> list[Tensor]:
    """What each expert of a router makes of x, by its own method's reference."""
    found = []
    for expert in router.experts:
        own = {k.removeprefix(f"{expert.name}:"): v for k, v in t.items() if k.startswith(f"{expert.name}:")}
        reference = import_module(f"tests.common.references.{expert.method.name}")
        found.append(reference.dense(expert.method, own, W, b, x))
    return found
