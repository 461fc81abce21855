"""The training reading: verbs wait until it is known what they belong to, so that a site is one step of autograd.

Written verb by verb, a site keeps for its backward what each verb would want, and adds the same tensors twice. Here the
low-rank update, its dropout and the gain after it are computed together with the frozen map: kept are its input, the
small projection and, for a gain, the output, which what comes next mostly keeps anyway.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from weft.core.deferred import Deferred, value
from weft.core.dropout import Dropout
from weft.core.functions import Expand, Kron, Project, WithDelta, WithEntries
from weft.core.mapped import Map, by_weight, exact
from weft.core.narrow import fold_of
from weft.core.op import DataOp, merge_blocks
from weft.core.steps import Crossed, Gained, MapOnto, MappedRotated, MapPlus, Permuted, Rotated
from weft.core.view import OpView

__all__ = ["Deferred", "TrainOp", "fuses", "value"]

Coefficients = Mapping[str, Tensor]

_WORTH_SHARING = 32  # rows; narrower projections are cheaper as a part of their own site


def fuses(op: Any) -> bool:
    """Whether this op, here and now, can be read by `TrainOp`."""
    return (
        type(op) is DataOp
        and torch.is_grad_enabled()
        and op.source.linear()
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None  # a transform has rules of its own for every function
    )


class Dropped(Deferred):
    """An input with dropout."""

    def __init__(self, x: Tensor, p: float):
        self.x, self.dropout = x, Dropout(p)

    def _compute(self) -> Tensor:
        return torch.nn.functional.dropout(self.x, self.dropout.p, training=True)


class Projected(Deferred):
    """a x, where x may be dropped out."""

    order: Tensor | None = None

    def __init__(self, x: Tensor, dropout: Dropout | None, a: Tensor):
        self.x, self.dropout, self.matrix = x, dropout, a
        self.a = fold_of(a) if a.is_floating_point() else a

    @property
    def sharable(self) -> bool:
        """Whether neighbours may read the same: VeRA's a, frozen and used by all sites, at q, k and v."""
        frozen = self.a is self.matrix and not self.matrix.requires_grad
        return frozen and self.dropout is None and len(self.matrix) >= _WORTH_SHARING

    def denser(self, b: Tensor) -> bool:
        """Whether b a, as one matrix with a gradient of its own, takes fewer multiplications than a and b apart."""
        if self.dropout is not None or not exact(self.x) or self.a is not self.matrix:
            return False
        (rank, columns), (rows, _), size = self.matrix.shape, b.shape, self.x.numel() // self.matrix.shape[1]
        each, both = size * (rows + columns), self.matrix.requires_grad
        apart = min(rows * columns, size * rows) + min(rows * columns, size * columns if both else each)
        whole = size * rows * columns + (3 + both) * rank * rows * columns
        return whole < rank * (apart + (1 + both) * each)

    def _compute(self) -> Tensor:
        return (
            _shared_projection(self.x, self.matrix)
            if self.sharable
            else Project.apply(self.x, self.dropout, self.matrix)
        )


class Taken(Projected):
    """Some channels of x, by their numbers."""

    sharable = False

    def __init__(self, x: Tensor, indices: Tensor):
        super().__init__(x, None, indices)

    def denser(self, b: Tensor) -> bool:
        return False

    def _compute(self) -> Tensor:
        return self.x.index_select(-1, self.matrix)


class Blocks(Projected):
    """blockdiag(q) x for a q that leaves fewer channels, perhaps in another order."""

    sharable = False

    def __init__(self, op: DataOp, x: Tensor, dropout: Dropout | None, q: Tensor, order: Tensor | None = None):
        self.op, self.x, self.dropout, self.order = op, x, dropout, order
        self.matrix = self.a = q

    def _compute(self) -> Tensor:
        x = self.x if self.dropout is None else self.dropout.scale * self.dropout.of(self.x)
        h = self.op.rotate(x, self.matrix)
        return h if self.order is None else Permuted.apply(h, self.order)


class Widened(Deferred):
    """blockdiag(q) h for a q that makes more channels."""

    def __init__(self, h: Blocks, q: Tensor):
        self.h, self.q = h, q

    def _compute(self) -> Tensor:
        return self.h.op.rotate(self.h.tensor(), self.q)


class Mapped(Deferred):
    """gain * (W x + bias + offset + b a x), all but the map optional. uses: how many verbs read it.

    b: a matrix, or the numbers of the channels to which those of a x are added.
    """

    def __init__(self, op: DataOp, x: Tensor, offset: Tensor | None = None):
        self.op, self.x, self.offset, self.uses = op, x, offset, 0
        self.projected: Projected | None = None
        self.b: Tensor | None = None
        self.gain: Tensor | None = None
        self.before: Mapped | None = None  # the same without the last verb

    def and_then(
        self,
        *,
        offset: Tensor | None = None,
        update: tuple[Projected, Tensor] | None = None,
        gain: Tensor | None = None,
    ) -> Mapped:
        """This, and one verb more. update: a projection and the b that expands it."""
        self.uses += 1
        new = Mapped(self.op, self.x, self.offset if offset is None else offset)
        new.projected, new.b = (self.projected, self.b) if update is None else update
        new.gain, new.before = self.gain if gain is None else gain, self
        return new

    @property
    def plain(self) -> bool:
        """Whether it is the frozen map and nothing else."""
        return self.before is None

    @property
    def free(self) -> bool:
        """Whether nothing has read it, so that more may be computed with it."""
        return self._known is None and self.uses == 0

    def _compute(self) -> Tensor:
        before = self.before
        if before is None:
            return self.op(self.x)
        if before.shared():
            return self._last(before.tensor())
        p = self.projected
        a, dropout = (None, None) if p is None else (p.a, p.dropout)
        known = _shared_read(self.x, p.matrix) if p is not None and p.sharable else None
        order = None if p is None else p.order
        return Map.apply(self.op, self.x, self.offset, dropout, a, order, self.b, self.gain, known)

    @property
    def gained(self) -> bool:
        """Whether it is the frozen map times a gain, not computed yet."""
        before = self.before
        return before is not None and before.plain and self.gain is not None and self._known is before._known is None

    def __add__(self, other: Any) -> Any:
        if isinstance(other, Reordered) and self.gained and other.y.gained and self.before is other.y.before:
            assert self.before is not None
            if self.uses == other.y.uses == 0 and self.before.uses == 2:
                return Crossed.apply(self.op, self.x, self.gain, other.y.gain, other.order)
        if isinstance(other, Gained) and other._known is None and self.free and self.plain:
            if other.z.dtype == self.x.dtype:
                return MapPlus.apply(self.op, self.x, other.z, other.gain.to(other.z.dtype))
        if isinstance(other, Widened) and other._known is None and _waits(other.h, self):
            return self.and_then(update=(other.h, other.q))
        return self.tensor() + value(other)

    def shared(self) -> bool:
        """Whether its value, or one that it is made of, is wanted by somebody else as well."""
        here = self._known is not None or self.uses > 1
        return here or (self.before is not None and self.before.shared())

    def _last(self, y: Tensor) -> Tensor:
        """The last verb on its own."""
        before = self.before
        assert before is not None
        if self.gain is not before.gain:
            return self.op.scale(y, self.gain)  # type: ignore[arg-type]
        if self.b is not before.b:
            assert self.projected is not None
            assert self.b is not None
            h = self.projected.tensor()
            if self.b.ndim == 3:
                return y + self.op.rotate(h, self.b)
            if not self.b.is_floating_point():
                return self.op.place(h, self.b, y.shape[-1], onto=y)
            return self.op.expand(h, self.b, onto=y)
        return self.op.shift(y, self.offset)  # type: ignore[arg-type]


class Reordered(Deferred):
    """The channels of a map times a gain in another order."""

    def __init__(self, y: Mapped, order: Tensor):
        self.y, self.order = y, order

    def _compute(self) -> Tensor:
        return Permuted.apply(self.y.tensor(), self.order)


class TrainOp(OpView):
    """The verbs of a linear map on data while gradients are wanted.

    coefficients: what the method was given; remake: makes the same again, so that large ones need not be kept.
    """

    inner: DataOp

    def __init__(self, inner: DataOp, coefficients: Coefficients, remake: Callable[[], Coefficients]):
        super().__init__(inner)
        self.coefficients, self.remake = coefficients, remake

    def __call__(self, x: Any) -> Any:
        if isinstance(x, Rotated) and x._known is None and x.keeps_size:
            return MappedRotated(self.inner, x.x, x.q)
        return Mapped(self.inner, _in_precision(value(x)))

    def project(self, x: Any, a: Tensor) -> Any:
        x, dropout = _undropped(x)
        x = _in_precision(x)
        return Projected(x, dropout, a.to(x.dtype))

    def expand(self, h: Any, b: Tensor, onto: Any = None) -> Any:
        if _waits(h, onto):
            b = b.to(h.x.dtype)
            if h.denser(b):
                return WithDelta.apply(self.inner, h.x, b @ h.matrix, lambda: b @ h.matrix)
            if not h.sharable or by_weight(self.inner, h.x, h.dropout, h.a, b)[1]:
                return onto.and_then(update=(h, b))
        if isinstance(onto, Mapped) and onto.free and onto.plain and value(h).dtype == onto.x.dtype:
            return MapOnto.apply(self.inner, onto.x, value(h), b.to(onto.x.dtype))
        h, onto = value(h), value(onto)
        if onto is None or onto.dtype != h.dtype:
            return self.inner.expand(h, b, onto)
        return Expand.apply(h, b.to(h.dtype), onto)

    def scale(self, y: Any, g: Tensor) -> Any:
        waits = isinstance(y, Mapped) and y._known is None and (y.free or y.plain)
        if waits and y.gain is None and y.x.dtype != torch.float16:
            return y.and_then(gain=g.to(y.x.dtype))
        if isinstance(y, MappedRotated) and y._known is y.gain is None and y.x.dtype != torch.float16:
            return MappedRotated(y.op, y.x, y.q, g.to(y.x.dtype))
        return Gained(self.inner, value(y), g)

    def shift(self, y: Any, b: Tensor) -> Any:
        if isinstance(y, Mapped) and y.free and y.plain and y.offset is None and not b.requires_grad:
            return y.and_then(offset=b)
        return self.inner.shift(value(y), b)

    def with_delta(self, x: Any, delta: Tensor) -> Any:
        x = _in_precision(value(x))
        name = next((k for k, c in self.coefficients.items() if c is delta), None)
        if name is None:
            return WithDelta.apply(self.inner, x, delta, lambda: delta)
        return WithDelta.apply(self.inner, x, delta, lambda: self.remake()[name])

    def with_entries(self, x: Any, values: Tensor, places: Tensor) -> Any:
        return WithEntries.apply(self.inner, _in_precision(value(x)), values, places)

    def kron(self, x: Any, a: Tensor, b: Tensor) -> Any:
        x = _in_precision(value(x))
        return Kron.apply(x, a.to(x.dtype), b.to(x.dtype))

    def rotate(self, x: Any, q: Tensor) -> Any:
        if isinstance(x, Blocks) and x._known is None and q.shape[1] > q.shape[2]:
            return Widened(x, q.to(x.x.dtype))
        narrows = q.shape[1] < q.shape[2]
        x, dropout = _undropped(x) if narrows else (value(x), None)
        x = _in_precision(x)
        q = q.to(x.dtype)
        return Blocks(self.inner, x, dropout, q) if narrows else Rotated(self.inner, x, merge_blocks(q))

    def permute(self, x: Any, order: Tensor) -> Any:
        if isinstance(x, Blocks) and x._known is x.order is None:
            return Blocks(x.op, x.x, x.dropout, x.matrix, order)
        return Reordered(x, order) if isinstance(x, Mapped) and x.gained else Permuted.apply(value(x), order)

    def take(self, x: Any, indices: Tensor) -> Any:
        return Taken(_in_precision(value(x)), indices)

    def place(self, h: Any, indices: Tensor, size: int, onto: Any = None) -> Any:
        if _waits(h, onto) and not h.sharable:
            return onto.and_then(update=(h, indices))
        return self.inner.place(value(h), indices, size, value(onto))

    def penalise(self, y: Any, loss: Tensor) -> Any:
        return self.inner.penalise(value(y), loss)

    def drop(self, x: Any, p: float) -> Any:
        x = value(x)
        return Dropped(x, p) if p and self.inner.source.training() else x


def _undropped(x: Any) -> tuple[Tensor, Dropout | None]:
    return (x.x, x.dropout) if isinstance(x, Dropped) and x._known is None else (value(x), None)


def _waits(h: Any, onto: Any) -> bool:
    """Whether `onto` is the frozen map of the very input that h is a projection of, and neither is computed yet."""
    waits = isinstance(h, Projected) and h._known is None and isinstance(onto, Mapped) and onto.free
    return waits and onto.plain and h.x is onto.x


def _in_precision(x: Tensor) -> Tensor:
    """x in the number format of an autocast around it, made once for all that read x."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):
        return x
    wanted = torch.get_autocast_dtype(device)
    if x.dtype in (wanted, torch.float64):
        return x
    return _shared(_last_cast, x, wanted, lambda: x.to(wanted))


def _shared_projection(x: Tensor, a: Tensor) -> Tensor:
    """a x, computed once for neighbours that read the same x with the same frozen a (VeRA's at q, k and v)."""
    return _shared(_last_projection, x, _identity(a), lambda: Project.apply(x, None, a))


def _shared_read(x: Tensor, a: Tensor) -> Tensor:
    """The same for neighbours that see to the gradient of x themselves."""
    with torch.no_grad():
        return _shared(_last_read, x, _identity(a), lambda: torch.nn.functional.linear(x, a))


def _identity(a: Tensor) -> Any:
    return a.data_ptr(), a.shape, a.stride(), a._version


def _shared(last: list[Any], x: Tensor, key: Any, make: Callable[[], Tensor]) -> Tensor:
    """What `make` gave for the same x and key, as long as x lives; not for a leaf, which can change unseen."""
    if x.grad_fn is None:
        return make()
    if not last or last[0]() is not x or last[1] != (x._version, key):
        made = make()
        # gone with x, not with what was made of it: a recomputed layer then shares just what the first pass did
        source = weakref.ref(x, lambda gone: last.clear() if last and last[0] is gone else None)
        last[:] = source, (x._version, key), made
    found: Tensor = last[2]
    return found


_last_projection: list[Any] = []
_last_read: list[Any] = []
_last_cast: list[Any] = []
