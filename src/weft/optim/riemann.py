"""Riemannian preconditioning of low-rank pairs: the gradient of each factor in the metric of the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.core import option
from weft.errors import WeftError
from weft.optim.choice import Choice, Groups, Pair, Setting
from weft.optim.own import Own, adam

__all__ = ["Preconditioned"]


@dataclass(frozen=True)
class _Scaled(Choice):
    """g_A -> (B^T B + d I)^-1 g_A,  g_B -> g_B (A A^T + d I)^-1: the step of the product B A forgets how it is split.

    Zhang and Pilanci 2024, arXiv 2402.02347; of a router's experts, each by itself: Sun et al. 2025, arXiv 2502.15828.
    """

    paper = "2402.02347"
    damping: float = option(1e-6, help="what is added to both Gram matrices (d)", above=0)

    def checked(self, setting: Setting) -> Setting:
        """WeftError when nothing that is trained is a low-rank pair."""
        if not setting.pairs:
            raise WeftError(
                f"train.optimizer: {self.name} preconditions the factors of a low-rank update, and this method trains "
                "no pair of them; use it with lora or dora, or choose adamw"
            )
        return setting


@dataclass(frozen=True)
class _ScaledAdamW(_Scaled):
    """AdamW on preconditioned gradients; tensors outside of a pair have plain AdamW."""

    name = "scaled-adamw"
    what = "AdamW on low-rank gradients, each in the metric of the other factor"
    eps: float = option(1e-8, help="added to the denominator", above=0)

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        return Preconditioned(groups, self.checked(setting), self.damping, eps=self.eps)


@dataclass(frozen=True)
class _ScaledSGD(_Scaled):
    """Gradient descent on preconditioned gradients, without momentum."""

    name = "scaled-sgd"
    what = "gradient descent on low-rank gradients, each in the metric of the other factor"
    takes_betas = False

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        return Preconditioned(groups, self.checked(setting), self.damping, eps=None)


class Preconditioned(Own):
    """AdamW, or gradient descent where `eps` is None, on preconditioned gradients."""

    def __init__(self, groups: Groups, setting: Setting, damping: float, *, eps: float | None):
        super().__init__(groups, setting.rate)
        self._betas, self._damping, self._eps = setting.betas, damping, eps
        self._pairs = setting.pairs

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; every metric is that of the factors before it."""
        for pair in self._pairs:
            self._precondition(pair)
        super().step()

    def direction(self, p: nn.Parameter, gradient: Tensor) -> Tensor:
        return gradient if self._eps is None else adam(self.state[p], gradient, self._betas, self._eps)

    def _precondition(self, pair: Pair) -> None:
        down, up = pair.of_down(pair.down), pair.of_up(pair.up)
        g_down, g_up = pair.down.grad, pair.up.grad
        if g_down is not None:
            pair.down.grad = self._solve(up.mT @ up, pair.of_down(g_down)).reshape(g_down.shape)
        if g_up is not None:
            pair.up.grad = pair.as_up(self._solve(down @ down.mT, pair.of_up(g_up).mT).mT, g_up.shape)

    def _solve(self, gram: Tensor, g: Tensor) -> Tensor:
        """(gram + d I)^-1 g of matrices [N, R, ...], in at least float32."""
        exact = torch.promote_types(g.dtype, torch.float32)
        gram = gram.to(exact)
        gram = gram + self._damping * torch.eye(gram.shape[-1], dtype=exact, device=gram.device)
        return torch.linalg.solve(gram, g.to(exact)).to(g.dtype)
