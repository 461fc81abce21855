"""What every benchmark shares: interleaved timing with paired ratios, the models, and the result it writes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Claim:
    """One measured number: what is claimed, what came out, and whether it holds.

    ratio: median of the paired ratios ours / theirs; low, high: their quartiles. target: at most this much.
    """

    name: str
    ratio: float
    low: float
    high: float
    target: float
    detail: str

    @property
    def holds(self) -> bool:
        return self.ratio <= self.target

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "holds": self.holds}


def paired(
    ours: Callable[[], Any], theirs: Callable[[], Any], *, pairs: int, warmup: int = 1
) -> tuple[list[float], list[float]]:
    """Seconds of each side, measured in turn (A B, B A, A B, ...) so that a slow moment of the machine hits both."""
    for _ in range(warmup):
        ours()
        theirs()
    first, second = [], []
    gc.disable()
    try:
        for i in range(pairs):
            sides = [(ours, first), (theirs, second)]
            for run, times in sides if i % 2 == 0 else sides[::-1]:
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            gc.collect()
    finally:
        gc.enable()
    return first, second


def claim(name: str, ours: list[float], theirs: list[float], *, target: float, what: str = "PEFT") -> Claim:
    """The claim that `ours` takes at most `target` times `theirs`."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    detail = f"{_seconds(statistics.median(ours))} against {_seconds(statistics.median(theirs))} ({what})"
    return Claim(name, statistics.median([middle]), low, high, target, detail)


def absolute(name: str, times: list[float], *, target_seconds: float, what: str) -> Claim:
    """The claim that something takes at most so many seconds."""
    ratios = [t / target_seconds for t in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Claim(name, middle, low, high, 1.0, f"{_seconds(statistics.median(times))}, {what}")


def llama(**changes: Any) -> LlamaForCausalLM:
    """A random Llama in float32; the default is 24 layers of width 256 with 168 linear layers to adapt."""
    shape: Mapping[str, Any] = {
        "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 24,
        "num_attention_heads": 4, "max_position_embeddings": 512,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).eval()


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _seconds(value: float) -> str:
    return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"
