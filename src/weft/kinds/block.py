"""Whole blocks (an attention, an MLP, a decoder layer): a frozen map of hidden states to hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from weft.core.op import DataOp
from weft.core.route import apply
from weft.kinds.seat import Seat, Woven, prove


class BlockSeat(Seat):
    """Hidden states [..., C] in, hidden states [..., C] out; a block has no weight of its own."""

    kind = "block"
    has_weight = False

    @classmethod
    def shape(cls, module: nn.Module, param: str) -> dict[str, Any]:
        shapes = [*_maps(module)]
        if not shapes:
            raise ValueError("has no linear map inside, so its width is unknown")
        # a map to one channel is a gate (Qwen's shared_expert_gate), not what the block returns
        wide = [out_features for out_features, _ in shapes if out_features > 1]
        return {"out_features": (wide or [1])[-1], "in_features": shapes[0][1]}

    def stored(self) -> Tensor:
        raise TypeError(f"{self.site.address} is a whole block: it has no single weight to read or merge into")

    def snapshot(self) -> Any:
        return self.stored()


def _maps(block: nn.Module) -> Iterator[tuple[int, int]]:
    """(out, in) of every linear map in a block, fused experts too, in its own order."""
    for module in block.modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            yield module.out_features, module.in_features  # type: ignore[misc]
        elif type(module).__name__ == "Conv1D":
            yield module.weight.shape[1], module.weight.shape[0]  # type: ignore[index,misc]
        else:
            yield from (tuple(p.shape[-2:]) for p in module._parameters.values() if p is not None and p.ndim == 3)  # type: ignore[misc]


class _Frame:
    """One call of a block: its other arguments are kept aside, and so are its other results."""

    def __init__(self, seat: Seat, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.seat = seat
        self.key = None if args else next(iter(kwargs), None)
        self.args, self.kwargs = args[1:], {k: v for k, v in kwargs.items() if k != self.key}
        self.x: Any = args[0] if args else kwargs[self.key] if self.key is not None else None
        self.others: tuple[Any, ...] | None = None

    def call(self, x: Tensor) -> Tensor:
        forward = self.seat.inner_forward or self.seat.base.forward.__get__(self.seat.module)
        if self.key is None:
            result = forward(x, *self.args, **self.kwargs)
        else:
            result = forward(**{self.key: x}, **self.kwargs)
        if isinstance(result, tuple):
            self.others = result[1:]
            return result[0]
        return result

    def weight(self) -> Tensor:
        return self.seat.stored()

    def bias(self) -> Tensor | None:
        return None

    def training(self) -> bool:
        return self.seat.module.training

    def linear(self) -> bool:
        return False

    def held_in(self) -> Mapping[str, Tensor | None]:
        return self.seat.held_in()


class WovenBlock(Woven):
    """A block whose first argument and first result are the hidden states that adapters see."""

    seat: Seat

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        seat, weave = self.seat, self.seat.weave
        if weave.unproved:
            prove(seat)
        frame = _Frame(seat, args, kwargs)
        if weave.route is None:
            y = frame.call(frame.x)
        else:
            y = apply(weave.route, frame.x, DataOp(seat.site, frame), seat.adapters, weave.expand)
        return y if frame.others is None else (y, *frame.others)
