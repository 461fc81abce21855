"""Starts of low-rank updates: what A and B are before training, from nothing, from the weight, or from data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from weft.core.affine import StartOp
from weft.core.site import Site

Start = Literal[
    "kaiming", "normal", "orthogonal", "pissa", "milora", "olora", "corda-instruction", "corda-knowledge", "eva",
    "lora-ga", "riemannlora", "loftq", "lq-lora", "lq-lora-fisher", "apiq",
]  # fmt: skip
"""The starts by name; the last four repair a quantised base."""
NEEDS: dict[str, frozenset[str]] = {
    "corda-instruction": frozenset({"covariance"}),
    "corda-knowledge": frozenset({"covariance"}),
    "eva": frozenset({"covariance"}),
    "lora-ga": frozenset({"gradient"}),
    "riemannlora": frozenset({"gradient"}),
    "loftq": frozenset({"original"}),
    "lq-lora": frozenset({"original"}),
    "lq-lora-fisher": frozenset({"original", "fisher"}),
    "apiq": frozenset({"original", "solution"}),
}
"""What a start asks its op for beside the weight; "original": it makes up for what quantising the base loses."""
SUBTRACTED = frozenset({"pissa", "milora", "olora", "corda-instruction", "corda-knowledge", "lora-ga", "riemannlora"})
"""Starts whose product B A is not zero: a method subtracts a frozen copy of it, so that the base stays as it is."""
DAMPING = 0.01
"""Share of its mean diagonal that a covariance gets added, so that it has an inverse."""
GAMMA = 16.0
"""LoRA-GA's gamma: the larger, the smaller A and B start."""


@dataclass(frozen=True)
class _Wanted:
    """What a start is asked for: an update scale * B A at a site."""

    site: Site
    op: StartOp
    rank: int
    scale: float
    rounds: int = 1

    @property
    def shape_a(self) -> tuple[int, ...]:
        return (self.rank, *self.site.shape[1:])

    @property
    def shape_b(self) -> tuple[int, int]:
        return (self.site.out_features, self.rank // self.site.groups)


def low_rank(start: str, site: Site, op: StartOp, *, rank: int, scale: float, rounds: int = 1) -> tuple[Tensor, Tensor]:
    """A [R, I / groups, *kernel] and B [O, R / groups] of an update scale * B A. rounds: of starts that alternate."""
    a, b = _STARTS[start](_Wanted(site, op, rank, scale, rounds))
    return a.contiguous(), b.contiguous()


def check_start(start: str, site: Site, *, rank: int, freeze_a: bool = False, rho: float = 1.0) -> None:
    """ValueError when a start does not fit a site or a rank."""
    if rho != 1 and start != "eva":
        raise ValueError(f"rho={rho} shares ranks out by the variance of inputs, which start='eva' alone reads")
    if freeze_a and start == "kaiming" and site.kind == "embedding":
        raise ValueError("an embedding's A starts at zero: freeze_a would leave nothing to learn; use start='normal'")
    if rank % site.groups:
        raise ValueError(f"rank={rank} is no multiple of the convolution's {site.groups} groups")
    if start not in ("kaiming", "normal") and site.groups > 1:
        raise ValueError(f"start={start!r} is not defined for a grouped convolution; use 'kaiming'")
    if start == "orthogonal" and rank % 2:
        raise ValueError(f"start='orthogonal' needs an even rank, not {rank}")
    most = min(site.out_features, math.prod(site.shape[1:]))
    if start in SUBTRACTED and rank > most:
        raise ValueError(f"start={start!r}: rank={rank} is more than the {most} directions that the weight has")
    if NEEDS.get(start) == frozenset({"gradient"}):
        if 2 * rank > most:
            raise ValueError(f"start={start!r}: 2 * {rank} is more than the {most} directions that a gradient has")
        return
    if start in NEEDS and site.kind != "linear":
        what = "repairs a quantised linear layer" if "original" in NEEDS[start] else "needs a linear layer's covariance"
        raise ValueError(f"start={start!r} {what}; this is a site of kind {site.kind}")
    if start in NEEDS and rank > (site.in_features if start == "eva" else most):
        raise ValueError(f"start={start!r}: rank={rank} is more than the {most} directions that the weight has")


def deal_ranks(method: Any, ops: Sequence[StartOp]) -> list[Any]:
    """The same low-rank method with a rank of its own for every site, None for none, and the scale that it had.

    A direction of a site's inputs is worth its part of their variance. The best of all sites share the ranks that the
    sites would have had, at most rho * rank at one (Paischer et al. 2024, arXiv 2410.07170).
    """
    if method.rho == 1:
        return [method] * len(ops)
    worth = []
    for op in ops:
        values = torch.linalg.eigvalsh(op.covariance().double()).flip(0).clamp(min=0)
        worth.append((values / values.sum())[: round(method.rho * method.rank)])
    owner = torch.cat([torch.full((len(w),), i) for i, w in enumerate(worth)])
    best = torch.cat([w.cpu() for w in worth]).argsort(descending=True, stable=True)[: method.rank * len(ops)]
    ranks = torch.bincount(owner[best], minlength=len(ops)).tolist()
    grown = [(r / method.rank) ** (0.5 if method.rank_stabilised else 1) for r in ranks]
    return [
        replace(method, rank=r, alpha=method.alpha * g, rho=1.0) if r else None
        for r, g in zip(ranks, grown, strict=True)
    ]


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


def _milora(w: _Wanted) -> tuple[Tensor, Tensor]:
    """The minor singular directions (Wang et al. 2024, arXiv 2406.09044)."""
    u, s, v = torch.linalg.svd(w.op.weight().flatten(1), full_matrices=False)
    return _from_svd(w, u, s, v, slice(len(s) - w.rank, None))


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


def _eva(w: _Wanted) -> tuple[Tensor, Tensor]:
    """A is the inputs' right singular vectors with the largest values (Paischer et al. 2024, arXiv 2410.07170)."""
    v = torch.linalg.eigh(w.op.covariance()).eigenvectors  # [I, I], the smallest first
    return v[:, v.shape[1] - w.rank :].flip(1).mT, w.site.zeros(*w.shape_b)


def _lora_ga(w: _Wanted) -> tuple[Tensor, Tensor]:
    """A and B from the gradient's singular directions 1 to R and R + 1 to 2 R, so that the first step's change of B A
    is along the best 2 R (Wang et al. 2024, arXiv 2407.05000), scaled as in its algorithm 1."""
    u, _, v = torch.linalg.svd(w.op.gradient().flatten(1), full_matrices=False)
    scale = w.site.out_features**0.25 / GAMMA**0.5
    return scale * v[: w.rank].reshape(w.shape_a), scale * u[:, w.rank : 2 * w.rank]


def _riemannlora(w: _Wanted) -> tuple[Tensor, Tensor]:
    """The point of the rank-R manifold whose tangent space holds most of the gradient: s B A = U_1..R V_R+1..2R^T, of
    orthonormal factors (Bogachev et al. 2025, arXiv 2507.12142)."""
    u, _, v = torch.linalg.svd(w.op.gradient().flatten(1), full_matrices=False)
    root = w.scale**-0.5
    return root * v[w.rank : 2 * w.rank].reshape(w.shape_a), root * u[:, : w.rank]


def _loftq(w: _Wanted) -> tuple[Tensor, Tensor]:
    """Q = quantise(W - s B A) and s B A = SVD_R(W - Q) in turn (Li et al. 2023, arXiv 2310.08659). The first round
    leaves the base as it was quantised; every other writes its codes anew."""
    weight, q = w.op.original(), w.op.weight()
    a, b = _principal(w, weight - q)
    for _ in range(w.rounds - 1):
        q = w.op.requantise(weight - w.scale * (b @ a))
        a, b = _principal(w, weight - q)
    return (a, b) if b.is_meta or b.any() else _kaiming(w)  # a layer that was left as it is has nothing to repair


def _lq_lora(w: _Wanted) -> tuple[Tensor, Tensor]:
    return _lq(w, torch.ones((), device=w.site.device))


def _lq_lora_fisher(w: _Wanted) -> tuple[Tensor, Tensor]:
    return _lq(w, w.op.fisher())


def _lq(w: _Wanted, fisher: Tensor) -> tuple[Tensor, Tensor]:
    """L = SVD_R(W - Q) and Q = quantise(W - L) in turn while sqrt(F) * (W - Q - L) shrinks, the best of all kept
    (Guo et al. 2023, arXiv 2311.12023); with F the SVD is of D_row (W - Q) D_col, D the roots of F's means."""
    weight = w.op.original()
    if w.op.write is None and weight.device.type != "meta":  # left as it is: nothing to repair
        return _kaiming(w)
    rows = columns = torch.ones((), device=weight.device)
    if fisher.ndim:
        floor = 1e-6 * fisher.mean().clamp(min=1e-30)  # a row that no gradient reached has no weight to divide by
        rows = (fisher.mean(1, keepdim=True) + floor).sqrt()  # [O, 1]
        columns = (fisher.mean(0, keepdim=True) + floor).sqrt()  # [1, I]
    best, least, q = None, math.inf, torch.zeros_like(weight)
    for _ in range(w.rounds):
        a, b = _principal(w, rows * (weight - q) * columns)
        a, b = a / columns, b / rows
        q = w.op.requantise(weight - w.scale * (b @ a))
        error = math.inf if q.is_meta else (fisher.sqrt() * (weight - q - w.scale * (b @ a))).norm().item()
        if best is not None and error > least:
            break
        best, least = (a, b), error
    assert best is not None, "there is at least one round"
    w.op.requantise(weight - w.scale * (best[1] @ best[0]))
    return best


def _apiq(w: _Wanted) -> tuple[Tensor, Tensor]:
    """What calibration found for this site (`weft.tune.repair.apiq`), at the same scale."""
    a, b = w.op.solution(w.shape_a, w.shape_b)
    return a, b / w.scale


def _principal(w: _Wanted, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The R largest singular directions of a residual, as A and B."""
    u, s, v = torch.linalg.svd(residual.float(), full_matrices=False)
    a, b = _from_svd(w, u, s, v, slice(w.rank))
    return a.to(w.site.dtype), b.to(w.site.dtype)


def _from_svd(w: _Wanted, u: Tensor, s: Tensor, v: Tensor, chosen: slice) -> tuple[Tensor, Tensor]:
    root = (s[chosen] / w.scale).sqrt()
    return (root[:, None] * v[chosen]).reshape(w.shape_a), u[:, chosen] * root


_STARTS: dict[str, Callable[[_Wanted], tuple[Tensor, Tensor]]] = {
    "kaiming": _kaiming,
    "normal": _normal,
    "orthogonal": _orthogonal,
    "pissa": _pissa,
    "milora": _milora,
    "olora": _olora,
    "corda-instruction": _corda_instruction,
    "corda-knowledge": _corda_knowledge,
    "eva": _eva,
    "lora-ga": _lora_ga,
    "riemannlora": _riemannlora,
    "loftq": _loftq,
    "lq-lora": _lq_lora,
    "lq-lora-fisher": _lq_lora_fisher,
    "apiq": _apiq,
}
