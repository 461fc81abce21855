"""The experts of a router at a site: what they make of its map, summed as the router says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.core.adapter import run
from weft.core.choices import is_recorded, note
from weft.core.factored import FactorOp, NotFactored, Unread, factors
from weft.core.fused import value
from weft.core.method import Method, Tensors
from weft.core.op import Op
from weft.core.view import Once, OpView

__all__ = ["Experts"]


class Experts(OpView):
    """The verbs of a site, and what its experts make of the map."""

    def __init__(self, inner: Op, members: Mapping[str, tuple[Method, Tensors]]):
        super().__init__(Once(inner))
        self.names, self.members = tuple(members), [*members.values()]

    def changes(self, x: Any) -> list[Any]:
        """What each expert adds to the map of x."""
        base = self.inner(x)
        return [run(method, c, x, self.inner) - base for method, c in self.members]

    def change_of(self, k: int, x: Tensor, y: Tensor) -> Tensor:
        """What the k-th expert adds to y, the map of an input x of its own."""
        method, c = self.members[k]
        found: Tensor = value(run(method, c, x, _Known(self.inner, x, y))) - y
        return found

    def only(self, k: int, x: Any) -> Any:
        """The map under the k-th expert: no other is run."""
        method, c = self.members[k]
        return run(method, c, x, self.inner)

    def drawn(self, x: Tensor, u: Tensor) -> Any:
        """The map under one expert for all of x, u [1] in [0, 1) saying which."""
        count = len(self.members)
        k = (u * count).long().clamp(max=count - 1)
        gates = torch.nn.functional.one_hot(k, count)[0].to(u.dtype)
        if not _concrete(u):
            return self.mix(x, gates)
        self.note(x, gates)
        return self.only(int(k), x)

    def note(self, x: Tensor, gates: Tensor) -> None:
        """Show what was chosen to those who record it; `mix` does it by itself."""
        note(self.site.address, self.names, gates, x)

    def mix(self, x: Any, gates: Tensor) -> Any:
        """W x + sum_k gates_k (f_k(x) - W x), f_k the map under expert k.

        gates: [K], the same for all of x, or [..., K] with a row for every token. An expert costs nothing where its
        gates are zero, or next to nothing where all experts are low-rank pairs.
        """
        gates = value(gates)
        if not isinstance(x, Tensor):  # a reading of weights
            return sum((g * change for g, change in zip(gates, self.changes(x), strict=True)), start=self.inner(x))
        self.note(x, gates)
        low_rank = self._pairs()
        if low_rank is not None:
            return self._as_pairs(x, gates, *low_rank)
        base = value(self.inner(x))
        gates = gates.to(base.dtype)
        if gates.ndim > 1 and self.site.kind == "linear" and _concrete(x):
            return self._by_tokens(x, gates, base)
        y = base
        for k, (method, c) in enumerate(self.members):
            y = y + gates[..., k : k + 1] * (value(run(method, c, x, self.inner)) - base)
        return y

    def scaled(self, x: Any, gains: Sequence[Tensor]) -> Any:
        """W x + sum_k gains_k (f_k(x) - W x), gains_k [1] or [O]: the same for all of x, at any kind of site."""
        gains = [value(g) for g in gains]
        if isinstance(x, Tensor) and is_recorded():
            self.note(x, torch.stack([g.mean() for g in gains]))
        low_rank = self._pairs() if isinstance(x, Tensor) else None
        if low_rank is not None:  # they add up to one pair
            b = torch.cat([g.unsqueeze(-1) * each for g, each in zip(gains, low_rank[0], strict=True)], 1)
            y = self.inner.expand(self.inner.project(x, torch.cat(low_rank[1])), b, onto=self.inner(x))
            shifts = [g * s for g, s in zip(gains, low_rank[2], strict=True) if s is not None]
            return y if not shifts else self.inner.shift(y, sum(shifts[1:], start=shifts[0]))
        y = self.inner(x)
        for g, change in zip(gains, self.changes(x), strict=True):
            y = y + self.inner.scale(change, g.expand(*g.shape[:-1], self.site.out_features))
        return y

    def _pairs(self) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]] | None:
        """Every expert's b [O, R], a [R, I] and shift, where each is a pair and no expert draws anything."""
        if self.site.kind != "linear":
            return None
        found = []
        for method, c in self.members:
            try:
                found.append(factors(run(method, c, Unread(), _Still(self))))
            except (NotFactored, TypeError):
                return None
        b, a, shift = zip(*found, strict=True)
        small = sum(len(each) for each in a) <= min(self.site.shape) // 2
        return ([*b], [*a], [*shift]) if small else None

    def _as_pairs(self, x: Tensor, gates: Tensor, b: list[Tensor], a: list[Tensor], shifts: list[Tensor | None]) -> Any:
        """All experts as one pair of the sum of their ranks, whose channels are gated."""
        if not torch.is_grad_enabled() and gates.ndim > 1 and _concrete(x):
            used = gates.detach().flatten(0, -2).ne(0).any(0).nonzero().flatten()
            b, a, shifts = [b[k] for k in used], [a[k] for k in used], [shifts[k] for k in used]
            gates = gates.index_select(-1, used)
        if not a:
            return self.inner(x)
        ranks = torch.tensor([len(each) for each in a], device=gates.device)
        wide = gates.repeat_interleave(ranks, -1, output_size=sum(len(each) for each in a))  # [..., R]
        h = self.inner.project(x, torch.cat(a))
        y = self.inner.expand(h * wide.to(x.dtype), torch.cat(b, 1), onto=self.inner(x))
        if any(s is not None for s in shifts):
            offsets = torch.stack([b[0].new_zeros(len(b[0])) if s is None else s for s in shifts])  # [K, O]
            y = value(y) + (gates.to(x.dtype) @ offsets.to(x.dtype))
        return y

    def _by_tokens(self, x: Tensor, gates: Tensor, base: Tensor) -> Tensor:
        """Every expert on the tokens that chose it."""
        rows, weights, y = x.flatten(0, -2), gates.expand(*x.shape[:-1], -1).flatten(0, -2), base.flatten(0, -2)
        own = y
        for k, (method, c) in enumerate(self.members):
            where = weights[:, k].nonzero().flatten()
            if len(where) == 0:
                continue
            if method.reads_batch:
                change = (value(run(method, c, x, self.inner)) - base).flatten(0, -2)[where]
            else:
                part, known = rows[where], own[where]
                change = value(run(method, c, part, _Known(self.inner, part, known))) - known
            y = y.index_add(0, where, (weights[where, k, None] * change).to(y.dtype))
        return y.view(base.shape)


class _Still(FactorOp):
    """Pairs of a body that computes just those, here and now: nothing is dropped and nothing is drawn."""

    def __init__(self, op: Op):
        super().__init__(op.site, op)  # type: ignore[arg-type]
        self.draws = op.chance(0) is not None

    def drop(self, x: Any, p: float) -> Any:
        if p and self.draws:
            raise NotFactored("drops a part of its input")
        return x

    def penalise(self, y: Any, loss: Tensor) -> Any:
        raise NotFactored("has a loss of its own")

    def chance(self, *size: int) -> Tensor | None:
        if self.draws:
            raise NotFactored("draws random numbers")
        return None


class _Known(OpView):
    """The map on some tokens, for which it has been computed."""

    def __init__(self, inner: Op, x: Tensor, y: Tensor):
        super().__init__(inner)
        self.x, self.y = x, y

    def __call__(self, x: Any) -> Any:
        return self.y if x is self.x else self.inner(x)


def _concrete(x: Tensor) -> bool:
    """Whether there are numbers in x that may be looked at: not under the compiler, not for a forecast."""
    return type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta and not torch.compiler.is_compiling()
