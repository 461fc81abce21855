"""Claim: loading 50 adapters takes at most 0.02 of PEFT's time and grows linearly; switching among them under 2 ms."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Literal

import peft
import torch

import weft
from benchmarks.common import LINEARS, Claim, absolute, claim, llama

COUNT = 50


def run() -> list[Claim]:
    with tempfile.TemporaryDirectory() as folder:
        place, native = _adapter(Path(folder) / "a", "peft"), _adapter(Path(folder) / "b", "weft")
        model, times = _load_weft(place)
        own = _load_weft(native)[1]
        theirs = _load_peft(place)
    grown = statistics.mean(times[-5:]) / statistics.mean(times[1:6])
    return [
        claim(f"load {COUNT} PEFT folders", [sum(times)], [sum(theirs)], target=0.02, what="PEFT load_adapter"),
        claim(f"load {COUNT} native folders", [sum(own)], [sum(theirs)], target=0.02, what="PEFT load_adapter"),
        Claim(
            "the last five loads against the first five", grown, grown, grown, 1.5,
            f"PEFT: {statistics.mean(theirs[-5:]) / statistics.mean(theirs[1:6]):.1f}",
        ),
        absolute(f"switch among {COUNT} adapters", _switch(model), target_seconds=2e-3, what="weft.use"),
    ]  # fmt: skip


def _adapter(place: Path, layout: Literal["peft", "weft"]) -> Path:
    """One adapter in PEFT's layout, which both read, or in Weft's own."""
    model = llama()
    weft.attach(model, weft.LoRA(rank=8), LINEARS, name="a")
    for p in weft.parameters(model):
        torch.nn.init.normal_(p, std=0.02)
    return weft.save(model, place, "a", format=layout)


def _load_weft(place: Path) -> tuple[torch.nn.Module, list[float]]:
    model, times = llama(), []
    for i in range(COUNT):
        start = time.perf_counter()
        weft.load(model, place, f"a{i}")
        times.append(time.perf_counter() - start)
    return model, times


def _load_peft(place: Path) -> list[float]:
    start = time.perf_counter()
    model = peft.PeftModel.from_pretrained(llama(), place, adapter_name="a0")
    times = [time.perf_counter() - start]
    for i in range(1, COUNT):
        start = time.perf_counter()
        model.load_adapter(place, f"a{i}")
        times.append(time.perf_counter() - start)
    return times


def _switch(model: torch.nn.Module) -> list[float]:
    times = []
    for i in range(200):
        start = time.perf_counter()
        weft.use(model, f"a{i % COUNT}")
        times.append(time.perf_counter() - start)
    return times
