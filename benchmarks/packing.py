"""Claim: rows packed into one sequence train on more real text per second than padded ones, at equal loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import weft
from benchmarks.common import Claim, claim, llama, paired
from weft import objectives
from weft.data import Batch, Example, epoch_order, load_data
from weft.recipe import Data
from weft.tune.packing import packed_attention, why_not_packed
from weft.tune.parts import micro_batches

ROWS, STEPS, PAIRS = 16, 1, 5
DATA = Path(__file__).resolve().parent.parent / "examples" / "data"


def run() -> list[Claim]:
    """Real lengths (functions and their first lines), one batch of 16 rows, forward and backward of a LoRA."""
    model, tokenizer = weft.load_base("pico")
    rows = load_data(Data(train=str(DATA / "docstrings/train.jsonl")), tokenizer).train.examples
    pairs = load_data(Data(train=str(DATA / "preferences/train.jsonl")), tokenizer, task="preference").train.examples
    wide = llama(hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8, vocab_size=4096)
    for each in (model, wide):
        weft.attach(each, weft.LoRA(rank=8), "all-linear", name="a")
    drawn, alike = _steps(rows, lengths=None), _steps(rows, lengths=[len(row.input_ids) for row in rows])
    few = [step[: ROWS // 2] for step in _steps(pairs, lengths=None)]
    return [
        _claim("packed rows against padded ones, pico", model, drawn, 0.5, "padded"),
        _claim("packed rows against padded ones, hidden 512 x 4", wide, drawn, 0.5, "padded"),
        # next to no padding is left there: packing must not cost anything
        _claim("packed rows against padded ones of similar length, pico", model, alike, 1.1, "bucketed by length"),
        _claim("packed pairs against padded ones, pico", model, few, 0.5, "padded, each prompt twice", "preference"),
    ]


def _steps(rows: Sequence[Example], lengths: Sequence[int] | None) -> list[list[Example]]:
    """The rows of the first step of an epoch; with lengths, a step of rows of similar length."""
    order = epoch_order(len(rows), seed=0, epoch=0, batch_size=ROWS, lengths=lengths)
    return [[rows[i] for i in order[step * ROWS : (step + 1) * ROWS]] for step in range(STEPS)]


def _claim(
    name: str, model: Any, steps: list[list[Example]], target: float, what: str, task: str = "causal-lm"
) -> Claim:
    why = why_not_packed(model, longest=512, causal=True)
    assert why is None, why
    packed, padded = (_step(model, task, _parts(steps, packed=packed)) for packed in (True, False))
    with packed_attention(model):
        assert abs(packed() - padded()) < 1e-5 * abs(padded()), "the losses differ"
        ours, theirs = paired(packed, padded, pairs=PAIRS)
    measured = claim(name, ours, theirs, target=target, what=what)
    tokens = sum(len(row.input_ids) for step in steps for row in step)
    speeds = [tokens / sorted(times)[len(times) // 2] for times in (ours, theirs)]
    return replace(measured, detail=f"{speeds[0]:,.0f} against {speeds[1]:,.0f} real tokens/s ({what})")


def _parts(steps: list[list[Example]], *, packed: bool) -> list[Batch]:
    return [
        part
        for rows in steps
        for part in micro_batches(rows, size=ROWS, pad_token=0, packed_from=0 if packed else None)
    ]


def _step(model: Any, task: str, parts: list[Batch]) -> Callable[[], float]:
    loss_of, _ = objectives.chunked_loss_of(task, model)
    trained = weft.parameters(model)

    def step() -> float:
        total = 0.0
        for part in parts:
            loss, _, _ = loss_of(model, part)
            torch.autograd.grad(loss, trained)
            total += loss.item()
        return total

    return step
