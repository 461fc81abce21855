"""Natural GaLore: Adam in a low-rank subspace of the gradients, which an inverse empirical Fisher turns first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.core import option
from weft.optim.choice import Choice, Groups, Setting
from weft.optim.own import Own, adam

__all__ = ["NaturalGaLore"]


@dataclass(frozen=True)
class _NaturalGaLore(Choice):
    """h = g / l - H (l I + H^T H)^-1 H^T g / l,  g = P^T G flat,  H = [g_t ... g_(t-s+1)];  u = c P adam(h).

    P [m, R] are the leading singular directions of the gradient along its shorter side, found anew every T steps; the
    history then starts anew, and so do the averages. Tensors that are no matrix have AdamW.

    Das 2024, arXiv 2410.16029; the subspace: Zhao et al. 2024, arXiv 2403.03507.
    """

    name, paper = "natural-galore", "2410.16029"
    what = "GaLore with natural gradients from a short history"
    rank: int = option(128, help="size of the subspace (R)", minimum=1)
    update_gap: int = option(200, help="steps between new subspaces (T)", minimum=1)
    scale: float = option(0.25, help="factor of the projected update (c)", above=0)
    history: int = option(5, help="projected gradients that are remembered (s)", minimum=1)
    damping: float = option(1.0, help="what is added to the Fisher matrix (l)", above=0)
    eps: float = option(1e-8, help="added to the denominator", above=0)

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        return NaturalGaLore(groups, setting, self)


class NaturalGaLore(Own):
    """The optimiser."""

    def __init__(self, groups: Groups, setting: Setting, options: _NaturalGaLore):
        super().__init__(groups, setting.rate)
        self._betas, self._options = setting.betas, options

    def direction(self, p: nn.Parameter, gradient: Tensor) -> Tensor:
        state, options = self.state[p], self._options
        if p.ndim < 2:
            return adam(state, gradient, self._betas, options.eps)
        tall = gradient.flatten(1).shape[0] > gradient.flatten(1).shape[1]
        g = gradient.flatten(1).mT if tall else gradient.flatten(1)
        if self.num_steps % options.update_gap == 0:
            state.clear()
            state["basis"] = torch.linalg.svd(g, full_matrices=False)[0][:, : options.rank].contiguous()
            state["history"] = g.new_zeros(options.history, state["basis"].shape[1] * g.shape[1])
        basis, history = state["basis"], state["history"]
        low = basis.mT @ g
        history[self.num_steps % options.update_gap % options.history] = low.flatten()
        u = options.scale * basis @ adam(state, self._natural(low, history), self._betas, options.eps)
        return (u.mT if tall else u).reshape(gradient.shape)

    def _natural(self, low: Tensor, history: Tensor) -> Tensor:
        """(l I + H H^T)^-1 g by Woodbury's identity: a system of the history's length. Rows of zeros change nothing."""
        damping, g = self._options.damping, low.flatten()
        small = history @ history.mT + damping * torch.eye(len(history), dtype=g.dtype, device=g.device)
        return ((g - history.mT @ torch.linalg.solve(small, history @ g)) / damping).view_as(low)
