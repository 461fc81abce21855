"""Which of several differences count at an entry: those whose sign is that of their sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["added", "agreeing"]

_BLOCK = 1 << 16  # entries that are added at once: what is made on the way stays in the processor's cache


def agreeing(deltas: Tensor) -> Tensor:
    """A mask [K, ...] of the entries whose sign is the sign of the sum over K; a sum of zero counts as positive."""
    majority = (deltas.sum(0) >= 0).to(deltas.dtype) * 2 - 1
    return (deltas.sign() == majority).to(deltas.dtype)


def added(deltas: Tensor, weights: Tensor, *, elect: bool, normalise: bool) -> Tensor:
    """sum_k w_k delta_k over all, or over those that agree in sign; divided by the weights that took part.

    deltas: [K, ...]. weights: [K].
    """
    flat = deltas.flatten(1)  # [K, N]
    total = torch.empty_like(flat[0])
    for start in range(0, flat.shape[1], _BLOCK):
        here = slice(start, start + _BLOCK)
        total[here] = _added(flat[:, here], weights, elect, normalise)
    return total.view_as(deltas[0])


def _added(deltas: Tensor, weights: Tensor, elect: bool, normalise: bool) -> Tensor:
    weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    total = _sum(weighted)
    if not elect:
        divisor = weights.sum()
        return total / divisor if normalise and divisor.abs() > 1e-8 else total
    sign = (total >= 0).to(total.dtype).mul_(2).sub_(1)
    total, divisor = torch.zeros_like(total), torch.zeros_like(total)
    for part, weight in zip(weighted, weights.tolist(), strict=True):
        part.mul_(sign)
        divisor.add_(part > 0, alpha=weight)
        total.add_(part.clamp_(min=0))
    total.mul_(sign)
    return total.div_(divisor.add_(divisor == 0)) if normalise else total


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    return total
