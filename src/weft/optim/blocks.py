"""Layers that take turns: BAdam goes through blocks one by one, LISA samples layers; the others get no gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from weft.core import option
from weft.errors import WeftError
from weft.optim.choice import Choice, Groups, Setting
from weft.optim.own import Own, adam, seed_of

__all__ = ["TakingTurns"]

Turn = Callable[[int], frozenset[int]]


@dataclass(frozen=True)
class _BAdam(Choice):
    """AdamW on one layer at a time, its averages started anew at every turn; what is in no layer is one more block.

    Luo et al. 2024, arXiv 2404.02827.
    """

    name, paper = "badam", "2404.02827"
    what = "AdamW on one layer at a time"
    period: int = option(100, help="steps of a turn", minimum=1)
    order: Literal["random", "ascending", "descending"] = option(
        "random", help="order of the layers; random: a new one each time round"
    )
    eps: float = option(1e-8, help="added to the denominator", above=0)

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        count = len(_blocks(setting))

        def turn(number: int) -> frozenset[int]:
            place = number % count
            if self.order == "random":
                order = torch.Generator().manual_seed(seed_of(setting.seed, number // count))
                return frozenset({int(torch.randperm(count, generator=order)[place])})
            return frozenset({place if self.order == "ascending" else count - 1 - place})

        return TakingTurns(groups, setting, turn, period=self.period, eps=self.eps, always=False)

    def state_bytes(self, groups: Groups, setting: Setting) -> int:
        return max(_bytes(block) for block in _blocks(setting))


@dataclass(frozen=True)
class _LISA(Choice):
    """AdamW on a few layers sampled anew for every period, and always on what is in no layer (embeddings, the head).

    The averages of the sampled layers start anew with them. Pan et al. 2024, arXiv 2403.17919.
    """

    name, paper = "lisa", "2403.17919"
    what = "AdamW on a random few of the layers at a time"
    layers: int = option(2, help="layers that train at a time", minimum=1)
    period: int = option(20, help="steps between samples", minimum=1)
    eps: float = option(1e-8, help="added to the denominator", above=0)

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        count = len(_layers(setting))
        if self.layers > count:
            raise WeftError(
                f"train.optimizer: lisa with layers={self.layers} has only {count} adapted layers to sample"
            )

        def turn(number: int) -> frozenset[int]:
            draw = torch.Generator().manual_seed(seed_of(setting.seed, number))
            return frozenset(torch.randperm(count, generator=draw)[: self.layers].tolist())

        return TakingTurns(groups, setting, turn, period=self.period, eps=self.eps, always=True)

    def state_bytes(self, groups: Groups, setting: Setting) -> int:
        sizes = sorted((_bytes(block) for block in _layers(setting)), reverse=True)
        return sum(sizes[: self.layers]) + _bytes(_outside(setting))


class TakingTurns(Own):
    """AdamW on the blocks whose turn it is; the parameters of the others ask for no gradient until it is theirs."""

    def __init__(self, groups: Groups, setting: Setting, turn: Turn, *, period: int, eps: float, always: bool):
        super().__init__(groups, setting.rate)
        self._betas, self._turn, self.period, self._eps = setting.betas, turn, period, eps
        self._blocks = _layers(setting) if always else _blocks(setting)
        self._begin()

    def direction(self, p: nn.Parameter, gradient: Tensor) -> Tensor:
        return adam(self.state[p], gradient, self._betas, self._eps)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update, and the change of turns when it is time."""
        super().step()
        if self.num_steps % self.period == 0:
            for block in self._blocks:
                for p in block:
                    self.state.pop(p, None)
            self._begin()

    def restored(self) -> None:
        """Go on with the turn that `num_steps` says."""
        self._begin()

    def finish(self) -> None:
        """Every parameter can be trained again."""
        for block in self._blocks:
            for p in block:
                p.requires_grad_(True)

    def _begin(self) -> None:
        chosen = self._turn(self.num_steps // self.period)
        for i, block in enumerate(self._blocks):
            for p in block:
                p.requires_grad_(i in chosen)


def _layers(setting: Setting) -> list[list[nn.Parameter]]:
    """The trained tensors of each layer, lowest first."""
    numbers = sorted({t.layer for t in setting.trained if t.layer is not None})
    return [[t.parameter for t in setting.trained if t.layer == number] for number in numbers]


def _outside(setting: Setting) -> list[nn.Parameter]:
    return [t.parameter for t in setting.trained if t.layer is None]


def _blocks(setting: Setting) -> list[list[nn.Parameter]]:
    outside = _outside(setting)
    return _layers(setting) + ([outside] if outside else [])


def _bytes(block: list[nn.Parameter]) -> int:
    return 2 * sum(p.numel() * p.element_size() for p in block)
