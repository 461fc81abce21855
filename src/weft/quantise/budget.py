"""Bits and groups for every matrix under a memory budget: the least total error that fits (LQ-LoRA's program)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from weft.errors import QuantiseError
from weft.kinds.packed import round_to_grid

__all__ = ["GRIDS", "Grid", "assign", "choose_grids"]


@dataclass(frozen=True)
class Grid:
    """One way to hold a matrix: codes of `bits`, and a 16-bit scale and a zero point for every `group_size` of them."""

    bits: int
    group_size: int

    @property
    def cost(self) -> float:
        """Bits per weight."""
        return self.bits + (16 + self.bits) / self.group_size

    def rounded(self, weight: Tensor) -> Tensor:
        """What this grid makes of a weight [O, I]."""
        codes, zeros, scales = round_to_grid(weight, self.bits, self.group_size)
        spread = torch.arange(weight.shape[1], device=weight.device) // self.group_size
        return ((codes - zeros[:, spread]) * scales[:, spread]).to(weight.dtype)


GRIDS = tuple(Grid(bits, size) for bits, size in product((2, 3, 4, 8), (32, 64, 128)))
"""What a matrix may get."""


@torch.no_grad()
def choose_grids(
    weights: Mapping[str, Tensor], bits: float, *, error: Callable[[str, Tensor, Grid], float] | None = None
) -> dict[str, Grid]:
    """The grid of every matrix [O, I] such that all together take at most `bits` per weight, with the least error.

    error: of a matrix on a grid; by default the squared distance to the rounded one.
    Guo et al. 2023 (LQ-LoRA), arXiv 2311.12023, solve the same integer program; theirs chooses among NormalFloat grids.
    Raises QuantiseError for a budget below the smallest grid.
    """
    of = error or (lambda _path, w, grid: float((w - grid.rounded(w)).square().sum()))
    losses = [[of(path, w, grid) for grid in GRIDS] for path, w in weights.items()]
    # in 1/64 bits, where every grid of a matrix is a whole number of times its size over 2
    sizes = [[round(w.numel() * grid.cost * 64) for grid in GRIDS] for w in weights.values()]
    total = sum(w.numel() for w in weights.values())
    chosen = assign(losses, sizes, int(total * bits * 64))
    if chosen is None:
        least = min(grid.cost for grid in GRIDS)
        raise QuantiseError(f"bits={bits} cannot be met: the smallest grid takes {least:.2f} bits per weight")
    return {path: GRIDS[i] for path, i in zip(weights, chosen, strict=True)}


def assign(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int] | None:
    """One choice per row, the least sum of losses whose sizes fit the budget together; None where none fits.

    Exact: every row extends the frontier of (size, loss) pairs that no other pair beats in both. Sizes come in steps
    of their greatest common divisor, so the frontier stays short for models, whose matrices have few shapes.
    """
    used, lost = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    steps: list[tuple[Tensor, Tensor]] = []  # for every row: which choice, and which point of the frontier before it
    unit = math.gcd(*(size for row in sizes for size in row))
    for row_losses, row_sizes in zip(losses, sizes, strict=True):
        sums = (used[:, None] + torch.tensor([s // unit for s in row_sizes])).flatten()
        totals = (lost[:, None] + torch.tensor(row_losses, dtype=torch.float64)).flatten()
        order = torch.tensor(sorted(range(len(sums)), key=lambda i: (sums[i].item(), totals[i].item())))
        order = order[sums[order] <= budget // unit]
        if not len(order):
            return None
        best = totals[order].cummin(0).values
        better = torch.cat([torch.ones(1, dtype=torch.bool), best[1:] < best[:-1]])
        kept = order[better]
        used, lost = sums[kept], totals[kept]
        steps.append((kept % len(row_sizes), kept // len(row_sizes)))
    at, chosen = int(lost.argmin()), []
    for choice, before in reversed(steps):
        chosen.append(int(choice[at]))
        at = int(before[at])
    return chosen[::-1]
