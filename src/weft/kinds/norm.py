"""Norm layers: a diagonal map of normalised values, which the layer multiplies by its weight itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from weft.kinds.seat import Seat


class NormSeat(Seat):
    """A norm's gain [C] and, where it has one, its offset."""

    kind = "norm"

    @classmethod
    def shape(cls, module: nn.Module, param: str) -> dict[str, Any]:
        size = module._parameters[param].shape[0]  # type: ignore[union-attr]
        return {"out_features": size, "in_features": size}
