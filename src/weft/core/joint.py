"""A basis that several weights share: the joint decomposition of their stack."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

__all__ = ["basis", "in_basis", "off_diagonal"]


def basis(weights: Sequence[Tensor], ridge: float) -> tuple[Tensor, Tensor]:
    """V [I, I] of weights [O, I], and its inverse: each of them is U diag(l) V^T with U of unit columns.

    With [W_1; W_2; ...] = [Q_1; Q_2; ...] R it is R^T Z, Z the eigenvectors of the mean of (Q_k^T Q_k + ridge)^-1.
    Fewer rows than I have no such R: then V is their orthogonal basis, filled up.
    """
    first = weights[0]
    if first.is_meta:
        size = first.shape[1]
        return first.new_empty(size, size), first.new_empty(size, size)
    # as HF PEFT computes it, to the bit: it makes U of a basis of its own, also where a folder brings one
    stacked = torch.cat([w.float().cpu() for w in weights])
    if len(stacked) < stacked.shape[1]:
        v = torch.linalg.svd(stacked, full_matrices=True).Vh.mT
    else:
        q, r = torch.linalg.qr(stacked)
        total, one = torch.zeros_like(r), ridge * torch.eye(len(r))
        for part in q.split([len(w) for w in weights]):
            total += torch.linalg.inv(part.mT @ part + one)
        v = r.mT @ torch.linalg.eigh(total / len(weights)).eigenvectors
    v = v.to(first).contiguous()
    return v, torch.linalg.pinv(v.double()).to(v.dtype)


def in_basis(weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """U [O, I] of unit columns and l [I] with weight = U diag(l) V^T; zeros for a direction that the weight lacks."""
    low = not weight.is_meta and torch.is_autocast_enabled(weight.device.type)
    with torch.autocast(weight.device.type, enabled=False) if low else nullcontext():  # or rounding looks like content
        scaled = weight.to(inverse.dtype) @ inverse.mT
    length = scaled.norm(dim=0)
    has = length > 1e-6 * length.amax()
    return torch.where(has, scaled / length, 0), torch.where(has, length, 0)


def off_diagonal(size: int, count: int, seed: int, device: torch.device | str) -> Tensor:
    """`count` different places of a matrix [size, size], at random and off its diagonal: rows and columns, [2, N]."""
    if torch.device(device).type == "meta":
        return torch.empty(2, count, dtype=torch.long, device=device)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(size * (size - 1), generator=generator)[:count]
    rows, columns = drawn // max(size - 1, 1), drawn % max(size - 1, 1)
    return torch.stack([rows, columns + (columns >= rows)]).to(device)
