"""Optimisers by the names that recipes use: torch's own, with parameter groups that leave vectors undecayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError, nearest

if TYPE_CHECKING:
    from weft.recipe import Train

__all__ = ["OPTIMIZERS", "flatten_state", "make_optimizer", "restore_state", "state_tensors"]

Groups = list[dict[str, Any]]


def _adamw(groups: Groups, train: Train) -> torch.optim.Optimizer:
    # fused: one call for all tensors of an adapter, which are many and small
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, fused=True)


def _sgd(groups: Groups, train: Train) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=train.learning_rate, momentum=train.betas[0])


OPTIMIZERS: dict[str, Callable[[Groups, Train], torch.optim.Optimizer]] = {"adamw": _adamw, "sgd": _sgd}

state_tensors: Mapping[str, int] = {"adamw": 2, "sgd": 1}
"""Tensors of a parameter's own size that each optimiser keeps."""


def make_optimizer(parameters: Mapping[str, nn.Parameter], train: Train) -> torch.optim.Optimizer:
    """The recipe's optimiser over named parameters; gains, biases and other vectors get no weight decay."""
    if train.optimizer not in OPTIMIZERS:
        raise WeftError(f"train.optimizer: there is no '{train.optimizer}'; {nearest(train.optimizer, OPTIMIZERS)}")
    decayed = [p for p in parameters.values() if p.ndim >= 2]
    plain = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return OPTIMIZERS[train.optimizer]([g for g in groups if g["params"]], train)


def flatten_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state as tensors named `<parameter>|<key>`, and whatever of it is not a tensor."""
    tensors, plain = {}, {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}|{key}"] = value.detach()
            else:
                plain[f"{name}|{key}"] = value
    return tensors, plain


def restore_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Any],
) -> None:
    """The inverse of `flatten_state`, on an optimiser made for the same parameters."""
    for key, value in {**tensors, **plain}.items():
        name, _, field = key.rpartition("|")
        parameter = parameters[name]
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value = value.to(parameter.device)
        optimizer.state[parameter][field] = value.clone() if isinstance(value, Tensor) else value
