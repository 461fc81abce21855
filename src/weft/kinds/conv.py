"""Convolutions in one, two and three dimensions, with stride, dilation, groups and every padding mode."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from weft.core.op import ConvOp, Op
from weft.kinds.seat import Seat


class ConvSeat(Seat):
    """y = conv(x, W) + b with the channels before the spatial dimensions."""

    kind = "conv"

    @classmethod
    def shape(cls, module: nn.Module, param: str) -> dict[str, Any]:
        return {
            "out_features": module.out_channels,
            "in_features": module.in_channels,
            "kernel_size": tuple(module.kernel_size),  # type: ignore[arg-type]
            "groups": module.groups,
        }

    def make_op(self) -> Op:
        return ConvOp(self.site, self)

    def conv(self, x: Tensor, kernel: Tensor) -> Tensor:
        """This layer's geometry, padding mode included, with another kernel."""
        return self.base._conv_forward(self.module, x, kernel, None)  # type: ignore[attr-defined]
