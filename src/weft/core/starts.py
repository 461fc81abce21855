"""Starts of low-rank updates: what A and B are before training, from nothing, from the weight, or from data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.core.affine import StartOp
from weft.core.site import Site

SUBTRACTED = frozenset({"pissa", "olora", "corda-instruction", "corda-knowledge"})
"""Starts whose product B A is not zero: a method subtracts a frozen copy of it, so that the base stays as it is."""
DAMPING = 0.01
"""Share of its mean diagonal that a covariance gets added, so that it has an inverse."""


@dataclass(frozen=True)
class _Wanted:
    """What a start is asked for: an update scale * B A at a site."""

    site: Site
    op: StartOp
    rank: int
    scale: float

    @property
    def shape_a(self) -> tuple[int, ...]:
        return (self.rank, *self.site.shape[1:])

    @property
    def shape_b(self) -> tuple[int, int]:
        return (self.site.out_features, self.rank // self.site.groups)


def low_rank(start: str, site: Site, op: StartOp, *, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A [R, I / groups, *kernel] and B [O, R / groups] of an update scale * B A."""
    a, b = _STARTS[start](_Wanted(site, op, rank, scale))
    return a.contiguous(), b.contiguous()


def check_start(start: str, site: Site, *, rank: int) -> None:
    """ValueError when a start does not fit a site or a rank."""
    if rank % site.groups:
        raise ValueError(f"rank={rank} is no multiple of the convolution's {site.groups} groups")
    if start not in ("kaiming", "normal") and site.groups > 1:
        raise ValueError(f"start={start!r} is not defined for a grouped convolution; use 'kaiming'")
    if start == "orthogonal" and rank % 2:
        raise ValueError(f"start='orthogonal' needs an even rank, not {rank}")
    if start in SUBTRACTED and rank > (most := min(site.out_features, math.prod(site.shape[1:]))):
        raise ValueError(f"start={start!r}: rank={rank} is more than the {most} directions that the weight has")
    if start.startswith("corda") and site.kind != "linear":
        raise ValueError(
            f"start={start!r} needs the covariance of a linear layer's input; this is a site of kind {site.kind}"
        )


def _kaiming(w: _Wanted) -> tuple[Tensor, Tensor]:
    if w.site.kind == "embedding":  # rows are looked up, not summed: B is the random one, as in loralib
        return w.site.zeros(*w.shape_a), w.site.normal(*w.shape_b)
    return w.site.uniform(*w.shape_a, bound=math.prod(w.shape_a[1:]) ** -0.5), w.site.zeros(*w.shape_b)


def _normal(w: _Wanted) -> tuple[Tensor, Tensor]:
    return w.site.normal(*w.shape_a, std=1 / w.rank), w.site.zeros(*w.shape_b)


def _orthogonal(w: _Wanted) -> tuple[Tensor, Tensor]:
    """Both are random, and B A is zero because they use complementary rows of one orthogonal matrix."""
    q, half = torch.linalg.qr(w.site.normal(w.rank, w.rank))[0], w.rank // 2
    a = q[0::2].mT @ w.site.normal(half, math.prod(w.shape_a[1:]), std=0.1, salt="A")
    return a.view(w.shape_a), w.site.normal(w.site.out_features, half, std=0.1, salt="B") @ q[1::2]


def _pissa(w: _Wanted) -> tuple[Tensor, Tensor]:
    """The principal singular directions (Meng et al. 2024, arXiv 2404.02948)."""
    u, s, v = torch.linalg.svd(w.op.weight().flatten(1), full_matrices=False)
    return _from_svd(w, u, s, v, slice(w.rank))


def _olora(w: _Wanted) -> tuple[Tensor, Tensor]:
    """The first columns of the QR decomposition (Büyükakyüz 2024, arXiv 2406.01775)."""
    q, r = torch.linalg.qr(w.op.weight().flatten(1))
    return r[: w.rank].reshape(w.shape_a), q[:, : w.rank]


def _corda_instruction(w: _Wanted) -> tuple[Tensor, Tensor]:
    return _corda(w, slice(w.rank))


def _corda_knowledge(w: _Wanted) -> tuple[Tensor, Tensor]:
    return _corda(w, slice(-w.rank, None))


def _corda(w: _Wanted, chosen: slice) -> tuple[Tensor, Tensor]:
    """Singular directions of W C, C the covariance of the inputs (Yang et al. 2024, arXiv 2406.05223)."""
    c = w.op.covariance()
    c = c + DAMPING * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype, device=c.device)
    u, s, v = torch.linalg.svd(w.op.weight() @ c, full_matrices=False)
    return _from_svd(w, u, s, torch.linalg.solve(c, v.mT).mT, chosen)


def _from_svd(w: _Wanted, u: Tensor, s: Tensor, v: Tensor, chosen: slice) -> tuple[Tensor, Tensor]:
    root = (s[chosen] / w.scale).sqrt()
    return (root[:, None] * v[chosen]).reshape(w.shape_a), u[:, chosen] * root


_STARTS: dict[str, Callable[[_Wanted], tuple[Tensor, Tensor]]] = {
    "kaiming": _kaiming,
    "normal": _normal,
    "orthogonal": _orthogonal,
    "pissa": _pissa,
    "olora": _olora,
    "corda-instruction": _corda_instruction,
    "corda-knowledge": _corda_knowledge,
}
