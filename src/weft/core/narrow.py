"""Narrow maps beside a wide one, in the layout in which they are fast: what is read of N rows is [R, N].

A map m of C channels to R is a matrix [R, C], a block-diagonal one [K, R / K, C / K], the numbers of R channels, or a
`Fold`. What expands R channels is the transpose of such a map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.core.rotations import join_blocks

__all__ = ["Fold", "Narrow", "fold_of", "gradient", "read", "spread_onto", "transposed", "widened"]


@dataclass(frozen=True)
class Fold:
    """The sum of all shards of `size` neighbouring channels: the matrix [1 1 ... 1] of identities."""

    size: int


Narrow = Tensor | Fold


def fold_of(m: Tensor) -> Narrow:
    """The fold that a frozen matrix [R, C] is, where looking costs nothing; itself otherwise."""
    size, columns = m.shape
    if m.requires_grad or type(m) is not Tensor or m.device.type != "cpu" or size < 2 or columns % size:
        return m
    if float(m[0, 0]) != 1 or float(m[0, 1]) != 0:
        return m
    shards = m.unflatten(1, (-1, size)).movedim(1, 0)  # [C / R, R, R]
    return Fold(size) if torch.equal(shards, torch.eye(size, dtype=m.dtype).expand_as(shards)) else m


def transposed(m: Tensor) -> Tensor:
    """The map that reads what `m` [O, R] (or blocks of it, or numbers of channels) writes."""
    return m.mT if m.is_floating_point() else m


def read(x: Tensor, m: Narrow) -> Tensor:
    """m x of x [N, C]: [R, N]."""
    if isinstance(m, Fold):
        return x.unflatten(1, (-1, m.size)).sum(1).mT
    if not m.is_floating_point():
        return x.index_select(1, m).mT
    if m.ndim == 3:
        return (m @ x.unflatten(1, (len(m), -1)).permute(1, 2, 0)).flatten(0, 1)
    return m @ x.mT


def spread_onto(y: Tensor, h: Tensor, m: Narrow) -> Tensor:
    """y [N, C] += m^T h for h [R, N], in place."""
    if isinstance(m, Fold):
        y.unflatten(1, (-1, m.size)).add_(h.mT.unsqueeze(1))
    elif not m.is_floating_point():
        y.index_add_(1, m, h.mT.to(y.dtype))
    elif y.dtype != h.dtype:
        y.add_(spread_onto(h.new_zeros(y.shape), h, m).to(y.dtype))
    elif m.ndim == 3:
        for part, rows, block in zip(y.chunk(len(m), 1), h.chunk(len(m)), m, strict=True):
            part.addmm_(rows.mT, block)
    else:
        y.addmm_(h.mT, m)
    return y


def gradient(h: Tensor, x: Tensor, m: Tensor) -> Tensor:
    """The gradient of m where h [R, N] is that of `read(x, m)`: of m's shape."""
    if m.ndim == 3:
        return h.unflatten(0, (len(m), -1)) @ x.unflatten(1, (len(m), -1)).movedim(1, 0)
    return h @ x


def widened(weight: Tensor, a: Narrow, order: Tensor | None, b: Tensor) -> Tensor:
    """weight [O, I] + b a, as a new matrix. order: of the channels between a and b."""
    if isinstance(a, Fold):
        return (weight.unflatten(1, (-1, a.size)) + b.unsqueeze(1)).flatten(1)
    whole = a if a.ndim == 2 else join_blocks(a, len(a))[0]
    if b.ndim == 2 and order is None:
        return torch.addmm(weight, b, whole)
    whole = whole if order is None else whole.index_select(0, order)
    return spread_onto(weight.clone(memory_format=torch.contiguous_format).mT, whole, b.mT).mT
