"""Whole blocks (an attention, an MLP, a decoder layer): a frozen map of hidden states to hidden states."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from weft.core.adapter import Adapter, Shared
from weft.core.op import DataOp
from weft.core.positions import Positions
from weft.core.route import apply
from weft.core.site import Site
from weft.kinds.seat import Seat, Weave, Woven, base_class, prove

_MIXES = re.compile(r"att(ention|n)|mixer|mamba|ssm|conv\dd|rnn|lstm|gru|rwkv|rope", re.IGNORECASE)


class BlockSeat(Seat):
    """Hidden states [..., C] in, hidden states [..., C] out; a block has no weight of its own."""

    kind = "block"
    has_weight = False

    def __init__(self, module: nn.Module, site: Site, weave: Weave, param: str = ""):
        super().__init__(module, site, weave, param)
        weave.has_blocks = True

    @classmethod
    def shape(cls, module: nn.Module, param: str) -> dict[str, Any]:
        shapes = [*_maps(module)]
        if not shapes:
            raise ValueError("has no linear map inside, so its width is unknown")
        # a map to one channel is a gate (Qwen's shared_expert_gate), not what the block returns
        wide = [out_features for out_features, _ in shapes if out_features > 1]
        return {
            "out_features": (wide or [1])[-1],
            "in_features": shapes[0][1],
            "mixes_tokens": any(_MIXES.search(name) for name in _names(module)),
        }

    def stored(self) -> Tensor:
        raise TypeError(f"{self.site.address} is a whole block: it has no single weight to read or merge into")

    def snapshot(self) -> Any:
        return self.stored()


def _names(block: nn.Module) -> Iterator[str]:
    """What a block, its parts and their classes are called."""
    for path, module in block.named_modules():
        if "adapters" not in path.split("."):
            yield from (base_class(module).__name__, path.rpartition(".")[2])


def _maps(block: nn.Module) -> Iterator[tuple[int, int]]:
    """(out, in) of every linear map in a block, fused experts too, in its own order."""
    for module in block.modules():
        if isinstance(module, Adapter | Shared):  # adapters that are there already are no part of the block
            continue
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

    def given(self, name: str, count: int) -> Tensor:
        return self.seat.given(name, count)

    def num_seen(self) -> int:
        return self.seat.num_seen()

    def invoked(self, x: Tensor, tokens: tuple[int, ...]) -> Tensor:
        return self.seat.invoked(x, tokens)

    def hidden(self) -> list[Tensor]:
        return self.seat.hidden()

    def positions(self, x: Tensor) -> Positions:
        call = self.seat.weave.call
        return Positions.of_whole_rows(x) if call is None else call.positions(x, self.seat.site.address)


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
