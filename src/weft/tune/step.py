"""One optimiser step: the gradient of a mean over all its parts, and the update. No method is named here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weft import objectives
from weft.compress import Code
from weft.core.adapter import Adapter
from weft.core.held import made_once
from weft.core.penalty import weighted
from weft.data import Batch
from weft.errors import WeftError
from weft.tune.compiled import Compilations
from weft.tune.evaluate import autocast, device_of
from weft.tune.masters import in_float32
from weft.tune.offload import offloading

if TYPE_CHECKING:
    from weft.recipe import Train
    from weft.tune.evolve import Evolution

__all__ = [
    "Diverged",
    "Learner",
    "LossOf",
    "StepResult",
    "backpropagate",
    "make_scaler",
    "train_step",
    "update_all",
    "wishes",
]

LossOf = Callable[[Any, Batch], objectives.LossSum]


class Diverged(WeftError, ArithmeticError):
    """The loss is not a number any more."""


@dataclass(frozen=True)
class StepResult:
    """What one step gives. loss: the mean over its `num_trained` positions."""

    loss: float
    gradient_norm: float
    num_trained: int
    num_tokens: int
    learning_rate: float


def backpropagate(learner: Learner, parts: Sequence[Batch], settings: Train) -> float:
    """Leave in every trained tensor the gradient of the mean loss over all `parts` together; the summed loss."""
    if len(parts) > 1:
        with made_once(learner.adapters):
            return _backpropagate(learner, parts, settings)
    return _backpropagate(learner, parts, settings)


def _backpropagate(learner: Learner, parts: Sequence[Batch], settings: Train) -> float:
    device = device_of(learner.model)
    count, total = sum(part.num_trained for part in parts), 0.0
    for part in parts:
        kept = offloading(device) if settings.offload_activations else nullcontext()
        with autocast(device, settings.precision), kept:
            loss, number, _ = learner.loss_of(learner.called, part.to(device))
        assert number == part.num_trained, f"the loss counted {number} positions where the data has {part.num_trained}"
        if settings.optimizer_in_backward and not math.isfinite(loss.item()):
            return loss.item()  # the backward would step
        mean = loss / count
        if part is parts[-1]:  # once per step, and not in a backward of its own: a tensor may be stepped in each
            mean = sum(wishes(learner.adapters), start=mean)
        with weighted(learner.scaler.get_scale() / len(parts)):
            learner.scaler.scale(mean).backward()
        total += loss.item()
    return total


def wishes(adapters: Sequence[Adapter]) -> list[torch.Tensor]:
    """What methods minimise of their own tensors, beside the loss of the data."""
    return [wish for adapter in adapters if (wish := adapter.penalty()) is not None]


def update_all(learner: Learner, settings: Train) -> float:
    """Clip all gradients and step all tensors; the norm of the gradient before it was clipped."""
    with in_float32(learner.optimizer) if settings.master_weights else nullcontext():
        norm = _clip(learner, settings.clip_norm)
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
    return norm


@dataclass
class Learner:
    """What learns: the model, its trained tensors by name, and the optimiser that was given them."""

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loss_of: LossOf
    call: Any = None
    """The model as steps call it: compiled, or the model itself."""
    gradient: Callable[[Learner, Sequence[Batch], Train], float] = backpropagate
    """How a step gets its gradient: by the backward pass, or by an estimate that needs none."""
    update: Callable[[Learner, Train], float] = update_all
    """What a step does with its gradient, whose norm it gives."""
    components: Sequence[Sequence[nn.Parameter]] | None = None
    """Tensors whose norm is clipped together; None: all of them."""
    adapters: Sequence[Adapter] = ()
    """Those that train: their coefficients are made once per step, however many batches it has."""
    packed_from: int | None = None
    """The first position of packed rows; None: rows are padded."""
    hooks: Sequence[Any] = ()
    """What was put on tensors for the time of training; `remove` takes it off."""
    before: Sequence[Callable[[int], None]] = ()
    """What happens before a step, given its number, counted from 1."""
    evolution: Evolution | None = None
    """Methods that change their own tensors when a step is done."""
    after: Sequence[Callable[[int], None]] = ()
    """What else happens after a step, given its number, before it is validated or kept."""
    notes: Sequence[str] = ()
    """What a user should know about how this learns."""
    codes: Callable[[], Mapping[str, Code]] | None = None
    """What the trained tensors are written as, by name, where they are learnt in few bits."""
    compiled: Compilations | None = None
    """Counts compilations, where the model is compiled."""

    @property
    def called(self) -> Any:
        """What a batch goes through: `call`, or the model itself where there is none."""
        return self.model if self.call is None else self.call  # not `or`: a compiled model has a length, or none


def make_scaler(device: torch.device, precision: str | None) -> torch.amp.GradScaler:
    """Loss scaling, which float16 alone needs; a scaler that is off does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")


def train_step(learner: Learner, parts: Sequence[Batch], settings: Train, *, rate: float, step: int) -> StepResult:
    """One optimiser step over all `parts`: the gradient of the mean over all their trained positions together.

    Raises Diverged, before anything is changed, when the loss is not a number.
    """
    count = sum(part.num_trained for part in parts)
    for group in learner.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    for act in learner.before:
        act(step)
    total = learner.gradient(learner, parts, settings)
    if not math.isfinite(total):
        learner.optimizer.zero_grad(set_to_none=True)
        raise Diverged(
            f"the loss of step {step} is {total}: lower train.learning_rate, or train in float32 or bfloat16"
        )
    norm = learner.update(learner, settings)
    if learner.evolution is not None:
        learner.evolution(step)
    learner.optimizer.zero_grad(set_to_none=True)
    for adapter in learner.adapters:  # optimisers write behind the version counter, and compiled steps forget nothing
        adapter.forget()
    return StepResult(total / count, norm, count, sum(part.num_tokens for part in parts), rate)


def _clip(learner: Learner, largest: float | None) -> float:
    """The gradient's norm before it is cut to `largest`, all of it or each component for itself."""
    learner.scaler.unscale_(learner.optimizer)
    whole = [*learner.parameters.values()]
    if largest is None or not learner.components:
        return float(nn.utils.clip_grad_norm_(whole, math.inf if largest is None else largest))
    norm = float(nn.utils.clip_grad_norm_(whole, math.inf))
    for component in learner.components:
        nn.utils.clip_grad_norm_(component, largest)
    return norm
