"""A part of a batch as a map sees it: what is computed for several parts at once, and what is given for its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.core.op import DataOp, Op
from weft.core.positions import Positions
from weft.core.view import OpView

__all__ = ["Chosen", "Common", "Portion"]


class Common:
    """The frozen map of several parts of a batch, computed in one call when the first of them is asked for.

    Where these are all its parts, the batch goes through as it is: what a block is given beside it is for its rows.
    parts: those that are wanted, by number; where: the rows of every part; in_order: whether the batch has them so.
    """

    def __init__(self, op: DataOp, batch: Tensor, parts: Mapping[int, Tensor], where: Sequence[Tensor], in_order: bool):
        self.op, self.batch, self.parts, self.where, self.in_order = op, batch, parts, where, in_order
        self.found: dict[int, Tensor] = {}

    def of(self, number: int) -> Tensor:
        """The map of one of the parts."""
        if not self.found:
            if len(self.parts) < len(self.where):
                y = self.op(torch.cat([*self.parts.values()]))
            else:
                y = self.op(self.batch)
                y = y if self.in_order else y.index_select(0, torch.cat([*self.where]))
            self.found.update(zip(self.parts, y.split([p.shape[0] for p in self.parts.values()]), strict=True))
        return self.found[number]


class Portion(OpView):
    """A map on a part of a batch, which takes its share of what is computed for several parts at once.

    where: the rows that the part has of the batch.
    """

    def __init__(self, inner: DataOp, part: Tensor, number: int, common: Common, where: Tensor):
        super().__init__(inner)
        self.part, self.number, self.common, self.where = part, number, common, where

    def positions(self, x: Any) -> Positions:
        return self.inner.positions(self.common.batch).rows(self.where)

    def __call__(self, x: Tensor) -> Tensor:
        if x is self.part:
            return self.common.of(self.number)
        y: Tensor = self.inner(x)
        return y


class Chosen(OpView):
    """A map on some rows of a batch, which knows what is given for them and what the layers before gave of them.

    whole: the batch that these rows are of; where: which they are.
    """

    def __init__(self, inner: Op, whole: Tensor, where: Tensor):
        super().__init__(inner)
        self.whole, self.where = whole, where

    def given(self, x: Any, name: str, count: int) -> Tensor:
        values: Tensor = self.inner.given(self.whole, name, count)
        return values if values.shape[0] == 1 else values.index_select(0, self.where)

    def invoked(self, x: Any, tokens: tuple[int, ...]) -> Tensor:
        return self.inner.invoked(self.whole, tokens).index_select(0, self.where)

    def hidden(self) -> list[Tensor]:
        return [state.index_select(0, self.where) for state in self.inner.hidden()]

    def self_attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # the mask and the cache have all rows of the batch
        full = (t.new_zeros(len(self.whole), *t.shape[1:]).index_copy(0, self.where, t) for t in (query, key, value))
        return self.inner.self_attention(*full).index_select(0, self.where)

    def positions(self, x: Any) -> Positions:
        if isinstance(self.inner, Portion):
            return self.inner.positions(x)
        return self.inner.positions(self.whole).rows(self.where)
