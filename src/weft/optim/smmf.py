"""SMMF: both of Adam's averages as one row, one column and a bit for each sign, of a tensor reshaped to a square."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.core import option
from weft.optim.choice import Choice, Groups, Setting
from weft.optim.own import Own

__all__ = ["SMMF", "square_shape"]


@dataclass(frozen=True)
class _SMMF(Choice):
    """M = b_m (S * r_m c_m^T) + (1 - b_m) G,  V = b_v r_v c_v^T + (1 - b_v) G^2,  u = M / (sqrt(V) + eps).

    G is the gradient as the squarest matrix of its size; b_m = b k^(t-1), b_v = 1 - t^d at step t = 1, 2, ... r and c
    are the sums over rows and columns, one of them divided by its total; S are the signs of M.

    Park and Lee 2024, arXiv 2412.08894.
    """

    name, paper = "smmf", "2412.08894"
    what = "Adam whose averages are one row, one column and one bit a value"
    takes_betas = False
    beta: float = option(0.9, help="weight of the past in the first average (b)", minimum=0, maximum=1)
    growth: float = option(0.999, help="what it is multiplied with at every step (k)", minimum=0, maximum=1)
    decay: float = option(-0.5, help="exponent of the step in the second one's weight (d)", minimum=-1, maximum=0)
    eps: float = option(1e-8, help="added to the denominator", above=0)

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        return SMMF(groups, setting, self)


class SMMF(Own):
    """The optimiser."""

    def __init__(self, groups: Groups, setting: Setting, options: _SMMF):
        super().__init__(groups, setting.rate)
        self._options = options

    def direction(self, p: nn.Parameter, gradient: Tensor) -> Tensor:
        state, options = self.state[p], self._options
        g = gradient.reshape(square_shape(gradient.numel()))
        step = state["step"] = state.get("step", 0) + 1
        beta_m, beta_v = options.beta * options.growth ** (step - 1), 1 - step**options.decay
        mean, square = (1 - beta_m) * g, (1 - beta_v) * g * g
        if step > 1:
            mean.add_(_signed(torch.outer(state["row_m"], state["column_m"]), state["signs"]), alpha=beta_m)
            square.addr_(state["row_v"], state["column_v"], alpha=beta_v)
        state["signs"] = _packed(mean > 0)
        state["row_m"], state["column_m"] = _factors(mean.abs())
        state["row_v"], state["column_v"] = _factors(square)
        return mean.div_(square.sqrt_().add_(options.eps)).view_as(gradient)


def square_shape(count: int) -> tuple[int, int]:
    """The two factors of a count that are nearest to each other, the larger one first."""
    columns = next(n for n in range(math.isqrt(count), 0, -1) if count % n == 0)
    return count // columns, columns


def _factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The row sums and the column sums, such that their outer product has the same sums."""
    row, column = matrix.sum(1), matrix.sum(0)
    total = column.sum()
    return row, column / torch.where(total > 0, total, torch.ones_like(total))


def _bits(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def _packed(signs: Tensor) -> Tensor:
    """Eight booleans a byte."""
    flat = signs.flatten().to(torch.uint8)
    padded = nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (padded * _bits(signs.device)).sum(1, dtype=torch.uint8)


def _signed(sizes: Tensor, packed: Tensor) -> Tensor:
    """Sizes with the sign of each bit: plus where it is set."""
    bits = (packed[:, None] & _bits(packed.device)).ne(0).flatten()[: sizes.numel()].view_as(sizes)
    return torch.where(bits, sizes, -sizes)
