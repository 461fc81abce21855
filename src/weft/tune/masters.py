"""Master weights: trained tensors of low precision are stepped in float32, so that steps below their grid add up.

Micikevicius et al. 2017 (Mixed Precision Training), arXiv 1710.03740.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["in_float32"]

_KEY = "master"
"""Where an optimiser's state holds the float32 copy of a tensor: with it, it is in every checkpoint."""


@contextmanager
def in_float32(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Tensors that have a gradient are float32 inside the `with`, and so are their gradients; then they are rounded.

    The first copy is the tensor itself, which float32 holds exactly.
    """
    swapped: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.dtype != torch.float32:
                    swapped.append((p, p.data))
                    _raise(p, optimizer.state[p])
        yield
    finally:
        for p, low in swapped:
            optimizer.state[p][_KEY], p.grad = p.data, None
            low.copy_(p.data)
            p.data = low


def _raise(p: nn.Parameter, state: dict[str, Any]) -> None:
    gradient, p.grad = p.grad, None
    assert gradient is not None, "the caller looks for gradients"
    master = state.pop(_KEY, None)  # an optimiser makes its state when it finds it empty
    p.data = p.data.float() if master is None else master
    p.grad = gradient.float()
