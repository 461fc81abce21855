"""The frozen map with all that a site adds to it, as one step of autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.core.dropout import Dropout
from weft.core.functions import back_project, project, rows_of, shaped, times
from weft.core.narrow import Fold, Narrow, gradient, read, spread_onto, transposed, widened
from weft.core.op import DataOp

__all__ = ["Map", "by_weight", "exact", "invertible", "saved"]

_SMALLEST_GAIN = 1e-20  # y / g gives z back; a gain of zero is taken as this, which no output can show


def exact(x: Tensor) -> bool:
    """Whether an update may be added to the weight itself: a short number format would lose most of it there."""
    return x.dtype in (torch.float32, torch.float64)


def by_weight(op: DataOp, x: Tensor, dropout: Dropout | None, a: Narrow | None, b: Tensor | None) -> tuple[bool, bool]:
    """Whether an update b a or a gain costs less when it is added to W [O, I] than beside W, for N rows of x: forward,
    and for the gradient of x. There, what reads the gradient is wanted anyway where a trains."""
    matrices = all(m is None or isinstance(m, Fold) or m.is_floating_point() for m in (a, b))
    if not matrices or dropout is not None or not exact(x):
        return False, False
    rows, columns = op.site.out_features, x.shape[-1]
    frozen = a is not None and not (isinstance(a, Tensor) and a.requires_grad)
    least = rows * columns / (rows + columns) if frozen else rows
    return columns**2 < x.numel(), least * columns < x.numel()


class Map(torch.autograd.Function):
    """gain * (W x + bias + offset + b a x). Keeps no weight of its own: the backward asks the module for it again, so a
    quantised one stays packed in between (Yin et al. 2023, arXiv 2309.16119).

    a, b: narrow maps as `weft.core.narrow` has them, b transposed; order: of the channels in between; known: a x [N, R]
    where others have computed it, for an a that is frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        op: DataOp,
        x: Tensor,
        offset: Tensor | None,
        dropout: Dropout | None,
        a: Narrow | None,
        order: Tensor | None,
        b: Tensor | None,
        gain: Tensor | None,
        known: Tensor | None,
    ) -> Tensor:
        wanted, rows, h = ctx.needs_input_grad, rows_of(x), None
        gain = None if gain is None else invertible(gain)
        dense, ctx.dense = by_weight(op, x, dropout, a, b)
        frozen = a is not None and not wanted[4]  # then what it reads is kept, and x is not
        if a is not None and (frozen or not dense):
            h = project(rows, dropout, a) if known is None else rows_of(known).mT  # [R, N]
            h = _reordered(h, order)
        if dense:
            y = _by_weight(op, x, offset, a, order, b, gain)
        else:
            y = rows_of(op(x))
            y = y if offset is None else y.add_(offset)
            y = y if h is None or b is None else spread_onto(y, h, transposed(b))
            y = shaped(y if gain is None else y.mul_(gain), x)
        ctx.op, ctx.dropout, ctx.order, ctx.shape = op, dropout, order, x.shape
        ctx.fold = a if isinstance(a, Fold) else None
        kept = x if wanted[4] else None, None if ctx.fold else a, b, h if wanted[6] else None
        ctx.save_for_backward(*kept, gain, y if wanted[7] else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, h, gain, y = saved(ctx)
        a = a if ctx.fold is None else ctx.fold
        rows, dx, da, db, dgain = rows_of(dy), None, None, None, None
        if y is not None:
            dgain = (rows * rows_of(y)).sum(0) / gain
        wanted, x = ctx.needs_input_grad, None if x is None else rows_of(x)
        dense = wanted[1] and ctx.dense
        if gain is not None and not (dense and a is None):
            rows = rows * gain
        if dense:
            dx = rows_of(dy) @ _weight(ctx.op, dy.dtype, a, ctx.order, b, gain)
        elif wanted[1]:
            dx = times(rows, ctx.op.weight().to(rows.dtype))
        if wanted[6]:
            h = _reordered(project(x, ctx.dropout, a), ctx.order) if h is None else h  # type: ignore[arg-type]
            db = gradient(h, rows, transposed(b)).mT
        if x is not None or (a is not None and dx is not None and not dense):
            dh = _reordered(read(rows, transposed(b)), None if ctx.order is None else ctx.order.argsort())
            added, da = back_project(x, ctx.dropout, a, dh, None if dense else dx)
            dx = dx if dense else added
        return None, None if dx is None else dx.view(ctx.shape), None, None, da, None, db, dgain, None


def _reordered(h: Tensor, order: Tensor | None) -> Tensor:
    return h if order is None else h.index_select(0, order)


def _weight(
    op: DataOp, dtype: torch.dtype, a: Narrow | None, order: Tensor | None, b: Tensor | None, gain: Tensor | None
) -> Tensor:
    """gain * (W + b a), [O, I]."""
    weight = op.weight().to(dtype)
    if a is not None and b is not None:
        weight = widened(weight, a, order, b)
    if gain is not None:
        weight = weight * gain.unsqueeze(1) if a is None else weight.mul_(gain.unsqueeze(1))
    return weight


def _by_weight(
    op: DataOp,
    x: Tensor,
    offset: Tensor | None,
    a: Narrow | None,
    order: Tensor | None,
    b: Tensor | None,
    gain: Tensor | None,
) -> Tensor:
    bias = op.bias()
    bias = bias if bias is None else bias.to(x.dtype)
    if offset is not None:
        bias = offset if bias is None else bias + offset
    if bias is not None and gain is not None:
        bias = bias * gain
    return torch.nn.functional.linear(x, _weight(op, x.dtype, a, order, b, gain), bias)


def invertible(gain: Tensor) -> Tensor:
    """The gain, with nothing that cannot be divided by: a step that keeps its output finds what was scaled again."""
    return torch.where(gain.abs() < _SMALLEST_GAIN, _SMALLEST_GAIN, gain)


def saved(ctx: Any) -> Any:
    """What a step kept, its own output among it; an error that says so where that has been changed."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise RuntimeError(
            f"what comes after {ctx.op.site.address} changes its output in place, which the gradient of a gain there "
            "reads: use inplace=False in that activation"
        ) from error
