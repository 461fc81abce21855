"""Further steps of autograd at a linear site, and values that wait for them: the map of a rotated input, with its
channels mixed, and with more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.core.deferred import Deferred
from weft.core.functions import rows_of, shaped, times
from weft.core.mapped import exact, invertible, saved
from weft.core.op import DataOp

__all__ = ["Crossed", "Gained", "MapOnto", "MapPlus", "MappedRotated", "Permuted", "Rotated"]


class MapOnto(torch.autograd.Function):
    """W x + bias + b h, written into what the map itself gave."""

    @staticmethod
    def forward(ctx: Any, op: DataOp, x: Tensor, h: Tensor, b: Tensor) -> Tensor:
        ctx.op, ctx.shape = op, x.shape
        ctx.save_for_backward(h if ctx.needs_input_grad[3] else None, b)
        return shaped(rows_of(op(x)).addmm_(rows_of(h), b.mT), x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (h, b), rows, dx, dh = ctx.saved_tensors, rows_of(dy), None, None
        if ctx.needs_input_grad[1]:
            dx = times(rows, ctx.op.weight().to(rows.dtype)).view(ctx.shape)
        if ctx.needs_input_grad[2]:
            dh = (b.mT @ rows.mT).mT.unflatten(0, dy.shape[:-1])
        return None, dx, dh, None if h is None else (rows_of(h).mT @ rows).mT


class MapPlus(torch.autograd.Function):
    """W x + bias + g z, likewise."""

    @staticmethod
    def forward(ctx: Any, op: DataOp, x: Tensor, z: Tensor, g: Tensor) -> Tensor:
        ctx.op, ctx.shape = op, x.shape
        ctx.save_for_backward(z if ctx.needs_input_grad[3] else None, g)
        return shaped(rows_of(op(x)).addcmul_(rows_of(z), g), x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (z, g), rows, dx = ctx.saved_tensors, rows_of(dy), None
        if ctx.needs_input_grad[1]:
            dx = times(rows, ctx.op.weight().to(rows.dtype)).view(ctx.shape)
        dz = dy * g if ctx.needs_input_grad[2] else None
        return None, dx, dz, None if z is None else (rows * rows_of(z)).sum(0)


class Permuted(torch.autograd.Function):
    """Channels in another order. The gradient is gathered as well: adding it up takes five times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.index_select(-1, order)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return dy.index_select(-1, order.argsort()), None


class Crossed(torch.autograd.Function):
    """g z + (f z)[order] for z = W x + bias; keeps z."""

    @staticmethod
    def forward(ctx: Any, op: DataOp, x: Tensor, g: Tensor, f: Tensor, order: Tensor) -> Tensor:
        z = rows_of(op(x))
        ctx.op, ctx.shape = op, x.shape
        ctx.save_for_backward(z, g, f, order)
        return shaped((z * g).addcmul_(z.index_select(1, order), f.index_select(0, order)), x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, g, f, order = ctx.saved_tensors
        rows, dx, dg, df = rows_of(dy), None, None, None
        back = rows.index_select(1, order.argsort())
        if ctx.needs_input_grad[1]:
            dz = (rows * g).addcmul_(back, f)
            dx = times(dz, ctx.op.weight().to(dz.dtype)).view(ctx.shape)
        if ctx.needs_input_grad[2]:
            dg = (rows * z).sum(0)
        if ctx.needs_input_grad[3]:
            df = back.mul_(z).sum(0)
        return None, dx, dg, df, None


class RotatedMap(torch.autograd.Function):
    """gain * (W blockdiag(q) x + bias), q [N, block, block]; keeps x, q, and its output for a gain that trains. W is
    rotated where it has fewer rows than x.
    """

    @staticmethod
    def forward(ctx: Any, op: DataOp, x: Tensor, q: Tensor, gain: Tensor | None) -> Tensor:
        ctx.op, rows = op, rows_of(x)
        if not exact(x) or op.site.out_features >= len(rows):
            y = op(_by_blocks(rows, q.mT).view(x.shape))
        else:
            bias = op.bias()
            weight = _by_blocks(op.weight().to(x.dtype), q)
            y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        if gain is not None:
            gain = invertible(gain)
            y = y.mul_(gain)
        ctx.save_for_backward(x, q, gain, y if ctx.needs_input_grad[3] else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, q, gain, y), dq, dgain = saved(ctx), None, None
        rows = rows_of(dy)
        if y is not None:
            dgain = (rows * rows_of(y)).sum(0) / gain
        dz = times(rows if gain is None else rows * gain, ctx.op.weight().to(dy.dtype))
        if ctx.needs_input_grad[2]:
            dq = _parts(dz, q).mT @ _parts(rows_of(x), q)
        return None, _by_blocks(dz, q).view(x.shape) if ctx.needs_input_grad[1] else None, dq, dgain


class Rotated(Deferred):
    """blockdiag(q) x."""

    def __init__(self, op: DataOp, x: Tensor, q: Tensor):
        self.op, self.x, self.q = op, x, q

    @property
    def keeps_size(self) -> bool:
        """Whether the blocks are square, so that the map can be rotated instead."""
        return self.q.shape[1] == self.q.shape[2]

    def _compute(self) -> Tensor:
        return self.op.rotate(self.x, self.q)


class MappedRotated(Deferred):
    """gain * (W blockdiag(q) x + bias), the gain optional."""

    def __init__(self, op: DataOp, x: Tensor, q: Tensor, gain: Tensor | None = None):
        self.op, self.x, self.q, self.gain = op, x, q, gain

    def _compute(self) -> Tensor:
        return RotatedMap.apply(self.op, self.x, self.q, self.gain)


class Gained(Deferred):
    """A gain on every channel of a tensor."""

    def __init__(self, op: DataOp, z: Tensor, gain: Tensor):
        self.op, self.z, self.gain = op, z, gain

    def _compute(self) -> Tensor:
        return self.op.scale(self.z, self.gain)


def _parts(rows: Tensor, q: Tensor) -> Tensor:
    return rows.unflatten(1, (len(q), -1)).movedim(1, 0)  # [N, rows, block]


def _by_blocks(rows: Tensor, q: Tensor) -> Tensor:
    """rows blockdiag(q)."""
    return (_parts(rows, q) @ q).movedim(0, 1).flatten(1)
