"""Ops that are another op but for one thing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.core.op import DataOp, Op
from weft.core.positions import Positions


class OpView(Op):
    """An op that is another one but for what a subclass changes."""

    def __init__(self, inner: Op):
        self.inner, self.site = inner, inner.site

    def __call__(self, x: Any) -> Any:
        return self.inner(x)

    def weight(self) -> Tensor:
        return self.inner.weight()

    def bias(self) -> Tensor | None:
        return self.inner.bias()

    def project(self, x: Any, a: Tensor) -> Any:
        return self.inner.project(x, a)

    def expand(self, h: Any, b: Tensor, onto: Any = None) -> Any:
        return self.inner.expand(h, b, onto)

    def scale(self, y: Any, g: Tensor) -> Any:
        return self.inner.scale(y, g)

    def shift(self, y: Any, b: Tensor) -> Any:
        return self.inner.shift(y, b)

    def rotate(self, x: Any, q: Tensor) -> Any:
        return self.inner.rotate(x, q)

    def permute(self, x: Any, order: Tensor) -> Any:
        return self.inner.permute(x, order)

    def take(self, x: Any, indices: Tensor) -> Any:
        return self.inner.take(x, indices)

    def place(self, h: Any, indices: Tensor, size: int, onto: Any = None) -> Any:
        return self.inner.place(h, indices, size, onto)

    def drop(self, x: Any, p: float) -> Any:
        return self.inner.drop(x, p)

    def chance(self, *size: int) -> Tensor | None:
        return self.inner.chance(*size)

    def penalise(self, y: Any, loss: Tensor) -> Any:
        return self.inner.penalise(y, loss)

    def num_seen(self) -> int:
        return self.inner.num_seen()

    def hidden(self) -> list[Tensor]:
        return self.inner.hidden()

    def self_attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.inner.self_attention(query, key, value)

    def given(self, x: Any, name: str, count: int) -> Tensor:
        return self.inner.given(x, name, count)

    def positions(self, x: Any) -> Positions:
        return self.inner.positions(x)

    def invoked(self, x: Any, tokens: tuple[int, ...]) -> Tensor:
        return self.inner.invoked(x, tokens)

    def prepend(self, y: Any, *rows: Tensor) -> Any:
        return self.inner.prepend(y, *rows)

    def attend(self, y: Any, hidden: Tensor, gate: Tensor) -> Any:
        return self.inner.attend(y, hidden, gate)


class Unbiased(OpView):
    """The map without its bias, for methods that must not touch it."""

    def __call__(self, x: Any) -> Any:
        b = self.inner.bias()
        return self.inner(x) if b is None else self.inner.shift(self.inner(x), -b)

    def bias(self) -> Tensor | None:
        return None


class Once(OpView):
    """The map, computed once for one input however many adapters read it."""

    def __call__(self, x: Any) -> Any:
        if getattr(self, "_x", None) is not x:
            self._x, self._y = x, self.inner(x)
        return self._y


class Spy(OpView):
    """A map that is only looked at, to see whether its input as it is was wanted; nothing random is drawn."""

    def __init__(self, inner: DataOp, x: Tensor):
        super().__init__(inner)
        self.x, self.asked = x, False

    def drop(self, x: Tensor, p: float) -> Tensor:
        return x.clone()

    def positions(self, x: Any) -> Positions:
        return Positions.of_whole_rows(x)

    def hidden(self) -> list[Tensor]:
        return [state[: len(self.x)] for state in self.inner.hidden()]

    def self_attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.zeros_like(value).transpose(1, 2)

    def invoked(self, x: Any, tokens: tuple[int, ...]) -> Tensor:
        return torch.ones(1, dtype=torch.bool, device=x.device)

    def given(self, x: Any, name: str, count: int) -> Tensor:
        return torch.zeros([1] * (x.ndim - 1), dtype=torch.long, device=x.device)

    def __call__(self, x: Tensor) -> Tensor:
        self.asked = self.asked or x is self.x
        if type(self.inner) is DataOp:  # a block is not called for a part of a batch: its mask has all rows
            return x.new_zeros(*x.shape[:-1], self.site.out_features)
        y: Tensor = self.inner(x)
        return y
