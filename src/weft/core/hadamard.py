"""The Walsh-Hadamard transform, and sparse spectra of it that are fitted to a quantisation error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["allocate", "block_size", "matrix", "refit", "transform"]


def block_size(size: int) -> int:
    """The largest power of two that divides a size: the transform of another size is one of each such block."""
    return size & -size


def matrix(size: int, like: Tensor) -> Tensor:
    """The orthonormal transform of `size` channels, [size, size]: symmetric and its own inverse."""
    block = block_size(size)
    h = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    while len(h) < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)]) / math.sqrt(2)
    return torch.block_diag(*[h] * (size // block)) if block < size else h


def transform(x: Tensor) -> Tensor:
    """x H along the last dimension: H of 2^(a + b) is H_a on runs of 2^a neighbours, then H_b across them."""
    block = block_size(x.shape[-1])
    inner = 1 << (block.bit_length() // 2)
    parts = x.unflatten(-1, (-1, block // inner, inner)) @ matrix(inner, x)
    return (matrix(block // inner, x) @ parts).flatten(-3)


def allocate(spectrum: Tensor, total: int) -> Tensor:
    """How many of `total` entries each row of a spectrum [O, I] gets: in proportion to its norm, at most I."""
    rows, most = spectrum.shape
    norms = spectrum.norm(dim=1)
    share = norms / norms.sum() if bool(norms.any()) else torch.full_like(norms, 1 / rows)
    counts = (share * total).floor().long().clamp(max=most)
    while (left := total - int(counts.sum())) > 0:  # what was floored or did not fit goes to rows that have room
        room = (counts < most).nonzero().flatten()
        each, rest = divmod(left, len(room))
        counts[room] = (counts[room] + each).clamp(max=most)
        if each == 0:
            counts[room[counts[room].argsort(stable=True)[:rest]]] += 1
    return counts


def refit(spectrum: Tensor, gram: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Flat places [n] and values [n]: each row's `counts` entries that matter most, refitted to do without the rest.

    gram: [I, I], second moments of the transformed inputs; an entry matters by |value| sqrt(gram's diagonal), and the
    values minimise the output's error by least squares.
    """
    importance = spectrum.square() * gram.diagonal()
    places, values = [], []
    for row, count in enumerate(counts.tolist()):
        chosen = importance[row].topk(count).indices.sort().values
        right = gram[chosen] @ spectrum[row]
        values.append(torch.linalg.solve(gram[chosen][:, chosen], right) if count else right)
        places.append(row * spectrum.shape[1] + chosen)
    return torch.cat(places), torch.cat(values)
