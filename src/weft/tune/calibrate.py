"""The rates of this machine, proved on real training steps, and when those that are kept are not to be trusted."""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from statistics import median
from typing import Any

import torch

from weft.attach import attach_plan, use
from weft.base import load_base
from weft.data import IGNORED, Batch, Dataset, Example, Splits
from weft.data.detect import Layout
from weft.data.lint import LintReport
from weft.plan.cache import read_json, read_records, write_json
from weft.plan.calibration import Rates, machine_key, measure
from weft.plan.history import doubt
from weft.plan.load import LoadMeter
from weft.plan.speed import step_seconds
from weft.plan.trace import Trace
from weft.recipe import Recipe
from weft.targets import resolve
from weft.tune.evaluate import pad_token
from weft.tune.learn import leave, make_learner, without_cache
from weft.tune.parts import micro_batches
from weft.tune.session import Session
from weft.tune.skeleton import Skeleton, skeleton
from weft.tune.step import train_step
from weft.tune.tasks import TASKS

__all__ = ["calibrated", "reference_seconds", "settled_seconds"]

_FILE = "machine.json"
_SMALL, _LARGE = (1, 8), (2, 384)  # rows and tokens of a step that is all overhead, and of one that is all work
_LEAST_SCALE = 0.2  # where disturbed steps would say less

Step = tuple[float, Trace, Mapping[int, int]]
"""The real seconds of a step, its trace, and how many more layers a traced one stands for."""

_BUSY = 0.05  # share of the time: more, and what was measured is not kept as if the machine had been quiet
_LOOK_SECONDS = 0.2
_CALM_STEPS, _MOST_STEPS = 4, 10
_OWN = 0.95  # of a step's time the main thread was on a processor: nothing came between


def calibrated(device: torch.device, *, recalibrate: bool = False) -> Rates:
    """The rates of this machine: remembered, or measured now, which takes a few seconds.

    They are measured again where the last ones were measured while other processes ran and these have stopped, and
    where the last run that went by them took much more or much less time than they said.
    """
    known, key = read_json(_FILE), machine_key(device)
    kept = _kept(known.get(key))
    notes: list[str] = []
    off = None
    if kept is not None and not recalibrate:
        off = doubt(read_records(), machine=key, calibrated=kept.measured)
        if off is not None:
            notes = [f"the last run took {off:.1f} x its forecast time: the machine's speed was measured anew"]
        elif not kept.busy:
            return kept
        elif _busy_now():
            return replace(kept, notes=(_said(kept),))
    meter = LoadMeter(torch.get_num_threads())
    found = measure(device)
    if meter.load().share > _BUSY:
        found = found.fastest(measure(device))
    found = _proved(found, device)
    load = meter.load()
    busy = str(load) if load.share > _BUSY else ""
    found = replace(found, busy=busy, measured=datetime.now(UTC).isoformat(timespec="seconds"))
    if busy:
        notes.append(_said(found))
        if kept is not None and kept.reference_seconds < found.reference_seconds and (kept.busy or off is None):
            found = replace(kept, measured=found.measured if kept.busy else kept.measured)  # the less disturbed one
            notes[-1] += "; the speed from before is kept"
    stored = asdict(found)
    stored.pop("notes")
    write_json(_FILE, {**known, key: stored})
    return replace(found, notes=tuple(notes))


def _kept(stored: Any) -> Rates | None:
    """Rates of the cache; None for none, and for what another version wrote."""
    try:
        return None if stored is None else Rates(**stored)
    except TypeError:
        return None


def _said(rates: Rates) -> str:
    return (
        f"the machine was busy while its speed was measured ({rates.busy}), so the forecast of time is rough until it "
        "is measured again without them"
    )


def _busy_now() -> bool:
    meter = LoadMeter(torch.get_num_threads())
    time.sleep(_LOOK_SECONDS)
    return meter.load().share > _BUSY


def _proved(rates: Rates, device: torch.device) -> Rates:
    """The rates with the overhead of a call, and then the scale of a whole step, as real steps show them."""
    session, bones = _reference(device)
    found = []
    for shape in (_SMALL, _LARGE):
        batch = _batch(session, shape)
        found.append((_real_seconds(session, batch), bones.trace(batch, held=False), bones.depth.extra))
    return _solved(rates, *found)


def reference_seconds(device: torch.device) -> float:
    """Seconds of the step by which the speed of a machine at two moments can be compared (`Rates` has it too)."""
    session, _ = _reference(device)
    return _real_seconds(session, _batch(session, _LARGE))


def _reference(device: torch.device) -> tuple[Session, Skeleton]:
    """A LoRA on pico, and what is known of it without it."""
    recipe = Recipe.model_validate(
        {"data": {"train": "-"}, "train": {"packing": False, "batch_size": 1, "steps": 1}, "method": {"name": "lora"}}
    )
    model, tokenizer = load_base("pico", dtype="float32")
    model.to(device)
    splits = _made(*_SMALL)
    bones = skeleton(recipe, tokenizer, splits)
    plan = resolve(model, bones.plan.method, None, name=bones.plan.name)
    attach_plan(model, plan, statistics={})
    use(model, plan.name)
    task = TASKS["causal-lm"]
    return Session(recipe, plan.name, bones.session.folder, model, tokenizer, splits, None, task, plan), bones


def _batch(session: Session, shape: tuple[int, int]) -> Batch:
    (batch,) = micro_batches(_made(*shape).train.examples, size=shape[0], pad_token=pad_token(session.tokenizer))
    return batch


def _solved(rates: Rates, small: Step, large: Step) -> Rates:
    """The overhead of a call and the scale of work that give two steps their real times."""
    (calls, work), (more_calls, more_work) = (
        [step_seconds(trace, extra, replace(rates, call_seconds=call, scale=1 - call))[0] for call in (1.0, 0.0)]
        for _, trace, extra in (small, large)
    )
    scale = (large[0] * calls - small[0] * more_calls) / (more_work * calls - work * more_calls)
    call = max((small[0] - scale * work) / calls, rates.call_seconds)
    scale = max((large[0] - call * more_calls) / more_work, _LEAST_SCALE)
    return replace(rates, call_seconds=call, scale=scale, reference_seconds=large[0])


def _real_seconds(session: Session, batch: Any) -> float:
    """The seconds of a step, once it has settled."""
    learner = make_learner(session)
    times: list[tuple[float, float]] = []
    session.model.train()
    try:
        with without_cache(session.model):
            while len(times) < _MOST_STEPS and len(_calm(times)) < _CALM_STEPS + 1:
                started, own = time.perf_counter(), time.thread_time()
                train_step(learner, [batch], session.recipe.train, rate=1e-9, step=1)
                wall, own = time.perf_counter() - started, time.thread_time() - own
                times.append((wall, wall if session.device.type == "cuda" else own))
    finally:
        leave(learner)
    return settled_seconds(times[1:])


def settled_seconds(times: Sequence[tuple[float, float]]) -> float:
    """Of (seconds, the main thread's own seconds) of steps: the median of those that nothing came between.

    Where something always does, the least time of its own that the main thread took: it does its share of the work and
    waits for the others by turning round, so that is what the step takes without the rest.
    """
    calm = _calm(times)
    return median(calm) if len(calm) > 1 else min(own for _, own in times)


def _calm(times: Sequence[tuple[float, float]]) -> list[float]:
    return [wall for wall, own in times if own > _OWN * wall]


def _made(rows: int, tokens: int) -> Splits:
    """Rows of so many tokens, all of them trained."""
    ids = array("i", [(7 * i + 5) % 4000 for i in range(tokens)])
    labels = array("i", [IGNORED, *ids[1:]])
    examples = tuple(Example(ids, labels, "made", i) for i in range(rows))
    report = LintReport("train", rows, rows, rows, rows * tokens, rows * (tokens - 1), tokens)
    return Splits(Dataset(examples, report), None, None, Layout("text", {}), (), tokens)
