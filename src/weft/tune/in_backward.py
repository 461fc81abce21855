"""The optimiser's step inside the backward: each tensor is stepped and its gradient freed as soon as it is known.

So that there is never more than a few tensors' gradients, as in LOMO (Lv et al. 2023, arXiv 2306.09782), with any
optimiser whose update of a tensor needs that tensor alone. Its state stays where it was, and so do checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.tune.masters import in_float32

if TYPE_CHECKING:
    from weft.recipe import Train
    from weft.tune.step import Learner

__all__ = ["InBackward"]


class InBackward:
    """Steps each tensor of an optimiser when its gradient is there. `hooks` take it off again."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], *, masters: bool):
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_world_size() > 1:
                raise WeftError(
                    "train.optimizer_in_backward: it would step before the gradients of the other processes are added; "
                    "set it to false"
                )
        self.optimizer, self.parameters, self.masters = optimizer, parameters, masters
        self.groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self.norms: dict[int, Tensor] = {}
        self.hooks: list[Any] = [
            p.register_post_accumulate_grad_hook(self._step) for p in parameters.values() if id(p) in self.groups
        ]

    def update(self, learner: Learner, settings: Train) -> float:  # noqa: ARG002  the signature of `Learner.update`
        """All is stepped: the norm of the gradient that was."""
        found = [self.norms[id(p)] for p in self.parameters.values() if id(p) in self.norms]
        self.norms = {}
        return float(torch.linalg.vector_norm(torch.stack(found))) if found else 0.0

    @torch.no_grad()
    def _step(self, p: nn.Parameter) -> None:
        if id(p) in self.norms:
            raise WeftError(
                "train.optimizer_in_backward: a second batch came before the step was over, and the first has been "
                "applied already; set it to false to add up batches"
            )
        assert p.grad is not None, "the hook runs when a gradient was accumulated"
        self.norms[id(p)] = torch.linalg.vector_norm(p.grad)
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [{**self.groups[id(p)], "params": [p]}]
        try:
            with in_float32(self.optimizer) if self.masters else nullcontext():
                self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups
        p.grad = None
