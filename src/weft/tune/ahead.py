"""`plan`: what a recipe will take, before anything of it is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from weft.base import find_base
from weft.data import Batch, Splits, load_data
from weft.plan.allocator import ALLOCATOR_NOTE, kept_share
from weft.plan.cache import read_records
from weft.plan.calibration import Rates, machine_key
from weft.plan.forecast import Forecast
from weft.plan.history import correct
from weft.plan.memory import Memory, peak
from weft.plan.speed import flops, step_seconds
from weft.plan.trace import Trace
from weft.recipe import Recipe, load_recipe
from weft.recipe.sizes import parse_bytes
from weft.tune.calibrate import calibrated
from weft.tune.evaluate import pad_token
from weft.tune.hints import law_hints
from weft.tune.loop import Progressed, num_steps, works
from weft.tune.session import Session, threads
from weft.tune.skeleton import Skeleton, skeleton

__all__ = ["foresee", "foresee_memory", "foresee_steps", "largest_and_first", "plan", "sampled"]

_SAMPLE_ROWS = 1000  # of a larger file the first so many say how long its rows are
_SAMPLE_STEPS = 200
_LIBRARIES = 37_000_000  # what a training process holds beside tensors: code, thread stacks, buffers of MKL
_BITSANDBYTES = 44_000_000  # what importing and using that library adds


def plan(recipe: Recipe | str | Path, *, price: float | None = None, recalibrate: bool = False) -> Forecast:
    """Forecast the peak memory, the time, the disk and the trained parameters of a recipe on this machine.

    Nothing is allocated for the model: a training step is run on tensors without numbers, and each operation of it is
    counted. price: of an hour of this machine, for the cost of the run. recalibrate: measure this machine anew.
    Raises what `tune` would raise for a recipe that cannot be used.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    tokenizer, splits, share = sampled(recipe)
    return foresee(recipe, tokenizer, splits, share=share, price=price, recalibrate=recalibrate)


def sampled(recipe: Recipe) -> tuple[Any, Splits, float]:
    """The tokenizer, the training rows or the first of them, and how many times as many there are in all."""
    import transformers

    from weft.plan.data import count_rows

    place = find_base(recipe.base.model)
    revision = recipe.base.revision or "main"
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, revision=revision)
    config = transformers.AutoConfig.from_pretrained(place, revision=revision)
    total = count_rows(recipe.data.train)
    limit = min(n for n in (recipe.data.limit, _SAMPLE_ROWS, total) if n is not None)
    few = recipe.data.model_copy(update={"limit": limit, "validation": None, "test": None})
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    splits = load_data(few, tokenizer, task=recipe.task, context=context)
    used = min(n for n in (recipe.data.limit, total, 10**18) if n is not None)
    return tokenizer, splits, max(used / limit, 1.0) if total is not None else 1.0


def foresee(
    recipe: Recipe, tokenizer: Any, splits: Splits, *, share: float = 1.0, price: float | None = None,
    recalibrate: bool = False,
) -> Forecast:  # fmt: skip
    """The forecast for data that is tokenised already. share: how many times as many rows there are in all."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with threads(recipe.train.threads):
        rates = calibrated(device, recalibrate=recalibrate)
        bones = skeleton(recipe, tokenizer, splits)
        steps = _steps(bones.session)
        worst, traces = _traced(bones, steps)
        seconds = _seconds(bones, steps, traces, rates)
        key = machine_key(device)
    memory = _memory(bones, worst, traces[0][1], device)
    rows = round(len(splits.train) * share)
    settings, total = recipe.train, num_steps(recipe.train, rows)
    tokens = sum(part.num_tokens for parts in steps for part in parts) / len(steps)
    facts = _facts(bones, worst, key, rates)
    correction = correct(facts, read_records())
    adapters = memory.adapters
    notes = [*rates.notes, *([bones.session.rows] if bones.session.rows else [])]
    notes += law_hints(recipe, num_parameters=bones.num_body, tokens_per_step=tokens, num_steps=total)
    notes += [ALLOCATOR_NOTE] if memory.allocator and not correction.num_runs else []
    if share > 1:
        notes.append(f"data: {len(splits.train):,} of about {rows:,} rows were read")
    return Forecast(
        memory=memory,
        seconds=seconds * total * correction.time,
        num_steps=total,
        tokens_per_second=tokens / max(seconds * correction.time, 1e-9),
        num_trained=bones.plan.num_parameters,
        num_frozen=facts["num_frozen"],
        disk_bytes=(adapters + memory.optimizer) * (settings.keep_checkpoints + 1) + adapters,
        tokens=worst.input_ids.numel(),
        flops_per_step=flops(traces[0][1], bones.depth.extra),
        correction=correction,
        facts=facts,
        notes=tuple(notes),
        price=price,
    )


def largest_and_first(session: Session, count: int) -> tuple[list[Batch], list[list[Batch]]]:
    """The batches of the run's largest step, and of its first steps: what a forecast is proved on."""
    steps = [[*parts] for parts in _steps(session)]
    return max(steps, key=lambda parts: max(map(_size, parts))), steps[:count]


def foresee_steps(recipe: Recipe, count: int) -> tuple[int, float]:
    """The peak of a run in bytes, and the seconds of its first steps, before any correction."""
    tokenizer, splits, _ = sampled(recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = calibrated(device)
    bones = skeleton(recipe, tokenizer, splits)
    steps = _steps(bones.session)
    worst, traces = _traced(bones, steps)
    seconds = _seconds(bones, steps[:count], traces, rates) * min(count, len(steps))
    return _memory(bones, worst, traces[0][1], device).total, seconds


def foresee_memory(recipe: Recipe, tokenizer: Any, splits: Splits) -> Memory:
    """The peak of a training step for data that is tokenised already; no speed is measured for it."""
    bones = skeleton(recipe, tokenizer, splits)
    worst, traces = _traced(bones, _steps(bones.session))
    return _memory(bones, worst, traces[0][1], torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _steps(session: Session) -> list[Sequence[Batch]]:
    """The batches of the first steps of the run."""
    done, found = Progressed(), []
    data, settings = session.splits.train, session.recipe.train
    stream = works(data, settings, done, pad_token=pad_token(session.tokenizer), packed_from=session.packed_from)
    for work in islice(stream, _SAMPLE_STEPS):
        done.step, done.position = done.step + 1, work.after
        found.append(work.parts)
    return found


def _size(part: Batch) -> tuple[int, int]:
    return part.input_ids.numel(), part.num_trained


def _traced(bones: Skeleton, steps: Sequence[Sequence[Batch]]) -> tuple[Batch, list[tuple[int, Trace]]]:
    """The largest batch, and the traces of it and of one of middling size, each with its tokens."""
    parts = sorted((p for step in steps for p in step), key=_size)
    worst, middle = parts[-1], parts[len(parts) // 2]
    held = bones.recipe.train.accumulate > 1
    traces = [(worst.input_ids.numel(), bones.trace(worst, held=held))]
    if middle.input_ids.numel() < 0.8 * worst.input_ids.numel():
        traces.append((middle.input_ids.numel(), bones.trace(middle, held=held)))
    return worst, traces


def _seconds(
    bones: Skeleton, steps: Sequence[Sequence[Batch]], traces: Sequence[tuple[int, Trace]], rates: Rates
) -> float:
    """Seconds of a step, on average: on the line through the traced batches, by tokens."""
    if bones.turn is not None:  # layers take turns: not the turn with the highest memory, but a middling one
        bones = skeleton(bones.recipe, bones.session.tokenizer, bones.session.splits, middling=True)
        _, traces = _traced(bones, steps)
    found = [(size, *step_seconds(trace, bones.depth.extra, rates)) for size, trace in traces]
    high, whole, update = found[0]
    low, part, _ = found[-1]
    slope = (whole - part) / (high - low) if high > low else (whole - update) / high
    sizes = [[p.input_ids.numel() for p in parts] for parts in steps]
    each = [sum(max(whole - update + slope * (n - high), 0.1 * whole) for n in step) + update for step in sizes]
    return sum(each) / len(each)


def _memory(bones: Skeleton, worst: Batch, trace: Trace, device: torch.device) -> Memory:
    found = peak(trace, bones.depth.extra)
    budget = bones.recipe.train.activation_budget
    if budget is not None:
        least = _recomputed(bones, worst)
        kept = min(found.activations, max(parse_bytes(budget), least.activations))
        found = replace(found, activations=kept)
    if device.type == "cpu":
        process = _LIBRARIES + (_BITSANDBYTES if bones.recipe.base.quantize in ("nf4", "fp4", "int8") else 0)
        found = replace(found, weights=found.weights - bones.untouched_bytes(), process=process)
        found = replace(found, allocator=round(kept_share() * found.tensors))
    return found


def _recomputed(bones: Skeleton, worst: Batch) -> Memory:
    settings = bones.recipe.train.model_copy(update={"activation_budget": None, "activations": "recompute"})
    other = replace(bones, recipe=bones.recipe.model_copy(update={"train": settings}))
    return peak(other.trace(worst, held=False), bones.depth.extra)


def _facts(bones: Skeleton, worst: Batch, machine: str, rates: Rates) -> dict[str, Any]:
    recipe = bones.recipe
    return {
        "machine": machine,
        "calibrated": rates.measured,
        "reference_seconds": rates.reference_seconds,
        "method": recipe.method["name"],
        "dtype": recipe.train.precision or recipe.base.dtype,
        "quantize": recipe.base.quantize,
        "packed": bones.session.packed_from is not None,
        "activations": recipe.train.activation_budget or recipe.train.activations,
        "allocator": kept_share() > 0,
        "num_frozen": bones.num_frozen,
        "tokens": worst.input_ids.numel(),
    }
