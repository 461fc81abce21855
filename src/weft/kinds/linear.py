"""Linear layers: torch's, anything that looks like one, and GPT-2's Conv1D, which stores its weight transposed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from weft.kinds.seat import Seat


class LinearSeat(Seat):
    """y = W x + b with the channels last."""

    kind = "linear"

    @classmethod
    def shape(cls, module: nn.Module, param: str) -> dict[str, Any]:
        return {"out_features": module.out_features, "in_features": module.in_features}


class TransposedSeat(Seat):
    """A linear layer whose weight is stored as [I, O] (GPT-2's Conv1D)."""

    kind = "linear"

    @classmethod
    def shape(cls, module: nn.Module, param: str) -> dict[str, Any]:
        in_features, out_features = module._parameters[param].shape  # type: ignore[union-attr]
        return {"out_features": out_features, "in_features": in_features}

    def oriented(self, weight: Tensor) -> Tensor:
        return weight.mT


class MatrixSeat(Seat):
    """A bare matrix parameter [O, I] of a module that multiplies by it itself (fused projections)."""

    kind = "linear"

    @classmethod
    def shape(cls, module: nn.Module, param: str) -> dict[str, Any]:
        out_features, in_features = module._parameters[param].shape  # type: ignore[union-attr]
        return {"out_features": out_features, "in_features": in_features}
