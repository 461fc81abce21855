"""The training loop: rows to batches to steps. What is adapted and how never shows here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from weft.data import Batch, Dataset, Position, batches, num_batches
from weft.tune.distributed import num_processes
from weft.tune.packing import packed_attention
from weft.tune.parts import micro_batches
from weft.tune.schedules import learning_rate
from weft.tune.step import Learner, StepResult, train_step

if TYPE_CHECKING:
    from weft.recipe import Train

__all__ = ["Progressed", "Work", "num_steps", "train", "works"]


@dataclass
class Progressed:
    """How far training has come: all that changes from step to step, but for tensors and random states."""

    step: int = 0
    position: Position = field(default_factory=Position)
    num_tokens: int = 0
    seconds: float = 0.0
    best: dict[str, float] = field(default_factory=dict)

    def advance(self, work: Work, result: StepResult, seconds: float) -> None:
        """One step more is done."""
        self.step += 1
        self.position = work.after
        self.num_tokens += result.num_tokens
        self.seconds += seconds


@dataclass(frozen=True)
class Work:
    """What one step is to do: its rows as batches, its learning rate, and the position in the data after it."""

    parts: Sequence[Batch]
    rate: float
    after: Position


def num_steps(train: Train, num_rows: int) -> int:
    """Optimiser steps of a run."""
    if train.steps is not None:
        return train.steps
    return max(1, math.ceil((train.epochs or 1.0) * num_batches(num_rows, train.batch_size * train.accumulate)))


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
    stream = works(dataset, settings, progressed, pad_token=pad_token, packed_from=learner.packed_from)
    learner.model.train()
    with packed_attention(learner.model, learner.packed_from):
        started = time.perf_counter()
        for work in stream:
            result = train_step(learner, work.parts, settings, rate=work.rate, step=progressed.step + 1)
            progressed.advance(work, result, time.perf_counter() - started)
            if not after_step(result):
                return
            started = time.perf_counter()


def works(
    dataset: Dataset, settings: Train, progressed: Progressed, *, pad_token: int, packed_from: int | None = None
) -> Iterator[Work]:
    """The work of every step from where `progressed` stands to the last; whoever does it moves `progressed` on."""
    total = num_steps(settings, len(dataset))
    stream = _rows(dataset, settings, progressed.position)
    while progressed.step < total:
        rows, position = next(stream)
        rate = learning_rate(
            settings.schedule, progressed.step, num_steps=total, peak=settings.learning_rate, warmup=settings.warmup
        )
        parts = micro_batches(
            [dataset.examples[row] for row in rows],
            size=-(-settings.batch_size // num_processes()),  # a batch is what all processes take at once
            pad_token=pad_token,
            by_length=settings.bucket_by_length,
            packed_from=packed_from,
        )
        yield Work(parts, rate, position)


def _rows(dataset: Dataset, settings: Train, start: Position) -> Iterator[tuple[list[int], Position]]:
    return batches(
        len(dataset),
        batch_size=settings.batch_size * settings.accumulate,
        seed=settings.seed,
        start=start,
        lengths=dataset.lengths if settings.bucket_by_length else None,
    )
