"""The rates of this machine, proved on real training steps: what a step takes beyond its operations."""

from __future__ import annotations

import time
from array import array
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch

from weft.attach import attach_plan, use
from weft.base import load_base
from weft.data import IGNORED, Dataset, Example, Splits
from weft.data.detect import Layout
from weft.data.lint import LintReport
from weft.plan.cache import read_json, write_json
from weft.plan.calibration import Rates, machine_key, measure
from weft.plan.speed import num_calls, step_seconds
from weft.recipe import Recipe
from weft.targets import resolve
from weft.tune.evaluate import pad_token
from weft.tune.learn import leave, make_learner, without_cache
from weft.tune.parts import micro_batches
from weft.tune.session import Session
from weft.tune.skeleton import skeleton
from weft.tune.step import train_step
from weft.tune.tasks import TASKS

__all__ = ["calibrated"]

_FILE = "machine.json"
_SMALL, _LARGE = (1, 8), (2, 384)  # rows and tokens of a step that is all overhead, and of one that is all work


def calibrated(device: torch.device, *, recalibrate: bool = False) -> Rates:
    """The rates of this machine: remembered, or measured now, which takes a few seconds."""
    known, key = read_json(_FILE), machine_key(device)
    if key in known and not recalibrate:
        return Rates(**known[key])
    found = _proved(measure(device), device)
    write_json(_FILE, {**known, key: asdict(found)})
    return found


def _proved(rates: Rates, device: torch.device) -> Rates:
    """The rates with the overhead of a call, and then the scale of a whole step, as real steps show them."""
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
    session = Session(recipe, plan.name, bones.session.folder, model, tokenizer, splits, None, TASKS["causal-lm"], plan)
    found = {}
    for shape in (_SMALL, _LARGE):
        examples = _made(*shape).train.examples
        (batch,) = micro_batches(examples, size=shape[0], pad_token=pad_token(tokenizer))
        found[shape] = _real_seconds(session, batch), bones.trace(batch, held=False)
    real, trace = found[_SMALL]
    calls = num_calls(trace, bones.depth.extra)
    work = step_seconds(trace, bones.depth.extra, replace(rates, call_seconds=0.0))[0]
    rates = replace(rates, call_seconds=max((real - work) / calls, rates.call_seconds))
    real, trace = found[_LARGE]
    return replace(rates, scale=real / step_seconds(trace, bones.depth.extra, rates)[0])


def _real_seconds(session: Session, batch: Any) -> float:
    """The seconds of a step, once it has settled."""
    learner = make_learner(session)
    times = []
    session.model.train()
    try:
        with without_cache(session.model):
            for _ in range(5):
                started = time.perf_counter()
                train_step(learner, [batch], session.recipe.train, rate=1e-9, step=1)
                times.append(time.perf_counter() - started)
    finally:
        leave(learner)
    return median(times[1:])


def _made(rows: int, tokens: int) -> Splits:
    """Rows of so many tokens, all of them trained."""
    ids = array("i", [(7 * i + 5) % 4000 for i in range(tokens)])
    labels = array("i", [IGNORED, *ids[1:]])
    examples = tuple(Example(ids, labels, "made", i) for i in range(rows))
    report = LintReport("train", rows, rows, rows, rows * tokens, rows * (tokens - 1), tokens)
    return Splits(Dataset(examples, report), None, None, Layout("text", {}), (), tokens)
