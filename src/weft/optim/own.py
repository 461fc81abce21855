"""What our own optimisers share: a count of steps, and the two averages of Adam on any tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.optim.choice import Groups

__all__ = ["Own", "adam", "seed_of"]


class Own(torch.optim.Optimizer):
    """An optimiser that draws nothing from the global generator: a step is a function of its state and `num_steps`."""

    num_steps: int

    def __init__(self, groups: Groups, rate: float):
        super().__init__(groups, {"lr": rate, "weight_decay": 0.0})
        self.num_steps = 0

    def with_gradients(self) -> Iterator[tuple[nn.Parameter, Tensor, dict[str, Any]]]:
        """Every parameter that has a gradient, with it and with its group."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    yield p, p.grad, group

    def restored(self) -> None:
        """Called once its state was put back from a checkpoint."""

    def finish(self) -> None:
        """Called when training is over: the parameters become as they are to be used."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "gradients are made before the step"
        for p, gradient, group in self.with_gradients():
            if group["weight_decay"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(self.direction(p, gradient), alpha=-group["lr"])
        self.num_steps += 1

    def direction(self, p: nn.Parameter, gradient: Tensor) -> Tensor:
        """What a parameter moves against, per unit of learning rate."""
        raise NotImplementedError


def seed_of(*numbers: int) -> int:
    """One seed made of several numbers, the same in every process; they tell draws apart without any state."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big") >> 2


def adam(state: MutableMapping[str, Any], gradient: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
    """Adam's direction with both averages corrected for their start (Kingma and Ba 2014, arXiv 1412.6980).

    The averages are in the gradient's dtype and shape; `state` holds them between calls.
    """
    if "mean" not in state:
        state["step"], state["mean"], state["square"] = 0, torch.zeros_like(gradient), torch.zeros_like(gradient)
    state["step"] += 1
    mean, square, step = state["mean"], state["square"], state["step"]
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    root = (square / (1 - betas[1] ** step)).sqrt_().add_(eps)
    return mean / root.mul_(1 - betas[0] ** step)
