"""The recipe's optimiser over what is trained: its parameter groups, and which settings go together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weft.errors import WeftError
from weft.optim import Choice, Groups, Own, Setting, flatten_state, resolve, restore_state, state_bytes
from weft.tune.trained import Tensors

if TYPE_CHECKING:
    from weft.recipe import Train

__all__ = [
    "check_optimizer", "finish", "flatten_state", "make_optimizer", "notes", "optimizer_bytes", "restore_state",
    "settled",
]  # fmt: skip

_DEFAULT_BETAS = (0.9, 0.999)


def check_optimizer(train: Train) -> Choice:
    """The optimiser that a recipe names; WeftError for options it lacks and for settings that it cannot go with."""
    choice = resolve(train.optimizer)
    name = choice.name
    if not choice.takes_betas and train.betas != _DEFAULT_BETAS:
        raise WeftError(
            f"train.betas: {name} does not read them; leave train.betas at {list(_DEFAULT_BETAS)} and set the options "
            f"of {name} inside train.optimizer, as in {{name: {name}, ...}}"
        )
    if not choice.decays and train.weight_decay:
        raise WeftError(f"train.weight_decay: {name} knows no weight decay; set it to 0 or choose another optimizer")
    averages = _name(train.schedule) == "schedule-free"
    if averages and not choice.schedule_free:
        raise WeftError(
            f"train.schedule: schedule-free is for the optimizers schedulefree-adamw and schedulefree-sgd, which "
            f"average weights themselves; with {name} the rate would never fall: choose one of these, or constant"
        )
    if choice.schedule_free and not averages:
        raise WeftError(
            f"train.schedule: {name} averages weights instead of lowering the rate, and {_name(train.schedule)} would "
            "lower it as well; leave the schedule out or set it to schedule-free"
        )
    if choice.forward_only:
        _check_forward_only(name, train)
    if train.optimizer_in_backward:
        _check_in_backward(choice, train)
    return choice


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    train: Train,
    *,
    tensors: Tensors | None = None,
    steps_per_epoch: int = 1,
) -> torch.optim.Optimizer:
    """The recipe's optimiser over named parameters; gains, biases and other vectors get no weight decay.

    tensors: what is known of the parameters; optimisers of layers or low-rank pairs need it.
    """
    choice = check_optimizer(train)
    known = tensors or Tensors.plain(parameters)
    return choice.make(_groups(known, train), _setting(known, train, steps_per_epoch))


def optimizer_bytes(tensors: Tensors, train: Train) -> int:
    """What the recipe's optimiser will keep for these tensors, which may be on the meta device, master weights too."""
    choice, masters = check_optimizer(train), 0
    if train.master_weights:
        low = [t.parameter for t in tensors.trained if t.parameter.dtype != torch.float32]
        masters, tensors = sum(4 * p.numel() for p in low), tensors.in_float32()
    return masters + state_bytes(choice, _groups(tensors, train), _setting(tensors, train, 1))


@contextmanager
def settled(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The trained tensors as they are to be used, for measuring in between; the very bits of training come back."""
    if not _averages(optimizer):
        yield
        return
    held = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in held]
    _swap(optimizer, "eval")
    try:
        yield
    finally:
        _swap(optimizer, "train")
        with torch.no_grad():
            for p, value in zip(held, before, strict=True):
                p.copy_(value)


def notes(optimizer: torch.optim.Optimizer) -> list[str]:
    """What a user should know about the weights that are measured and saved."""
    if not _averages(optimizer):
        return []
    return ["schedule-free: validation, checks and the saved adapter have the averaged weights; checkpoints have both"]


def finish(optimizer: torch.optim.Optimizer) -> None:
    """Leave the trained tensors as they are to be used, for good."""
    if isinstance(optimizer, Own):
        optimizer.finish()
    elif _averages(optimizer):
        _swap(optimizer, "eval")


def _averages(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it trains at other weights than those to be used: schedule-free ones say so in their groups."""
    return "train_mode" in optimizer.param_groups[0]


def _swap(optimizer: Any, mode: str) -> None:
    getattr(optimizer, mode)()


def _setting(tensors: Tensors, train: Train, steps_per_epoch: int) -> Setting:
    return Setting(
        tensors.trained, train.learning_rate, train.betas, train.seed, tensors.pairs, max(steps_per_epoch, 1)
    )


def _groups(tensors: Tensors, train: Train) -> Groups:
    """Parameters by weight decay, and by learning rate where LoRA+ tells the factors apart (arXiv 2402.12354)."""
    if train.lora_plus is not None and not tensors.pairs:
        raise WeftError(
            "train.lora_plus: this method trains no low-rank pair A, B; set it to null, or use lora or dora"
        )
    ups = {id(pair.up) for pair in tensors.pairs} if train.lora_plus is not None else set()
    made: dict[tuple[float, float], list[nn.Parameter]] = {}
    for each in tensors.trained:
        p = each.parameter
        decay = train.weight_decay if p.ndim >= 2 else 0.0
        made.setdefault((decay, (train.lora_plus or 1.0) if id(p) in ups else 1.0), []).append(p)
    order = sorted(made, key=lambda key: (made[key][0].ndim < 2, key[1]))
    return [{"params": made[key], "weight_decay": key[0], "lr_scale": key[1]} for key in order]


def _check_forward_only(name: str, train: Train) -> None:
    """Refuse what works on gradients of a backward pass."""
    wrong = {
        "clip_norm": (train.clip_norm is not None, "there is no gradient whose norm could be cut: set it to null"),
        "clip_by": (train.clip_by != "all", "there is no gradient whose norm could be cut: set it to all"),
        "allora": (train.allora is not None, "it scales gradients of a backward pass: set it to null"),
        "mixout": (train.mixout > 0, "it masks gradients of a backward pass: set it to 0"),
        "activations": (train.activations != "keep", "no activations are kept without a backward pass: leave it out"),
        "activation_budget": (train.activation_budget is not None, "no activations are kept: set it to null"),
        "offload_activations": (train.offload_activations, "no activations are kept: set it to false"),
        "master_weights": (train.master_weights, "moves the trained tensors themselves: set it to false"),
        "optimizer_in_backward": (train.optimizer_in_backward, "there is no backward pass: set it to false"),
    }
    for key, (is_wrong, why) in wrong.items():
        if is_wrong:
            raise WeftError(f"train.{key}: {name} learns from losses alone, and {why}")


def _check_in_backward(choice: Choice, train: Train) -> None:
    """Refuse what needs more than one tensor and its gradient at a time."""
    if not choice.per_tensor:
        raise WeftError(
            f"train.optimizer_in_backward: {choice.name} steps all tensors together; set it to false, or use an "
            "optimizer that steps each tensor alone, such as adamw, sgd, adafactor or adamw-8bit"
        )
    if train.mixout:
        raise WeftError(
            "train.mixout: it takes weights back to what they were after the backward pass, and "
            "optimizer_in_backward steps them before: set one of the two to its default"
        )


def _name(spec: str | Mapping[str, Any]) -> str:
    return spec if isinstance(spec, str) else str(spec.get("name"))
