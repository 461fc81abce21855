"""Adapters of one or few bits: codes for a Gaussian, with a mean and a deviation for each row or group."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from weft.compress.bits import pack, unpack
from weft.compress.code import Code

__all__ = ["Gaussian", "centroids", "few_bits", "grouped", "nearest", "through", "ungrouped"]

_ROUNDS, _MOST = 500, 8
_TINY = torch.finfo(torch.float32).tiny


class Gaussian(Code):
    """A tensor as centroids of a Gaussian. scales: the mean of every group, then the deviation of every group.

    options: bits, and the size of a group; 0: a whole row (see `grouped`).
    """

    name = "gaussian"

    def tensor(self) -> Tensor:
        if len(self.options) != 2:
            raise ValueError(f"a Gaussian code has 2 options, bits and group size, not {len(self.options)}")
        bits, group = self.options
        like = grouped(torch.empty(self.shape, device="meta"), group)  # [groups, entries]
        self.checked(num_codes=-(-self.numel * bits // 8), num_scales=2 * len(like), num_options=2)
        mean, deviation = self.scales.view(2, -1, 1)
        codes = unpack(self.codes, bits, self.numel).view(like.shape)
        values = centroids(bits).to(mean)[codes.long()]
        return ungrouped(values * deviation + mean, self.shape).to(self.dtype)


def few_bits(weight: Tensor, *, bits: int = 1, group_size: int = 0) -> Gaussian:
    """A trained tensor in 1 to 8 bits for each entry.

    w' = std(w) c_k + mean(w), with c_k the nearest of the 2^bits centroids to (w - mean(w)) / std(w).
    group_size: mean and std of so many entries of a row; 0: of each row, where the paper has those of the matrix. Rows
        run along the longer side: those of a factor [R, I], the columns of a factor [O, R].
    Jie et al. 2023, arXiv 2307.16867.
    Raises ValueError for a group size that does not divide a row.
    """
    _, codes, mean, deviation = nearest(grouped(weight.detach().float(), group_size), bits)
    scales = torch.cat([mean.flatten(), deviation.flatten()]).cpu()
    return Gaussian(pack(codes, bits).cpu(), scales, tuple(weight.shape), weight.dtype, (bits, group_size))


def nearest(groups: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Groups of entries [G, N] less their mean over their deviation, the nearest centroids' numbers, and these two."""
    mean, deviation = groups.mean(1, keepdim=True), groups.std(1, correction=0, keepdim=True)
    standard = ((groups - mean) / deviation.clamp(min=_TINY)).contiguous()
    known = centroids(bits).to(groups)
    return standard, torch.bucketize(standard, (known[1:] + known[:-1]) / 2), mean, deviation


def through(weight: Tensor, gradient: Tensor, *, bits: int) -> Tensor:
    """The gradient for a tensor of which `few_bits` was used, out of that for what was used: straight through.

    The centroid counts as what it is nearest to; mean and deviation are functions of the tensor, and so
    d w_i = g_i + (1 / N) w~_i sum_j g_j (c_j - w~_j) with w~ the tensor less its mean over its deviation.
    """
    standard, codes, _, _ = nearest(grouped(weight.detach().float(), 0), bits)
    g = grouped(gradient.float(), 0)
    off = centroids(bits).to(g)[codes] - standard
    found = g + standard * (g * off).mean(1, keepdim=True)
    return ungrouped(found, tuple(weight.shape)).to(gradient.dtype)


def grouped(t: Tensor, size: int) -> Tensor:
    """A tensor as groups [G, entries] that have scales of their own: rows along its longer side, or parts of them."""
    rows = _turned(t).flatten(1) if t.ndim > 3 else _turned(t).reshape(-1, _turned(t).shape[-1])
    if not size:
        return rows
    if rows.shape[1] % size:
        raise ValueError(f"groups of {size} do not divide rows of {rows.shape[1]}, those of a tensor {tuple(t.shape)}")
    return rows.reshape(-1, size)


def ungrouped(groups: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor that `grouped` made groups of."""
    turned = _turned(torch.empty(shape, device="meta"))
    return _turned(groups.reshape(turned.shape), back=shape)


def _turned(t: Tensor, back: tuple[int, ...] | None = None) -> Tensor:
    """With the longer of the last two dimensions last; a kernel is one row for each of its output channels."""
    shape = t.shape if back is None else back
    return t.mT if len(shape) in (2, 3) and shape[-1] < shape[-2] else t


@cache
def centroids(bits: int) -> Tensor:
    """The 2^bits numbers, ascending, to the nearest of which a standard Gaussian has the least mean distance.

    Each is the median of the part of the Gaussian that is nearest to it, found by going back and forth between the two.
    """
    if not 1 <= bits <= _MOST:
        raise ValueError(f"there are centroids of 1 to {_MOST} bits, not of {bits}")
    count = 2**bits
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count  # of the Gaussian, left of each
    values = torch.special.ndtri(shares)
    for _ in range(_ROUNDS):
        left = torch.special.ndtr((values[1:] + values[:-1]) / 2)
        bounds = torch.cat([left.new_zeros(1), left, left.new_ones(1)])
        values = torch.special.ndtri((bounds[1:] + bounds[:-1]) / 2)
    return values
