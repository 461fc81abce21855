"""Adapters in sixteen bits: half precision with the range of single, for losses that eight bits cannot hold."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.compress.code import Code

__all__ = ["Half", "half"]


class Half(Code):
    """A tensor in float16 as a share of its largest magnitude, which is its one scale."""

    name = "half"

    def tensor(self) -> Tensor:
        self.checked(num_codes=2 * self.numel, num_scales=1, num_options=0)
        values = self.codes.clone().view(torch.float16).float()  # of its own memory, which is aligned
        return (values * self.scales).view(self.shape).to(self.dtype)


def half(weight: Tensor) -> Half:
    """A trained tensor in sixteen bits for each entry: a rounding of at most 2^-12 of what it is near its largest."""
    wide = weight.detach().flatten().float().cpu()
    scale = wide.abs().max().clamp(min=torch.finfo(torch.float32).tiny).view(1)
    return Half((wide / scale).half().view(torch.uint8), scale, tuple(weight.shape), weight.dtype)
