"""Many adapters in one basis: what each of them changes as a small matrix between two shared ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = ["Joint", "joint_basis"]

Pair = tuple[Tensor, Tensor]
_SMALL = 0.02  # a loss whose square the rounding of norms of 1 to single precision could touch


@dataclass(frozen=True)
class Joint:
    """N adapters of one site as U_k S_n V_k with k = cluster[n]: u [K, O, R], s [N, R, R] or [N, R], v [K, R, I].

    losses: [N], the share of the norm of each adapter's change that is lost.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    cluster: Tensor
    losses: Tensor

    @property
    def num_values(self) -> int:
        """Numbers that are stored for all of them."""
        return self.u.numel() + self.s.numel() + self.v.numel()

    def pair(self, n: int) -> Pair:
        """b [O, R] and a [R, I] of one adapter, as LoRA has them at scale 1; b is the cluster's own."""
        k = int(self.cluster[n])
        s = self.s[n]
        return self.u[k], s @ self.v[k] if s.ndim == 2 else s[:, None] * self.v[k]


@torch.no_grad()
def joint_basis(
    pairs: Sequence[Pair],
    rank: int,
    *,
    diagonal: bool = False,
    clusters: int = 1,
    rounds: int = 50,
    tolerance: float = 1e-4,
) -> Joint:
    """The changes b_n a_n of many adapters at one site, with b_n [O, R_n] and a_n [R_n, I], in shared bases.

    Minimises sum_n || D_n - U S_n V ||^2 / || D_n ||^2 with D_n = b_n a_n: every adapter counts alike, and gets its own
    norm back. Full: U and V orthonormal, S_n = U^T D_n V^T, and U, V by turns the leading eigenvectors of
    sum_n D_n V^T V D_n^T and its mirror, one step of orthogonal iteration each. diagonal: S_n diagonal, U and V free,
    by alternating least squares. clusters: of adapters with bases of their own; each adapter goes where it loses least.
    rounds: at most so many; fewer where one gains less than `tolerance` of what is lost.
    Brüel Gabrielsson et al. 2024, arXiv 2407.00066.
    Raises ValueError where there is no adapter, fewer adapters than clusters, or shapes that differ.
    """
    _check(pairs, rank, clusters)
    changes = _Changes.of(pairs)
    stop = _Stop(rounds, tolerance)
    assigned = _assigned(changes, rank, clusters, stop)  # [N]
    fitted = [_fitted(changes.of_cluster(assigned == k), rank, diagonal, stop) for k in range(clusters)]
    dtype = pairs[0][0].dtype
    s = torch.empty(len(pairs), *fitted[0][2].shape[1:], dtype=dtype, device=changes.a.device)
    losses = torch.empty(len(pairs), dtype=torch.float64, device=changes.a.device)
    for k, (_, _, small, lost) in enumerate(fitted):
        members = assigned == k
        losses[members] = lost
        s[members] = (small * changes.norm[members].view(-1, *[1] * (small.ndim - 1))).to(dtype)
    us, vs = (torch.stack([f[i].to(dtype) for f in fitted]) for i in (0, 1))
    return Joint(us, s, vs, assigned, losses)


@dataclass(frozen=True)
class _Stop:
    """When turns end."""

    rounds: int
    tolerance: float


def _assigned(c: _Changes, rank: int, clusters: int, stop: _Stop) -> Tensor:
    """The cluster of every adapter: those that are least alike start one each, and then each goes where it fits best.

    Bases that are nearly found tell where an adapter belongs, so that few turns are taken for each assignment.
    """
    assigned = _first_clusters(c, clusters)
    quick = _Stop(min(stop.rounds, 3), stop.tolerance)
    for _ in range(stop.rounds if clusters > 1 else 0):
        bases = [_full(c.of_cluster(assigned == k), rank, quick) for k in range(clusters)]
        better = torch.stack([_small(c, u, v).square().sum((1, 2)) for u, v, _ in bases]).argmax(0)
        if torch.equal(better, assigned) or len(better.unique()) < clusters:
            break
        assigned = better
    return assigned


@dataclass(frozen=True)
class _Changes:
    """D_n = b_n a_n at norm 1: bt [N, R, O], the transposes of b, and a [N, R, I]; norm [N]: what theirs were.

    Those of smaller rank have rows of zeros. One matrix of all rows makes a sum over n one product.
    """

    bt: Tensor
    a: Tensor
    norm: Tensor

    @staticmethod
    def of(pairs: Sequence[Pair]) -> _Changes:
        wide = torch.promote_types(pairs[0][0].dtype, torch.float32)
        bt = pad_sequence([b.mT.to(wide) for b, _ in pairs], batch_first=True).contiguous()
        a = pad_sequence([a.to(wide) for _, a in pairs], batch_first=True)
        norm = (_gram(bt) * _gram(a)).sum((1, 2)).clamp(min=0).sqrt()
        scale = torch.where(norm > 0, 1 / norm, 0.0)
        return _Changes(bt.mul_(scale[:, None, None]), a, norm)

    def wide(self) -> _Changes:
        return _Changes(self.bt.double(), self.a.double(), self.norm)

    def of_cluster(self, members: Tensor) -> _Changes:
        if bool(members.all()):
            return self
        return _Changes(self.bt[members], self.a[members], self.norm[members])


def _over(m: Tensor, right: Tensor) -> Tensor:
    """sum_n m_n^T right_n, for m [N, R, C] and right [N, R, X]: [C, X]."""
    return m.flatten(0, 1).mT @ right.flatten(0, 1)


def _gram(m: Tensor) -> Tensor:
    return m @ m.mT


def _fitted(c: _Changes, rank: int, diagonal: bool, stop: _Stop) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U, V, the small matrices, and what is lost: in double precision where a loss is so small that others hide it."""
    u, v, inner = _full(c, rank, stop)
    if diagonal:
        u, v = _diagonal(c, u, v, stop)
        inner = _small(c, u, v)
    small, losses = _measured(c, u, v, inner, diagonal)
    if u.dtype != torch.float64 and bool((losses < _SMALL).any()):
        c, u, v = c.wide(), u.double(), v.double()
        if not diagonal:
            u, v = torch.linalg.qr(u)[0], torch.linalg.qr(v.mT)[0].mT
        small, losses = _measured(c, u, v, _small(c, u, v), diagonal)
    return u, v, small, losses


def _full(c: _Changes, rank: int, stop: _Stop) -> tuple[Tensor, Tensor, Tensor]:
    """U [O, R] and V [R, I], orthonormal, and U^T D_n V^T, [N, R, R].

    V starts in the range of sum_n D_n^T D_n on random vectors, twice applied: near its leading eigenvectors, for a
    small part of what these cost.
    """
    draw = torch.Generator(c.a.device).manual_seed(0)
    v = torch.randn(rank, c.a.shape[-1], generator=draw, dtype=c.a.dtype, device=c.a.device)
    within = _gram(c.bt)
    for _ in range(3):
        av = c.a @ v.mT  # [N, R_n, R]
        v = torch.linalg.qr(_over(c.a, within @ av))[0].mT
    av = c.a @ v.mT
    u = torch.randn(c.bt.shape[-1], rank, generator=draw, dtype=c.a.dtype, device=c.a.device)
    bu, held = c.bt @ u, 0.0
    for turn in range(stop.rounds + 1):
        u = torch.linalg.qr(_over(c.bt, _gram(av) @ bu))[0]
        bu, before = c.bt @ u, held
        held = float((_gram(bu) * _gram(av)).sum())  # sum_n |U^T D_n V^T|^2
        if turn == stop.rounds or (turn > 1 and held - before <= stop.tolerance * (len(bu) - held)):
            break
        v = torch.linalg.qr(_over(c.a, _gram(bu) @ av))[0].mT
        av = c.a @ v.mT
    return u, v, bu.mT @ av


def _small(c: _Changes, u: Tensor, v: Tensor) -> Tensor:
    """U^T D_n V^T, [N, R, R]."""
    return (c.bt @ u).mT @ (c.a @ v.mT)


def _measured(c: _Changes, u: Tensor, v: Tensor, inner: Tensor, diagonal: bool) -> tuple[Tensor, Tensor]:
    """The best small matrices between U and V, and || D_n - U S_n V ||, [N], for D_n of norm 1 (or 0).

    inner: U^T D_n V^T.
    """
    small = _solved(inner.diagonal(dim1=1, dim2=2), _gram(u.mT) * _gram(v)) if diagonal else inner
    held = ((inner.diagonal(dim1=1, dim2=2) if diagonal else inner) * small).double().flatten(1).sum(1)
    whole = (_gram(c.bt) * _gram(c.a)).double().sum((1, 2))  # 1, as it was rounded
    return small, (whole - held).clamp(min=0).sqrt()  # what least squares leave


def _diagonal(c: _Changes, u: Tensor, v: Tensor, stop: _Stop) -> Pair:
    """U and V by alternating least squares for D_n = U diag(s_n) V, each factor given the two others."""
    bu, av = c.bt @ u, c.a @ v.mT  # [N, R_n, R]
    s, loss = (bu * av).sum(1), float("inf")  # [N, R]: the diagonals of U^T D_n V^T
    for _ in range(stop.rounds):
        u = _unit(_solved(_over(c.bt, av * s[:, None]), (s.mT @ s) * _gram(v)))
        bu = c.bt @ u
        v = _unit(_solved(_over(c.a, bu * s[:, None]), (s.mT @ s) * _gram(u.mT))).mT
        av, before = c.a @ v.mT, loss
        inner = (bu * av).sum(1)
        s = _solved(inner, _gram(u.mT) * _gram(v))
        loss = len(s) - float((s * inner).sum())  # what least squares leave of norms of 1
        if before - loss <= stop.tolerance * loss:
            break
    return u, v


def _solved(right: Tensor, gram: Tensor) -> Tensor:
    """right gram^-1, of least norm where that is singular."""
    return right @ torch.linalg.pinv(gram, hermitian=True)


def _unit(m: Tensor) -> Tensor:
    """Columns of norm 1."""
    return m / m.norm(dim=0).clamp(min=torch.finfo(m.dtype).tiny)


def _first_clusters(c: _Changes, clusters: int) -> Tensor:
    """Each adapter to the nearest of some that are far apart: the next is the one that those before hold least of."""
    chosen = [0]
    held = [_overlap(c, 0)]
    while len(chosen) < clusters:
        nearest = torch.stack(held).amax(0)
        nearest[chosen] = torch.inf
        chosen.append(int(nearest.argmin()))
        held.append(_overlap(c, chosen[-1]))
    found = torch.stack(held).argmax(0)
    found[chosen] = torch.arange(clusters)
    return found


def _overlap(c: _Changes, n: int) -> Tensor:
    """How much of each change is in the row and column spaces of one, from 0 to 1: [N]."""
    return _small(c, torch.linalg.qr(c.bt[n].mT)[0], torch.linalg.qr(c.a[n].mT)[0].mT).square().sum((1, 2))


def _check(pairs: Sequence[Pair], rank: int, clusters: int) -> None:
    if len(pairs) < max(1, clusters) or clusters < 1:
        raise ValueError(f"{len(pairs)} adapters make no {clusters} clusters: give at least one for each")
    shapes = {(b.shape[0], a.shape[1]) for b, a in pairs}
    if len(shapes) > 1:
        raise ValueError(f"the adapters change matrices of different shapes: {sorted(shapes)}")
    if not 1 <= rank <= min(next(iter(shapes))):
        raise ValueError(f"a basis of {rank} directions does not fit a matrix of {next(iter(shapes))}")
