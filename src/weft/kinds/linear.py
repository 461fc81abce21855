"""Linear layers: torch's, anything that looks like one, and GPT-2's Conv1D, which stores its weight transposed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from weft.core.plain import is_plain
from weft.kinds.seat import Seat


class LinearSeat(Seat):
    """y = W x + b with the channels last."""

    kind = "linear"

    @classmethod
    def shape(cls, module: nn.Module, param: str) -> dict[str, Any]:
        return {"out_features": module.out_features, "in_features": module.in_features}

    def linear(self) -> bool:
        return self.base.forward is nn.Linear.forward and is_frozen(self)


class TransposedSeat(Seat):
    """A linear layer whose weight is stored as [I, O] (GPT-2's Conv1D)."""

    kind = "linear"

    @classmethod
    def shape(cls, module: nn.Module, param: str) -> dict[str, Any]:
        in_features, out_features = module._parameters[param].shape  # type: ignore[union-attr]
        return {"out_features": out_features, "in_features": in_features}

    def oriented(self, weight: Tensor) -> Tensor:
        return weight.mT

    def linear(self) -> bool:
        return self.base.__name__ == "Conv1D" and is_frozen(self)


class MatrixSeat(Seat):
    """A bare matrix parameter [O, I] of a module that multiplies by it itself (fused projections)."""

    kind = "linear"

    @classmethod
    def shape(cls, module: nn.Module, param: str) -> dict[str, Any]:
        out_features, in_features = module._parameters[param].shape  # type: ignore[union-attr]
        return {"out_features": out_features, "in_features": in_features}


def is_frozen(seat: Seat) -> bool:
    """Whether a seat's own weight and bias are ordinary tensors that do not train, and nobody wrapped its forward."""
    weight, bias = seat.stored(), seat.bias()
    ordinary = is_plain(weight.data) and not weight.requires_grad and (bias is None or not bias.requires_grad)
    return ordinary and seat.inner_forward is None
