"""Which entries of a difference are kept: by size, by chance, without outliers, or by chance that grows with size."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["Rescale", "by_chance", "by_rank", "by_size", "keep_", "largest", "rescaled", "without_outliers"]

Rescale = Literal["none", "expected", "l1"]


def by_size(delta: Tensor, density: float) -> Tensor:
    """A mask of the `density` largest entries by magnitude; at least one, unless the density is 0."""
    count = delta.numel() if density >= 1 else 0 if density <= 0 else max(1, int(density * delta.numel()))
    return largest(delta, count)


def without_outliers(delta: Tensor, density: float, outliers: float) -> Tensor:
    """A mask of `density` of the entries: the largest after the `outliers` largest of all, where there are as many."""
    size, kept = delta.numel(), int(density * delta.numel())
    if density >= 1:
        return torch.ones_like(delta, dtype=torch.bool)
    low = max(0, size - kept - int(outliers * size))
    return largest(delta, size - low) & ~largest(delta, size - low - kept)


def largest(delta: Tensor, count: int) -> Tensor:
    """A mask of the `count` entries of the largest magnitude, in float32 or float64; of equal ones the first."""
    flat = delta.flatten()
    if count <= 0 or count >= flat.numel():
        return torch.full_like(delta, count > 0, dtype=torch.bool)
    size = flat.abs()
    bits = size.view(torch.int64 if size.element_size() == 8 else torch.int32)  # numbers from 0 on are ordered as these
    if bits.device.type == "cpu":
        # numpy selects, counts and finds in a fraction of torch's time on a CPU; what it puts in order is made anew
        # and not copied before, which would be one more tensor in memory
        numbers = bits.numpy()
        numbers.partition(len(numbers) - count)
        least = numbers[len(numbers) - count]
        torch.abs(flat, out=size)
        return torch.from_numpy(_at_least(numbers, least, count)).view_as(delta)
    first = bits.sort(descending=True, stable=True).indices[:count]
    return torch.zeros_like(bits, dtype=torch.bool).index_fill_(0, first, True).view_as(delta)


def _at_least(bits: np.ndarray, least: np.generic, count: int) -> np.ndarray:
    mask: np.ndarray = bits >= least
    surplus = np.count_nonzero(mask) - count
    if surplus:
        mask[np.flatnonzero(bits == least)[-surplus:]] = False
    return mask


def keep_(delta: Tensor, mask: Tensor) -> Tensor:
    """delta under a mask, in its place."""
    if delta.device.type != "cpu":
        return delta.mul_(mask)
    np.multiply(delta.numpy(), mask.numpy(), out=delta.numpy())  # torch multiplies by a bool eight times slower
    return delta


def by_chance(delta: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """A mask that keeps every entry with probability `density`."""
    if density >= 1:
        return torch.ones_like(delta)
    return torch.bernoulli(torch.full_like(delta, density), generator=generator)


def by_rank(delta: Tensor, density: float, spread: float, generator: torch.Generator | None) -> Tensor:
    """A mask that keeps entries with a probability from density - spread (the smallest of a row) to density + spread.

    Raises ValueError where such probabilities are not between 0 and 1.
    """
    if density >= 1:
        return torch.ones_like(delta)
    if density <= 0:
        return torch.zeros_like(delta)
    if not 0 < density - spread <= density + spread < 1:
        raise ValueError(f"density={density} and spread={spread}: density -/+ spread must lie between 0 and 1")
    rows = delta.reshape(1, -1) if delta.ndim < 2 else delta
    ranks = rows.abs().argsort(dim=1).argsort(dim=1).to(delta.dtype)
    top = max(rows.shape[1] - 1, 1)
    chance = density - spread + ranks / top * 2 * spread
    return torch.bernoulli(chance, generator=generator).view_as(delta)


def rescaled(delta: Tensor, mask: Tensor, density: float, how: Rescale) -> Tensor:
    """delta under a mask, as large as before: by 1 / density, which is so on average, or by the sum of magnitudes."""
    kept = delta * mask
    if how == "expected" and 0 < density < 1:
        return kept / density
    if how == "l1":
        before, after = delta.abs().sum(), kept.abs().sum()
        return kept if min(before, after) < 1e-7 else kept * (before / after)
    return kept
