"""Zeroth order: MeZO and AdaZeta, which learn from losses alone and draw every direction again from its seed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from weft.core import option
from weft.optim.choice import Choice, Groups, Setting
from weft.optim.own import Own, seed_of

__all__ = ["ZerothOrder"]


@dataclass(frozen=True)
class _MeZO(Choice):
    """g = mean over q of (L(w + e z_q) - L(w - e z_q)) / (2 e) z_q,  z_q ~ N(0, I);  w <- w - r (g + d w).

    Malladi et al. 2023, arXiv 2305.17333.
    """

    name, paper = "mezo", "2305.17333"
    what = "gradients from two forward passes along a random direction: the memory of inference"
    takes_betas, forward_only = False, True
    perturbation: float = option(1e-3, help="length of a move along a direction (e)", above=0)
    queries: int = option(1, help="directions per step (q)", minimum=1)

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        return ZerothOrder(groups, setting, _Queries(self.perturbation, 0.0, 0.0, self.queries, fixed=True))

    def state_bytes(self, groups: Groups, setting: Setting) -> int:
        return 0


@dataclass(frozen=True)
class _AdaZeta(Choice):
    """MeZO with max(1, floor(min(a k^b, Q))) directions per step in pass k = 1, 2, ... over the data.

    Yang et al. 2024, arXiv 2406.18060; its adapters are the method's affair (tensor_train, say).
    """

    name, paper = "adazeta", "2406.18060"
    what = "MeZO with more directions in later passes over the data"
    takes_betas, forward_only = False, True
    perturbation: float = option(1e-3, help="length of a move along a direction (e)", above=0)
    factor: float = option(0.9, help="how fast the number of directions grows (a)", above=0)
    exponent: float = option(0.9, help="the power of the number of the pass (b)", minimum=0)
    queries: int = option(8, help="most directions per step (Q)", minimum=1)

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        return ZerothOrder(groups, setting, _Queries(self.perturbation, self.factor, self.exponent, self.queries))

    def state_bytes(self, groups: Groups, setting: Setting) -> int:
        return 0


@dataclass(frozen=True)
class _Queries:
    """How far to move, and how many directions a step of an epoch (1, 2, ...) asks for."""

    perturbation: float
    factor: float
    exponent: float
    most: int
    fixed: bool = False

    def count(self, epoch: int) -> int:
        return self.most if self.fixed else max(1, int(min(self.factor * epoch**self.exponent, self.most)))


class ZerothOrder(Own):
    """Moves its parameters along directions, is told the slopes, and steps against them. It keeps no tensors at all."""

    def __init__(self, groups: Groups, setting: Setting, queries: _Queries):
        super().__init__(groups, setting.rate)
        self._seed, self._queries = setting.seed, replace(queries)
        self._steps_per_epoch = setting.steps_per_epoch
        self._slopes: dict[int, float] = {}

    @property
    def perturbation(self) -> float:
        """How far one move goes."""
        return self._queries.perturbation

    def seeds(self) -> list[int]:
        """One seed for each direction of the coming step: a function of the run's seed and the number of steps."""
        count = self._queries.count(1 + self.num_steps // self._steps_per_epoch)
        return [seed_of(self._seed, self.num_steps, query) for query in range(count)]

    @torch.no_grad()
    def move(self, seed: int, distance: float) -> None:
        """w <- w + distance z, in place, with the direction of a seed; one tensor's worth of it exists at a time."""
        for i, p in enumerate(self._parameters()):
            p.add_(_direction(p, seed + i), alpha=distance)

    def tell(self, seed: int, slope: float) -> None:
        """The loss's slope along a direction."""
        self._slopes[seed] = slope

    def slope_norm(self) -> float:
        """The estimate's expected length: that of the mean of its directions, which are all but orthogonal."""
        count = sum(p.numel() for p in self._parameters())
        squares = sum(slope**2 for slope in self._slopes.values())
        return (count * squares) ** 0.5 / max(len(self._slopes), 1)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Against the mean of all told directions, each drawn again."""
        rates = {id(p): (group["lr"], group["weight_decay"]) for group in self.param_groups for p in group["params"]}
        for i, p in enumerate(self._parameters()):
            rate, decay = rates[id(p)]
            if decay:
                p.mul_(1 - rate * decay)
            for seed, slope in self._slopes.items():
                p.add_(_direction(p, seed + i), alpha=-rate * slope / len(self._slopes))
        self._slopes.clear()
        self.num_steps += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget what was told."""
        self._slopes.clear()

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]


def _direction(p: Tensor, seed: int) -> Tensor:
    return torch.randn(p.shape, generator=torch.Generator(p.device).manual_seed(seed), dtype=p.dtype, device=p.device)
