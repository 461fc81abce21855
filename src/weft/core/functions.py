"""What a training step does at a linear site, forward and backward: nothing is kept that can cheaply be made again."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from weft.core.dropout import Dropout
from weft.core.entries import gradient_at
from weft.core.narrow import Narrow, gradient, read, spread_onto
from weft.core.op import DataOp


def rows_of(x: Tensor) -> Tensor:
    """x as a matrix, its channels last."""
    return x.reshape(-1, x.shape[-1])  # [N, C]


def shaped(rows: Tensor, x: Tensor) -> Tensor:
    """rows [N, C] in the shape of x, and no view of them: what comes next may change it in place."""
    return torch.ops.aten._unsafe_view(rows, (*x.shape[:-1], rows.shape[-1]))


def times(rows: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """rows [N, O] weight [O, I], as a gradient goes back through a map.

    Where a processor has no instructions for bfloat16, torch's product takes ten to twenty times as long when neither
    side is transposed in memory.
    """
    if rows.dtype == torch.bfloat16 and rows.device.type == "cpu" and not _multiplies_bfloat16():
        rows = rows.mT.contiguous().mT
    return torch.mm(rows, weight, out=out)


@cache
def _multiplies_bfloat16() -> bool:
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


def project(x: Tensor, dropout: Dropout | None, a: Narrow) -> Tensor:
    """a x as [R, N], for x [N, I]."""
    return read(x, a) if dropout is None else read(dropout.of(x), a).mul_(dropout.scale)


def back_project(
    x: Tensor | None, dropout: Dropout | None, a: Narrow, dh: Tensor, dx: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `project` from dh [R, N]: x's, added to `dx` where there is one, and a's. x None: a is frozen."""
    whole = dx if x is None else x
    if whole is None:
        return None, None
    hits = None
    if dropout is not None:
        dh, hits = dh * dropout.scale, dropout.hits(whole)
    da = None
    if x is not None:
        da = gradient(dh, x if dropout is None else dropout.of(x, hits), a)  # type: ignore[arg-type]
    if dx is None or hits is None:
        return None if dx is None else spread_onto(dx, dh, a), da
    before = dx.view(-1).index_select(0, hits)  # what was dropped takes no part
    spread_onto(dx, dh, a).view(-1).index_copy_(0, hits, before)
    return dx, da


class Project(torch.autograd.Function):
    """a x; keeps x, and only where a trains."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: Dropout | None, a: Tensor) -> Tensor:
        ctx.dropout, ctx.shape, ctx.frozen = dropout, x.shape, None
        if ctx.needs_input_grad[2]:
            ctx.save_for_backward(x, a)
        else:  # not among what a backward frees: graphs with a backward of their own may share this node
            ctx.frozen = a
        return shaped(project(rows_of(x), dropout, a).mT.contiguous(), x)  # [..., R]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a = ctx.saved_tensors if ctx.frozen is None else (None, ctx.frozen)
        dh = rows_of(dy).mT
        if ctx.needs_input_grad[0] and ctx.dropout is None and a.is_floating_point():
            da = None if x is None else dh @ rows_of(x)
            return (dh.mT @ a).view(ctx.shape), None, da
        dx = dh.new_zeros(dh.shape[1], a.shape[1]) if ctx.needs_input_grad[0] else None
        dx, da = back_project(None if x is None else rows_of(x), ctx.dropout, a, dh, dx)
        return None if dx is None else dx.view(ctx.shape), None, da


class Expand(torch.autograd.Function):
    """onto + b h."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, b: Tensor, onto: Tensor) -> Tensor:
        ctx.save_for_backward(h if ctx.needs_input_grad[1] else None, b)
        return shaped(torch.addmm(rows_of(onto), rows_of(h), b.mT), h)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, b = ctx.saved_tensors
        rows = rows_of(dy)
        dh = (b.mT @ rows.mT).mT.unflatten(0, dy.shape[:-1]) if ctx.needs_input_grad[0] else None
        db = None if h is None else (rows_of(h).mT @ rows).mT
        return dh, db, dy


class WithDelta(torch.autograd.Function):
    """(W + delta) x + bias; keeps x alone, and makes delta again."""

    @staticmethod
    def forward(ctx: Any, op: DataOp, x: Tensor, delta: Tensor, again: Callable[[], Tensor]) -> Tensor:
        ctx.op, ctx.again = op, again
        ctx.save_for_backward(x)
        bias = op.bias()
        weight = op.weight().to(x.dtype) + delta.to(x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        rows, dx, ddelta = rows_of(dy), None, None
        if ctx.needs_input_grad[1]:
            with torch.no_grad():
                weight = ctx.op.weight().to(rows.dtype) + ctx.again().to(rows.dtype)
            dx = times(rows, weight).view(x.shape)
        if ctx.needs_input_grad[2]:
            ddelta = rows.mT @ rows_of(x)
        return None, dx, ddelta, None


class WithEntries(torch.autograd.Function):
    """(W + S) x + bias for an S of few entries; keeps x and the entries."""

    @staticmethod
    def forward(ctx: Any, op: DataOp, x: Tensor, values: Tensor, places: Tensor) -> Tensor:
        ctx.op = op
        ctx.save_for_backward(x, values, places)
        bias = op.bias()
        weight = _with_entries(op, x.dtype, values, places)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, places = ctx.saved_tensors
        rows, dx, dvalues = rows_of(dy), None, None
        if ctx.needs_input_grad[1]:
            dx = times(rows, _with_entries(ctx.op, rows.dtype, values, places)).view(x.shape)
        if ctx.needs_input_grad[2]:
            dvalues = gradient_at(rows, rows_of(x), places.long()).to(values.dtype)
        return None, dx, dvalues, None


def _with_entries(op: DataOp, dtype: torch.dtype, values: Tensor, places: Tensor) -> Tensor:
    weight = op.weight().to(dtype).clone(memory_format=torch.contiguous_format)
    weight.view(-1).index_add_(0, places.long(), values.to(dtype))
    return weight


class Kron(torch.autograd.Function):
    """(a (x) b) x; what lies between the two factors is made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, b)
        return shaped((a @ _between(x, a, b)).flatten(1), x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        rows = dy.reshape(-1, a.shape[0], b.shape[0])  # [N, O / P, P]
        dh = a.mT @ rows  # [N, I / Q, P]
        da = db = None
        if ctx.needs_input_grad[1]:
            da = torch.tensordot(rows, _between(x, a, b), dims=([0, 2], [0, 2]))
        if ctx.needs_input_grad[2]:
            db = dh.view(-1, dh.shape[-1]).mT @ x.reshape(-1, b.shape[1])
        return (dh @ b).view(x.shape) if ctx.needs_input_grad[0] else None, da, db


def _between(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (x.reshape(-1, b.shape[1]) @ b.mT).view(-1, a.shape[1], b.shape[0])  # [N, I / Q, P]
