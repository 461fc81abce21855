"""The merge reading: values are affine maps, the input is the identity, so a body's result is the new weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from weft.core.op import Op
from weft.core.site import Site

Step = Callable[[Tensor], Tensor]


class NotLinear(TypeError):
    """A body does something to its input that no weight can express."""


@dataclass(frozen=True)
class Affine:
    """x -> weight x + bias, with weight [O, I, *kernel], or [C] for a diagonal map.

    `weight` None is the identity of `size` channels; `steps` are the right-multiplications it has met, applied to the
    columns of the next weight: so that W blockdiag(q) never builds an I x I matrix. `like` says in which dtype and on
    which device the identity would be built where a body adds it to something.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    size: int = 0
    steps: tuple[Step, ...] = ()
    like: Tensor | None = None

    def dense(self, like: Tensor) -> Tensor:
        """The weight as a tensor, in `like`'s dtype and device."""
        if self.weight is not None:
            return self.weight
        return self.columns(torch.eye(self.size, dtype=like.dtype, device=like.device))

    def columns(self, m: Tensor) -> Tensor:
        """m composed with this (identity-like) map: the steps act on dimension 1 of m, last met first."""
        for step in reversed(self.steps):
            m = step(m)
        return m

    def _combine(self, other: Affine, sign: float) -> Affine:
        if not isinstance(other, Affine):
            raise NotLinear("adds a constant to its input other than through `op.shift`")
        known = self.weight if self.weight is not None else other.weight
        if known is None:
            known = self.like
        assert known is not None, "an identity knows what it is like"
        bias = self.bias
        if other.bias is not None:
            bias = sign * other.bias if bias is None else bias + sign * other.bias
        return Affine(self.dense(known) + sign * other.dense(known), bias)

    def __add__(self, other: Affine) -> Affine:
        return self._combine(other, 1.0)

    def __sub__(self, other: Affine) -> Affine:
        return self._combine(other, -1.0)

    def __mul__(self, factor: Any) -> Affine:
        if isinstance(factor, Affine) or (isinstance(factor, Tensor) and factor.ndim):
            raise NotLinear("multiplies values that depend on its input")
        known = self.weight if self.weight is not None else self.like
        assert known is not None, "an identity knows what it is like"
        weight = factor * self.dense(known)
        return Affine(weight, None if self.bias is None else factor * self.bias)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> Affine:
        return self * (1 / divisor)

    def __neg__(self) -> Affine:
        return self * -1.0

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.__name__.strip("_")
        if len(args) == 2 and not kwargs:
            left, right = args
            if name in ("mul", "rmul"):
                return left * right if isinstance(left, Affine) else right * left
        raise NotLinear(f"applies `{name}` to values that depend on its input")

    def __getattr__(self, name: str) -> Any:
        raise NotLinear(f"uses `.{name}` of values that depend on its input")


def identity(size: int, like: Tensor) -> Affine:
    """The identity on `size` channels, in `like`'s dtype and device where it has to be built."""
    return Affine(None, size=size, like=like)


class WeightOp(Op):
    """The map of a site as a weight: verbs compose affine maps. W [O, I / groups, *kernel], or [C] for a norm."""

    def __init__(self, site: Site, weight: Tensor, bias: Tensor | None = None):
        self.site, self._weight, self._bias = site, weight, bias

    def input(self) -> Affine:
        """The identity this map acts on."""
        if self._weight.ndim == 1:
            return Affine(torch.ones_like(self._weight))
        return identity(self.site.in_features, self._weight)

    def __call__(self, x: Affine) -> Affine:
        y = self._compose(self._weight, x)
        return y if self._bias is None else self.shift(y, self._bias)

    def weight(self) -> Tensor:
        return self._weight

    def bias(self) -> Tensor | None:
        return self._bias

    def project(self, x: Affine, a: Tensor) -> Affine:
        return self._compose(a, x)

    def expand(self, h: Affine, b: Tensor, onto: Affine | None = None) -> Affine:
        y = self._compose(b, h, groups=self.site.groups)
        return y if onto is None else onto + y

    def scale(self, y: Affine, g: Tensor) -> Affine:
        if y.weight is None:
            return replace(y, steps=(*y.steps, lambda m: m * _at_dim_1(g, m)))
        return Affine(g.reshape(-1, *[1] * (y.weight.ndim - 1)) * y.weight, None if y.bias is None else g * y.bias)

    def shift(self, y: Affine, b: Tensor) -> Affine:
        y = y if y.weight is not None else Affine(y.dense(b), y.bias)
        return Affine(y.weight, b if y.bias is None else y.bias + b)

    def rotate(self, x: Affine, q: Tensor) -> Affine:
        if x.weight is None:
            return replace(x, size=q[:, :, 0].numel(), steps=(*x.steps, lambda m: _columns_by_blocks(m, q)))
        n, _, block = q.shape
        self._within_groups(x.weight.shape[0] // self.site.groups % block == 0)
        weight = _matmul(q, x.weight.reshape(n, block, -1)).reshape(-1, *x.weight.shape[1:])
        return Affine(weight, None if x.bias is None else _matmul(q, x.bias.view(n, block, 1)).flatten())

    def permute(self, x: Affine, order: Tensor) -> Affine:
        if x.weight is None:
            back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
            return replace(x, steps=(*x.steps, lambda m: m[:, back]))
        if self.site.groups > 1:
            group = torch.arange(len(order), device=order.device) // (len(order) // self.site.groups)
            self._within_groups(bool((group[order] == group).all()))
        return Affine(x.weight[order], None if x.bias is None else x.bias[order])

    def take(self, x: Affine, indices: Tensor) -> Affine:
        if x.weight is None:
            step = lambda m, size=x.size: _summed(m, 1, indices, size)  # noqa: E731
            return replace(x, size=len(indices), steps=(*x.steps, step))
        groups = self.site.groups
        self._keeps_groups(indices, len(indices) // groups, len(x.weight) // groups)
        return Affine(x.weight[indices], None if x.bias is None else x.bias[indices])

    def place(self, h: Affine, indices: Tensor, size: int, onto: Affine | None = None) -> Affine:
        if h.weight is None:
            y = replace(h, size=size, steps=(*h.steps, lambda m: m.index_select(1, indices)))
        else:
            self._keeps_groups(indices, len(indices) // self.site.groups, size // self.site.groups)
            y = Affine(
                _summed(h.weight, 0, indices, size), None if h.bias is None else _summed(h.bias, 0, indices, size)
            )
        return y if onto is None else onto + y

    def drop(self, x: Affine, p: float) -> Affine:
        return x

    def hidden(self) -> list[Tensor]:
        raise NotLinear("reads what layers make of every text")

    def given(self, x: Affine, name: str, count: int) -> Tensor:
        raise NotLinear(f"reads the {name} of every row, and a weight is the same for all rows")

    def invoked(self, x: Affine, tokens: tuple[int, ...]) -> Tensor:
        raise NotLinear("changes only the tokens behind its invocation, and a weight is the same for all tokens")

    def _within_groups(self, stays: bool) -> None:
        """Every row of a grouped convolution's weight has the inputs of its own group only."""
        if self.site.groups > 1 and not stays:
            raise NotLinear("mixes output channels across the groups of a grouped convolution")

    def _keeps_groups(self, indices: Tensor, of: int, among: int) -> None:
        """Channel j stands in group j // of, and channel indices[j] in group indices[j] // among."""
        if self.site.groups > 1:
            here = torch.arange(len(indices), device=indices.device) // max(of, 1)
            self._within_groups(bool((indices // among == here).all()))

    def _compose(self, m: Tensor, x: Affine, groups: int = 1) -> Affine:
        """m after x. The channels of x meet dimension 1 of m; at most one of the two may carry a kernel."""
        if m.ndim == 1:  # diagonal
            return Affine(m * x.dense(m), None if x.bias is None else m * x.bias)
        if x.weight is None:
            if x.steps and self.site.groups > 1:
                raise NotLinear("mixes input channels across the groups of a grouped convolution")
            return Affine(x.columns(m))
        if m.ndim > 2 and self.site.groups > 1 and x.weight.ndim == 2:
            raise NotLinear("mixes input channels across the groups of a grouped convolution")
        if m.ndim > 2 and (x.weight.ndim > 2 or x.bias is not None):
            raise NotLinear("convolves twice, or convolves a shifted input")
        bias = None if x.bias is None else _matmul(m, x.bias)
        if groups > 1:
            inner = x.weight.reshape(groups, x.weight.shape[0] // groups, -1)
            weight = _matmul(m.reshape(groups, -1, m.shape[1]), inner).reshape(m.shape[0], *x.weight.shape[1:])
            return Affine(weight, bias)
        if m.ndim == 2:
            return Affine(_matmul(m, x.weight.flatten(1)).unflatten(1, x.weight.shape[1:]), bias)
        return Affine(_matmul(m.movedim(1, -1), x.weight).movedim(-1, 1), bias)


class StartOp(WeightOp):
    """What a method's `init` is given: the frozen map, read only when asked, and statistics of calibration data."""

    tokenize: Callable[[str], list[int]] | None = None
    write: Callable[[Tensor], None] | None = None

    def __init__(
        self,
        site: Site,
        weight: Callable[[], Tensor],
        bias: Callable[[], Tensor | None] = lambda: None,
        statistics: Mapping[str, Tensor] | None = None,
    ):
        self.site, self._read, self._read_bias, self.statistics = site, weight, bias, statistics or {}

    @property
    def _weight(self) -> Tensor:  # type: ignore[override]
        return self._read().detach().to(self.site.dtype)

    @property
    def _bias(self) -> Tensor | None:  # type: ignore[override]
        bias = self._read_bias()
        return None if bias is None else bias.detach().to(self.site.dtype)

    def token_ids(self, text: str) -> list[int]:
        """The ids of a text in the base's own vocabulary; only an input has one."""
        if torch.device(self.site.device).type == "meta":
            return [0]
        if self.tokenize is None:
            raise ValueError(f"{self.site.address} reads no tokens: a text cannot be a start here")
        return self.tokenize(text)

    def original(self) -> Tensor:
        """W before the base was quantised, [O, I]; only a session that quantises the base itself still has it."""
        if torch.device(self.site.device).type != "meta" and "original" not in self.statistics:
            raise ValueError(
                f"this start makes up for what quantising {self.site.address} loses, and the weight before quantising "
                "is not at hand: start from a base in full precision and let Weft quantise it (base.quantize), or "
                "choose another start"
            )
        return self._statistic("original", self.site.shape)

    def fisher(self) -> Tensor:
        """Mean over the calibration data of the squared gradient of one row's loss for W, [O, I]."""
        return self._statistic("fisher", self.site.shape)

    def solution(self, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Factors that were found together with the codes, by whoever quantised the base."""
        return tuple(self._statistic(f"solution.{i}", shape) for i, shape in enumerate(shapes))

    def requantise(self, weight: Tensor) -> Tensor:
        """Write a weight into the quantised base with the settings that it has; what the base then holds, [O, I]."""
        if torch.device(self.site.device).type == "meta":
            return weight
        if self.write is None:
            raise ValueError(f"{self.site.address} is not quantised: there are no codes to write")
        self.write(weight)
        return self._weight

    def covariance(self) -> Tensor:
        """Mean of x x^T over the calibration data's inputs to this site, [I, I]."""
        return self._statistic("covariance", (self.site.in_features, self.site.in_features))

    def cache(self, num: int) -> tuple[Tensor, Tensor]:
        """Keys and values [num, O] that this attention keeps of the first tokens of the method's own text."""
        shape = num, self.site.out_features
        return self._statistic("keys", shape), self._statistic("values", shape)

    def gradient(self) -> Tensor:
        """Gradient of the loss for W over the calibration data, [O, I, *kernel]."""
        return self._statistic("gradient", self.site.shape)

    def curvature(self) -> Tensor:
        """What the loss's Hessian for all weights that ask for it makes of its gradient, here: [O, I, *kernel]."""
        return self._statistic("curvature", self.site.shape)

    def _statistic(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if torch.device(self.site.device).type == "meta":
            return torch.empty(shape, device="meta", dtype=self.site.dtype)
        if name not in self.statistics:
            raise ValueError(
                f"this start needs the {name} of inputs at {self.site.address}: pass calibration=batches to attach"
            )
        return self.statistics[name].to(self.site.dtype)


def _at_dim_1(g: Tensor, m: Tensor) -> Tensor:
    return g.reshape(1, -1, *[1] * (m.ndim - 2))


def _summed(m: Tensor, dim: int, indices: Tensor, size: int) -> Tensor:
    """Zeros with slice j of m along `dim` added to slice indices[j]."""
    return m.new_zeros(*m.shape[:dim], size, *m.shape[dim + 1 :]).index_add(dim, indices, m)


def _columns_by_blocks(m: Tensor, q: Tensor) -> Tensor:
    """m blockdiag(q) on dimension 1 of m [O, I, *kernel]."""
    n, block = q.shape[:2]
    columns = m.movedim(1, -1)
    parts = columns.unflatten(-1, (n, block)).unsqueeze(-2)  # [O, *kernel, N, 1, block]
    return _matmul(parts, q).flatten(-3).movedim(-1, 1)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b in the more precise of their dtypes: a low-precision weight meets an adapter of full precision."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype) @ b.to(dtype)
