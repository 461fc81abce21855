"""The batch reading: every row of a batch has its own adapter; coefficients are stacked and an index picks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.core.functions import times
from weft.core.fused import Deferred, fuses, value
from weft.core.op import DataOp, Op, _autocast, _cast
from weft.core.positions import Positions
from weft.core.stacked import Gained
from weft.core.view import OpView

GATHERED_ROWS = 64
"""A coefficient with more rows than this is not copied per block: its blocks are sorted into segments instead."""


class Gather(OpView):
    """Verbs with stacked coefficients [K, ...]. The rows of the input come in N blocks of equal size.

    ids [N]: which coefficients each block uses; None: there are K blocks, and block k uses number k, so that nothing is
        copied. Verbs are the plain op's, mapped over blocks; on activations [B, T, C] they are batched matmuls.
        A matrix [1, ...] is that of all blocks.
    frozen: what computes the map itself, where that is not `inner`.
    """

    inner: DataOp

    def __init__(self, inner: DataOp, ids: Tensor | None, num_blocks: int, frozen: Op | None = None):
        super().__init__(inner)
        self.ids, self.num_blocks, self.frozen = ids, num_blocks, inner if frozen is None else frozen
        self.flat = type(inner) is DataOp

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.frozen(x)
        return y

    def project(self, x: Tensor, a: Tensor) -> Tensor:
        if self._common(a):
            return self.inner.project(x, a[0])
        return self._matmul(x, a) if self.flat else self._map("project", x, a)

    def expand(self, h: Tensor, b: Tensor | Gained, onto: Tensor | None = None) -> Tensor:
        if isinstance(b, Gained):
            y = self.expand(self.scale(h, b.right), b.matrix)
            return self.scale(y, b.left) if onto is None else self._scaled_onto(y, b.left, onto)
        if self._common(b):
            return self.inner.expand(h, b[0], onto)
        if self.flat and onto is not None and self._copied(b) and onto.dtype == h.dtype:
            y = torch.baddbmm(self._blocks(onto), self._blocks(h), self._picked(_cast(b, h).mT))
            return y.view(onto.shape)
        y = self._matmul(h, b) if self.flat else self._map("expand", h, b)
        return y if onto is None else onto + y

    def scale(self, y: Tensor, g: Tensor) -> Tensor:
        if not self.flat:
            return self._map("scale", y, g)
        return (self._blocks(y) * self._picked(_cast(g, y)).unsqueeze(1)).view(y.shape)

    def shift(self, y: Tensor, b: Tensor) -> Tensor:
        if b.ndim == 1:  # the module's own bias, taken off for a method that must not see it: the same for all rows
            return self.inner.shift(y, b)
        if not self.flat:
            return self._map("shift", y, b)
        return (self._blocks(y) + self._picked(_cast(b, y)).unsqueeze(1)).view(y.shape)

    def rotate(self, x: Tensor, q: Tensor) -> Tensor:
        return self._map("rotate", x, q)

    def permute(self, x: Tensor, order: Tensor) -> Tensor:
        return self._map("permute", x, order)

    def take(self, x: Tensor, indices: Tensor) -> Tensor:
        return self._map("take", x, indices)

    def place(self, h: Tensor, indices: Tensor, size: int, onto: Tensor | None = None) -> Tensor:
        blocks = h.unflatten(0, (self.num_blocks, -1))
        place = lambda h, indices: self.inner.place(h, indices, size)  # noqa: E731
        y = torch.vmap(place)(blocks, self._picked(indices)).flatten(0, 1)
        return y if onto is None else onto + y

    def kron(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return self._map("kron", x, a, b)

    def positions(self, x: Tensor) -> Positions:
        return self.frozen.positions(x)  # which knows the rows that these are

    def penalise(self, y: Tensor, loss: Tensor) -> Tensor:
        if self.inner.source.training() and torch.is_grad_enabled():
            raise TypeError(
                f"{self.site.address}: this method minimises a loss of its own over the tokens of a batch, which "
                "adapters that train in one batch would share; train them one by one"
            )
        return y

    def _map(self, verb: str, x: Tensor, *c: Tensor) -> Tensor:
        y = torch.vmap(getattr(self.inner, verb))(x.unflatten(0, (self.num_blocks, -1)), *map(self._picked, c))
        return y.flatten(0, 1)

    def _scaled_onto(self, y: Tensor, g: Tensor, onto: Tensor) -> Tensor:
        if not self.flat or onto.dtype != y.dtype:
            return onto + self.scale(y, g)
        gains = self._picked(_cast(g, y)).unsqueeze(1)
        return torch.addcmul(self._blocks(onto), self._blocks(y), gains).view(onto.shape)

    def _common(self, c: Tensor) -> bool:
        """Whether a matrix is the same for all adapters: then it meets all rows in one product."""
        return c.shape[0] == 1 < self.num_blocks

    def _blocks(self, x: Tensor) -> Tensor:
        return x.reshape(self.num_blocks, -1, x.shape[-1])  # [N, rows and tokens of a block, C]

    def _picked(self, c: Tensor) -> Tensor:
        if self._common(c):
            return c.expand(self.num_blocks, *c.shape[1:])
        return c if self.ids is None else c.index_select(0, self.ids)  # [N, ...]; its backward only adds

    def _copied(self, a: Tensor) -> bool:
        """Whether a copy of a's matrices for every block is cheap, or none is needed."""
        return self.ids is None or min(a.shape[1:]) <= GATHERED_ROWS

    def _matmul(self, x: Tensor, a: Tensor) -> Tensor:
        """x [B, ..., I], each of its blocks meeting its own a[k] [R, I]."""
        a, blocks = _cast(a, x), self._blocks(x)
        y = torch.bmm(blocks, self._picked(a).mT) if self._copied(a) else self._by_segments(blocks, a)
        return y.view(*x.shape[:-1], a.shape[1])

    def _by_segments(self, blocks: Tensor, a: Tensor) -> Tensor:
        assert self.ids is not None, "blocks that are in order need no sorting"
        order = self.ids.argsort(stable=True)
        sizes = torch.bincount(self.ids, minlength=a.shape[0]).tolist()
        parts = [F.linear(part, a[k]) for k, part in enumerate(blocks[order].split(sizes)) if len(part)]
        return torch.cat(parts)[order.argsort()]


def reading(gather: Gather, x: Tensor) -> Op:
    """The verbs for a body: those that wait where gradients are wanted and nothing else computes the map."""
    waits = gather.frozen is gather.inner and fuses(gather.inner) and not _autocast(x)
    return TrainGather(gather) if waits else gather


class Projected(Deferred):
    """a x, not computed yet."""

    def __init__(self, op: Gather, x: Tensor, a: Tensor):
        self.op, self.x, self.a = op, x, a

    def _compute(self) -> Tensor:
        return self.op.project(self.x, self.a)


class Mapped(Deferred):
    """The frozen map of x, not computed yet."""

    def __init__(self, op: Gather, x: Tensor):
        self.op, self.x = op, x

    def _compute(self) -> Tensor:
        return self.op(self.x)


class TrainGather(OpView):
    """The verbs of `Gather` while gradients are wanted: a low-rank update and its map are one step of autograd."""

    inner: Gather

    def __call__(self, x: Any) -> Any:
        return Mapped(self.inner, value(x))

    def project(self, x: Any, a: Tensor) -> Any:
        return Projected(self.inner, value(x), a)

    def expand(self, h: Any, b: Tensor, onto: Any = None) -> Any:
        waits = isinstance(h, Projected) and isinstance(onto, Mapped) and h._known is onto._known is None
        if waits and h.x is onto.x and self.inner._copied(h.a) and self.inner._copied(b):
            a, b = self.inner._picked(_cast(h.a, h.x)), self.inner._picked(_cast(b, h.x))
            return _BlockMap.apply(self.inner.inner, h.x, a, b)
        return self.inner.expand(value(h), b, value(onto))

    def scale(self, y: Any, g: Tensor) -> Any:
        return self.inner.scale(value(y), g)

    def shift(self, y: Any, b: Tensor) -> Any:
        return self.inner.shift(value(y), b)

    def rotate(self, x: Any, q: Tensor) -> Any:
        return self.inner.rotate(value(x), q)

    def permute(self, x: Any, order: Tensor) -> Any:
        return self.inner.permute(value(x), order)

    def take(self, x: Any, indices: Tensor) -> Any:
        return self.inner.take(value(x), indices)

    def place(self, h: Any, indices: Tensor, size: int, onto: Any = None) -> Any:
        return self.inner.place(value(h), indices, size, value(onto))

    def kron(self, x: Any, a: Tensor, b: Tensor) -> Any:
        return self.inner.kron(value(x), a, b)

    def drop(self, x: Any, p: float) -> Any:
        return self.inner.drop(value(x), p)

    def penalise(self, y: Any, loss: Tensor) -> Any:
        return self.inner.penalise(value(y), loss)


class _BlockMap(torch.autograd.Function):
    """W x + bias + b a x, with an a [N, R, I] and a b [N, O, R] for every block of rows."""

    @staticmethod
    def forward(ctx: Any, op: DataOp, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = op(x)
        h = a @ x.reshape(len(a), -1, x.shape[-1]).mT  # [N, R, rows and tokens of a block]
        y.view(len(a), -1, y.shape[-1]).baddbmm_(h.mT, b.mT)
        ctx.op = op
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, a, b, h if ctx.needs_input_grad[3] else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, h = ctx.saved_tensors
        blocks, dx, da = dy.reshape(len(a), -1, dy.shape[-1]), None, None
        db = None if h is None else (h @ blocks).mT
        dh = b.mT @ blocks.mT  # [N, R, ...]
        if x is not None:
            da = dh @ x.reshape(len(a), -1, x.shape[-1])
        if ctx.needs_input_grad[1]:
            dx = times(dy.reshape(-1, dy.shape[-1]), ctx.op.weight().to(dy.dtype))
            dx.view(len(a), -1, dx.shape[-1]).baddbmm_(dh.mT, a)
            dx = dx.view(*dy.shape[:-1], -1)
        return None, dx, da, db
