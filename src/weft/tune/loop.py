"""The training loop: rows to batches to steps. What is adapted and how never shows here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weft import objectives
from weft.data import Batch, Dataset, Example, Position, batches, collate, num_batches
from weft.errors import WeftError
from weft.tune.evaluate import autocast, device_of
from weft.tune.schedules import learning_rate

if TYPE_CHECKING:
    from weft.recipe import Train

__all__ = [
    "Diverged",
    "Learner",
    "Progressed",
    "StepResult",
    "make_scaler",
    "micro_batches",
    "num_steps",
    "train",
    "train_step",
]

LossOf = Callable[[Any, Batch], objectives.LossSum]


class Diverged(WeftError, ArithmeticError):
    """The loss is not a number any more."""


@dataclass
class Progressed:
    """How far training has come: all that changes from step to step, but for tensors and random states."""

    step: int = 0
    position: Position = field(default_factory=Position)
    num_tokens: int = 0
    seconds: float = 0.0
    best: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepResult:
    """What one step gives. loss: the mean over its `num_trained` positions."""

    loss: float
    gradient_norm: float
    num_trained: int
    num_tokens: int
    learning_rate: float


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


def num_steps(train: Train, num_rows: int) -> int:
    """Optimiser steps of a run."""
    if train.steps is not None:
        return train.steps
    return max(1, math.ceil((train.epochs or 1.0) * num_batches(num_rows, train.batch_size * train.accumulate)))


def make_scaler(device: torch.device, precision: str | None) -> torch.amp.GradScaler:
    """Loss scaling, which float16 alone needs; a scaler that is off does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")


def micro_batches(examples: Sequence[Example], *, size: int, pad_token: int, by_length: bool = False) -> list[Batch]:
    """The rows of one step in batches of `size`. by_length: short rows together, which changes no sum."""
    rows = sorted(examples, key=lambda example: len(example.input_ids)) if by_length else list(examples)
    return [collate(rows[i : i + size], pad_token=pad_token) for i in range(0, len(rows), size)]


def train(
    learner: Learner,
    dataset: Dataset,
    settings: Train,
    progressed: Progressed,
    *,
    pad_token: int,
    after_step: Callable[[StepResult], bool],
) -> None:
    """Train from where `progressed` stands to the last step, or until `after_step` says False.

    A step's rows are drawn together and then cut into batches, so that batch_size x accumulate alone decides which rows
    a step sees.
    """
    total = num_steps(settings, len(dataset))
    stream = _rows(dataset, settings, progressed.position)
    learner.model.train()
    while progressed.step < total:
        started = time.perf_counter()
        rows, position = next(stream)
        rate = learning_rate(
            settings.schedule, progressed.step, num_steps=total, peak=settings.learning_rate, warmup=settings.warmup
        )
        chosen = [dataset.examples[row] for row in rows]
        parts = micro_batches(
            chosen, size=settings.batch_size, pad_token=pad_token, by_length=settings.bucket_by_length
        )
        result = train_step(learner, parts, settings, rate=rate, step=progressed.step + 1)
        progressed.step += 1
        progressed.position = position
        progressed.num_tokens += result.num_tokens
        progressed.seconds += time.perf_counter() - started
        if not after_step(result):
            return


def train_step(learner: Learner, parts: Sequence[Batch], settings: Train, *, rate: float, step: int) -> StepResult:
    """One optimiser step over all `parts`: the gradient of the mean over all their trained positions together.

    Raises Diverged, before anything is changed, when the loss is not a number.
    """
    device = device_of(learner.model)
    count = sum(part.num_trained for part in parts)
    total = 0.0
    for part in parts:
        with autocast(device, settings.precision):
            loss, number, _ = learner.loss_of(learner.call or learner.model, part.to(device))
        assert number == part.num_trained, f"the loss counted {number} positions where the data has {part.num_trained}"
        learner.scaler.scale(loss / count).backward()
        total += loss.item()
    if not math.isfinite(total):
        learner.optimizer.zero_grad(set_to_none=True)
        raise Diverged(
            f"the loss of step {step} is {total}: lower train.learning_rate, or train in float32 or bfloat16"
        )
    norm = _clip(learner, settings.clip_norm)
    for group in learner.optimizer.param_groups:
        group["lr"] = rate
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    return StepResult(total / count, norm, count, sum(part.num_tokens for part in parts), rate)


def _rows(dataset: Dataset, settings: Train, start: Position) -> Iterator[tuple[list[int], Position]]:
    return batches(
        len(dataset),
        batch_size=settings.batch_size * settings.accumulate,
        seed=settings.seed,
        start=start,
        lengths=dataset.lengths if settings.bucket_by_length else None,
    )


def _clip(learner: Learner, largest: float | None) -> float:
    """The gradient's norm before it is cut to `largest`."""
    learner.scaler.unscale_(learner.optimizer)
    norm = nn.utils.clip_grad_norm_(learner.parameters.values(), math.inf if largest is None else largest)
    return float(norm)
