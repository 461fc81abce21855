"""Rotations of blocks of channels: skew matrices, the Cayley map, and the orders of a butterfly."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["butterfly_order", "cayley", "cayley_series", "join_blocks", "orthonormal_rows", "skew"]


def skew(v: Tensor, block: int) -> Tensor:
    """Skew matrices [N, block, block] from their upper triangles, row by row: v [N, block (block - 1) / 2]."""
    i, j = torch.triu_indices(block, block, 1, device=v.device)
    upper = v.new_zeros(len(v), block * block).index_copy(1, i * block + j, v).unflatten(1, (block, block))
    return upper - upper.mT


def cayley(q: Tensor) -> Tensor:
    """(I - Q)(I + Q)^-1: an orthogonal matrix for every skew one, [N, block, block]."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(eye + q, eye - q, left=False)


def cayley_series(q: Tensor, terms: int) -> Tensor:
    """The start of the series of (I + Q)(I - Q)^-1: I + 2 Q + 2 Q^2 + ... + Q^(terms - 1); terms >= 4."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q)
    rest = torch.baddbmm(2 * (q + eye), q, q)  # from the inside: the fewest products are kept for the backward
    for _ in range(4, terms):
        rest = torch.baddbmm(eye, q, rest, beta=2)
    return torch.baddbmm(eye, q, rest)


def join_blocks(q: Tensor, together: int) -> Tensor:
    """The block-diagonal matrix of q [N, rows, columns] in blocks of k of them: [N / k, k rows, k columns]."""
    blocks = torch.diag_embed(q.unflatten(0, (-1, together)).permute(0, 2, 3, 1), dim1=1, dim2=3)
    return blocks.flatten(3).flatten(1, 2)


def butterfly_order(size: int, block: int, level: int, device: torch.device) -> Tensor:
    """Order of channels in which blocks meet partners 2^level blocks away: even half-blocks, then odd ones."""
    if level == 0:
        return torch.arange(size, device=device)
    return torch.arange(size, device=device).view(-1, 2**level, 2, block // 2).transpose(1, 2).flatten()


def orthonormal_rows(v: Tensor, size: int) -> Tensor:
    """v [N size, C] with every `size` rows made orthonormal one after another; rows that are stay as they are."""
    wide = v.to(torch.promote_types(v.dtype, torch.float32))  # there is no QR of shorter numbers
    q, r = torch.linalg.qr(wide.unflatten(0, (-1, size)).mT)  # [N, C, size]
    return (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).mT.flatten(0, 1).to(v.dtype)
