"""Dropout whose mask is never kept: the dropped entries are found again from a seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Dropout:
    """Which entries of one input are dropped: found again from a seed, so that no mask is kept.

    The number of draws is Poisson with mean -ln(1 - p) per entry and each draw hits any entry alike. Then the hits of
    the entries are independent, and one is hit at least once with probability p: exactly dropout, at a cost that falls
    with p instead of one random number for every entry.
    """

    def __init__(self, p: float):
        self.p, self.seed = p, int(torch.randint(2**62, ()))  # the global generator: resuming and recomputing replay it

    def of(self, rows: Tensor, hits: Tensor | None = None) -> Tensor:
        """A copy of `rows` without the dropped entries, not yet divided by 1 - p. hits: which, where they are known."""
        copy = rows.clone(memory_format=torch.contiguous_format)
        if self.p >= 1.0:
            return copy.zero_()
        copy.view(-1).index_fill_(0, self.hits(rows) if hits is None else hits, 0.0)
        return copy

    def hits(self, rows: Tensor) -> Tensor:
        """Which entries of `rows`, counted row after row, are dropped; some of them more than once."""
        if self.p >= 1.0 or rows.is_meta:  # a scale of zero drops all
            return torch.empty(0, dtype=torch.long, device=rows.device)
        cpu = torch.Generator().manual_seed(self.seed)
        mean = torch.tensor(-math.log1p(-self.p) * rows.numel(), dtype=torch.float64)
        count = int(torch.poisson(mean, generator=cpu))
        here = cpu if rows.device.type == "cpu" else torch.Generator(rows.device).manual_seed(self.seed)
        return torch.randint(rows.numel(), (count,), generator=here, device=rows.device)

    @property
    def scale(self) -> float:
        """What the entries that stay are multiplied by."""
        return 1.0 / (1.0 - self.p) if self.p < 1.0 else 0.0
