"""The factored reading: what a body adds to its map, as pairs of thin matrices wherever its verbs say so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.core.affine import WeightOp
from weft.core.op import Op
from weft.core.site import Site


class NotFactored(TypeError):
    """A body adds something to its map that no pair of thin matrices expresses as it stands."""


class Unread:
    """The input of a body: verbs may read it, nothing else may."""

    def __getattr__(self, name: str) -> Any:
        raise NotFactored(f"uses `.{name}` of its input")

    def _refuse(self, *_: Any) -> Any:
        raise NotFactored("computes with its input other than through verbs")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = __getitem__ = _refuse

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotFactored(f"applies `{func.__name__}` to values that depend on its input")


class _Linear(Unread):
    """Values that may be added up and multiplied by numbers."""

    def times(self, factor: float | Tensor) -> Any:
        raise NotImplementedError

    def __mul__(self, factor: Any) -> Any:
        if isinstance(factor, Unread) or (isinstance(factor, Tensor) and factor.numel() > 1):
            raise NotFactored("multiplies values that depend on its input")
        return self.times(factor)

    __rmul__ = __mul__

    def __neg__(self) -> Any:
        return self.times(-1.0)

    def __sub__(self, other: Any) -> Any:
        return self + (-other)

    def __truediv__(self, divisor: float) -> Any:
        return self.times(1 / divisor)


@dataclass(frozen=True)
class Narrow(_Linear):
    """a x, a [R, I, *kernel]."""

    a: Tensor

    def __add__(self, other: Any) -> Narrow:
        if not isinstance(other, Narrow):
            raise NotFactored("adds its input to something else")
        return Narrow(self.a + other.a)

    def times(self, factor: float | Tensor) -> Narrow:
        return Narrow(self.a * factor)


@dataclass(frozen=True)
class Sum(_Linear):
    """own W x + sum_k b_k a_k x + shift: `own` says how often the map itself is in it."""

    own: float
    pairs: tuple[tuple[Tensor, Tensor], ...] = ()
    shift: Tensor | None = None

    def __add__(self, other: Any) -> Sum:
        if not isinstance(other, Sum):
            raise NotFactored("adds a constant to its result other than through `op.shift`")
        shifts = [s for s in (self.shift, other.shift) if s is not None]
        shift = sum(shifts[1:], start=shifts[0]) if shifts else None
        return Sum(self.own + other.own, (*self.pairs, *other.pairs), shift)

    def times(self, factor: float | Tensor) -> Sum:
        pairs = tuple((b * factor, a) for b, a in self.pairs)
        return Sum(self.own * float(factor), pairs, None if self.shift is None else self.shift * factor)


class FactorOp(Op):
    """Verbs that collect the pairs. The weight and the bias are there for coefficients that read them."""

    def __init__(self, site: Site, inner: WeightOp):
        self.site, self.inner = site, inner

    def input(self) -> Unread:
        """What a body is run on."""
        return Unread()

    def __call__(self, x: Any) -> Sum:
        if type(x) is not Unread:
            raise NotFactored("changes the input of the map")
        return Sum(1.0)

    def weight(self) -> Tensor:
        return self.inner.weight()

    def bias(self) -> Tensor | None:
        return self.inner.bias()

    def project(self, x: Any, a: Tensor) -> Narrow:
        if type(x) is not Unread:
            raise NotFactored("changes the input of a projection")
        return Narrow(a)

    def expand(self, h: Any, b: Tensor, onto: Any = None) -> Any:
        if self.site.groups > 1 or not isinstance(h, Narrow):
            raise NotFactored("expands something that is no projection")
        added = Sum(0.0, ((b, h.a),))
        return added if onto is None else onto + added

    def scale(self, y: Any, g: Tensor) -> Any:
        if isinstance(y, Narrow):
            return Narrow(_rows(g, y.a) * y.a)
        if isinstance(y, Sum) and not y.own:
            return Sum(0.0, tuple((g[:, None] * b, a) for b, a in y.pairs), None if y.shift is None else g * y.shift)
        raise NotFactored("scales the map itself")

    def shift(self, y: Any, b: Tensor) -> Any:
        if not isinstance(y, Sum):
            raise NotFactored("shifts something before the result")
        return y + Sum(0.0, (), b)

    def rotate(self, x: Any, q: Tensor) -> Any:
        if isinstance(x, Narrow):
            n, _, block = q.shape
            return Narrow((q @ x.a.reshape(n, block, -1)).reshape(-1, *x.a.shape[1:]))
        raise NotFactored("rotates the map or its input")

    def permute(self, x: Any, order: Tensor) -> Any:
        return self.take(x, order)

    def take(self, x: Any, indices: Tensor) -> Any:
        if isinstance(x, Narrow):
            return Narrow(x.a[indices])
        raise NotFactored("takes channels of the map or its input")

    def place(self, h: Any, indices: Tensor, size: int, onto: Any = None) -> Any:
        raise NotFactored("changes chosen channels only")

    def with_delta(self, x: Any, delta: Tensor) -> Any:
        raise NotFactored("adds a dense matrix")

    def kron(self, x: Any, a: Tensor, b: Tensor) -> Any:
        raise NotFactored("adds a Kronecker product")

    def invoked(self, x: Any, tokens: tuple[int, ...]) -> Tensor:
        raise NotFactored("changes only the tokens behind its invocation")

    def drop(self, x: Any, p: float) -> Any:
        return x


def _rows(g: Tensor, a: Tensor) -> Tensor:
    return g.reshape(-1, *[1] * (a.ndim - 1))


def factors(found: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """b [O, R], a [R, I, *kernel] and the shift of a body's result; NotFactored when it is no map plus such pairs."""
    if not isinstance(found, Sum) or found.own != 1.0:
        raise NotFactored("does not add to the map")
    if not found.pairs:
        raise NotFactored("adds no pair of matrices")
    b, a = zip(*found.pairs, strict=True)
    return torch.cat(b, 1), torch.cat(a), found.shift
