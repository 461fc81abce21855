"""Riemannion: descent on the manifold of matrices of rank R, whatever factors they are written in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.core import option
from weft.errors import WeftError
from weft.optim.choice import Choice, Groups, Pair, Setting
from weft.optim.own import Own, adam

__all__ = ["Riemannion"]


@dataclass(frozen=True)
class _Riemannion(Choice):
    """X = B A <- cut(X - lr M),  M = b P(M) + (1 - b) P(G),  P(Z) = U U^T Z + (1 - U U^T) Z V V^T.

    G is the gradient of X, which is never built. U and V span the columns and rows of X: P goes to the tangent space
    there, and `cut`, to the nearest matrix of rank R, back to the manifold. orthogonalise: all singular values of the M
    that is stepped along are made 1, and it is projected once more. A fresh LoRA, B = 0, is no point of the manifold:
    its first step is that of B alone. Tensors outside of a pair have plain AdamW.

    Bogachev et al. 2025, arXiv 2507.12142; starts that it goes with: riemannlora, and others with B A != 0.
    """

    name = "riemannion"
    what = "a step of the product of low-rank factors, along its manifold and back onto it"
    paper = "2507.12142"
    momentum: float = option(0.9, help="decay of the momentum (b)", minimum=0, maximum=1)
    orthogonalise: bool = option(True, help="make all singular values of a step 1, as Muon does")
    eps: float = option(1e-8, help="added to the denominator of tensors outside of a pair", above=0)

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        if not setting.pairs or not all(p.down.requires_grad and p.up.requires_grad for p in setting.pairs):
            raise WeftError(
                f"train.optimizer: {self.name} steps the product of two low-rank factors, and this method does not "
                "train pairs of them; use it with lora or dora and freeze_a=false, or choose adamw"
            )
        for pair in setting.pairs:
            up, down = pair.of_up(pair.up), pair.of_down(pair.down)
            if up.shape[-1] > min(up.shape[-2], down.shape[-1]):
                raise WeftError(
                    f"train.optimizer: {self.name} needs ranks that a matrix of {up.shape[-2]} x {down.shape[-1]} can "
                    f"have, and this update's is {up.shape[-1]}; lower method.rank, or choose adamw"
                )
        return Riemannion(groups, setting, self.momentum, orthogonalise=self.orthogonalise, eps=self.eps)


class Riemannion(Own):
    """What a pair remembers is its last tangent, u V^T + U v^T: u and U in the state of `up`, v and V in `down`'s."""

    def __init__(self, groups: Groups, setting: Setting, momentum: float, *, orthogonalise: bool, eps: float):
        super().__init__(groups, setting.rate)
        self._betas, self._momentum, self._orthogonalise, self._eps = setting.betas, momentum, orthogonalise, eps
        own = {id(p) for group in self.param_groups for p in group["params"]}
        self._pairs = [pair for pair in setting.pairs if {id(pair.down), id(pair.up)} <= own]
        self._paired = {id(t) for pair in self._pairs for t in (pair.down, pair.up)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every pair, and of all that is in none."""
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        for pair in self._pairs:
            if pair.down.grad is not None and pair.up.grad is not None:
                self._move(pair, pair.down.grad, pair.up.grad, group_of[id(pair.down)])
        super().step()

    def with_gradients(self) -> Iterator[tuple[nn.Parameter, Tensor, dict[str, Any]]]:
        """Those in no pair."""
        return (each for each in super().with_gradients() if id(each[0]) not in self._paired)

    def direction(self, p: nn.Parameter, gradient: Tensor) -> Tensor:
        return adam(self.state[p], gradient, self._betas, self._eps)

    def _move(self, pair: Pair, g_down: Tensor, g_up: Tensor, group: dict[str, Any]) -> None:
        exact = torch.promote_types(pair.up.dtype, torch.float32)
        down, up = pair.of_down(pair.down).mT.to(exact), pair.of_up(pair.up).to(exact)  # [N, I, R], [N, O, R]
        (row, row_core, row_inverse), (column, core, inverse) = _frame(down), _frame(up)
        core = core @ row_core.mT  # X = U core V^T
        along_rows = pair.of_up(g_up).to(exact) @ row_inverse  # G V, [N, O, R]
        v = pair.of_down(g_down).to(exact).mT @ inverse  # G^T U, [N, I, R]
        u = along_rows - column @ (column.mT @ along_rows)
        if self._momentum:
            u, v = self._with_momentum(pair, column, row, u, v)
        if self._orthogonalise:
            left, _, right = _thin(torch.cat([u, column], -1), torch.cat([row, v], -1))
            u, v = _tangent(column, row, left, right)
        rate = group["lr"]
        left, size, right = _thin(torch.cat([column, -rate * u], -1), torch.cat([row @ core.mT - rate * v, row], -1))
        rank = up.shape[-1]
        root = ((1 - rate * group["weight_decay"]) * size[..., None, :rank]).sqrt()
        pair.up.copy_(pair.as_up(left[..., :rank] * root, pair.up.shape))
        pair.down.copy_((right[..., :rank] * root).mT.reshape(pair.down.shape))

    def _with_momentum(self, pair: Pair, column: Tensor, row: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        at_up, at_down = self.state[pair.up], self.state[pair.down]
        u, v = (1 - self._momentum) * u, (1 - self._momentum) * v
        if "frame" in at_up:  # the last tangent, carried to where X is now
            left = torch.cat([at_up["tangent"], at_up["frame"]], -1)
            right = torch.cat([at_down["frame"], at_down["tangent"]], -1)
            before = _tangent(column, row, left, right)
            u, v = u + self._momentum * before[0], v + self._momentum * before[1]
        at_up |= {"tangent": u, "frame": column}
        at_down |= {"tangent": v, "frame": row}
        return u, v


def _frame(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m = q c with orthonormal columns in q, or zeros where m has no direction left; c; and what undoes c."""
    q, s, w = torch.linalg.svd(m, full_matrices=False)
    live = s > 1e-7 * s.amax(-1, keepdim=True)
    inverse = torch.where(live, 1 / torch.where(live, s, 1), 0)
    return q * live.unsqueeze(-2), s.unsqueeze(-1) * w, w.mT * inverse.unsqueeze(-2)


def _thin(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of left right^T, from that of a small matrix."""
    (p, r), (q, t) = torch.linalg.qr(left), torch.linalg.qr(right)
    a, s, b = torch.linalg.svd(r @ t.mT, full_matrices=False)
    return p @ a, s, q @ b.mT


def _tangent(column: Tensor, row: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """left right^T projected on the tangent space at column and row, as its u and v."""
    along = left @ (right.mT @ row)
    return along - column @ (column.mT @ along), right @ (left.mT @ column)
