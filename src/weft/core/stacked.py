"""Coefficients of several adapters at one site, stacked [K, ...]; what is the same for all of them is there once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft.core.adapter import Adapter, Watched, changes
from weft.core.method import Method
from weft.core.op import DataOp
from weft.core.pile import Pile
from weft.core.view import OpView

__all__ = ["Gained", "Stacked"]


class Gained(NamedTuple):
    """diag(left) matrix diag(right), not multiplied out: one matrix that adapters share between vectors of their own.

    left [K, O], matrix [1, O, R] and right [K, R]; of one adapter without the first dimension.
    """

    left: Tensor
    matrix: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """The product, as one matrix for each adapter."""
        return self.left.unsqueeze(-1) * self.matrix * self.right.unsqueeze(-2)


class _Parted(OpView):
    """A map at which coefficients are made that keep a matrix apart from its gains."""

    def with_gains(self, b: Tensor, left: Tensor, right: Tensor) -> Any:
        return Gained(left, b, right)


class Stacked:
    """The coefficients of these adapters, made once for a route while no gradient is wanted."""

    def __init__(self, members: Sequence[Adapter]):
        self.members = (*members,)
        self._seen = -1
        self._kept: tuple[list[int], Watched, Mapping[str, Any]] | None = None

    def coefficients(self, op: DataOp) -> Mapping[str, Any]:
        """Stacked [K, ...]; a matrix of dimension [1, ...] is that of all of them."""
        members = self.members
        if torch.is_grad_enabled():
            pile: Pile | None = members[0].__dict__.get("pile")
            return _stack([a.coefficients(op) for a in members]) if pile is None else pile.coefficients(members, op)
        # what is drawn is drawn for one call
        if torch.compiler.is_compiling() or (members[0].method.random and op.source.training()):
            return _stack([a.coefficients(op) for a in members])
        kept = self._kept
        if kept is not None and (self._seen == changes[0] or kept[0] == [a.age for a in members]):
            self._seen = changes[0]
            if kept[1].unchanged():
                return kept[2]
        ages = [a.age for a in members]
        watched = Watched(members, op)
        found = _stack_once(members, op)
        self._kept = (ages, watched, found) if watched.countable else None
        return found


_has_gains: dict[tuple[Method, str], bool] = {}


def _stack_once(members: Sequence[Adapter], op: DataOp) -> Mapping[str, Any]:
    """The same for inference: nothing is held twice, and matrices lie as a product with few rows reads them."""
    key, parted = (members[0].method, members[0].site.kind), _Parted(op)
    if key not in _has_gains:
        _has_gains[key] = any(isinstance(c, Gained) for c in members[0].coefficients(parted).values())
    if _has_gains[key]:
        each = [a.coefficients(parted) for a in members]
    else:
        each = [a.coefficients(op, keep=True) for a in members]
    return {k: _together([c[k] for c in each]) for k in each[0]}


def _together(each: Sequence[Any]) -> Any:
    first = each[0]
    if isinstance(first, Gained):
        if not _same([g.matrix for g in each]):
            return _together([g.dense() for g in each])
        return Gained(torch.stack([g.left for g in each]), first.matrix[None], torch.stack([g.right for g in each]))
    if first.ndim < 2:
        return torch.stack([*each])
    if _same(each):
        return first[None]
    if first.ndim == 2 and first.shape[0] > first.shape[1]:  # B: a row of h meets its short side
        return torch.stack([c.mT for c in each]).mT
    return torch.stack([*each])


def _same(each: Sequence[Tensor]) -> bool:
    """Whether these are one tensor, or equal ones: random matrices of one seed, a basis that a set has in common."""
    first = each[0]
    return all(
        (c.data_ptr() == first.data_ptr() and c.stride() == first.stride()) or torch.equal(c, first) for c in each[1:]
    )


def _stack(each: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    return {k: torch.stack([c[k] for c in each]) for k in each[0]}
