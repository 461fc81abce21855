"""Claim: combining three LoRA adapters takes a twentieth of the time of PEFT's add_weighted_adapter."""

from __future__ import annotations

import copy
import time
import warnings
from functools import partial
from typing import Any

import torch

import weft
from benchmarks.common import LINEARS, Claim, claim, llama
from weft.combining import rule_of

NAMES = ("a", "b", "c")
WEIGHTS = (0.5, 0.3, 0.2)
RANK = 8
ROUNDS = 3
# PEFT's combination type and options; what gives the same kind of result here
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any], dict[str, Any]]] = {
    "linear": ({"combination_type": "linear"}, "task_arithmetic", {}, {}),
    "cat": ({"combination_type": "cat"}, "task_arithmetic", {}, {}),
    "svd": ({"combination_type": "svd", "svd_rank": RANK}, "task_arithmetic", {}, {"rank": RANK}),
    "ties": ({"combination_type": "ties", "density": 0.5}, "ties", {"density": 0.5}, {"rank": RANK}),
    "ties_svd": (
        {"combination_type": "ties_svd", "density": 0.5, "svd_rank": RANK}, "ties", {"density": 0.5}, {"rank": RANK},
    ),
}  # fmt: skip


def run() -> list[Claim]:
    """Both sides on the same base and adapters of 168 modules, in turns."""
    base = llama()
    ours, theirs = _ours(copy.deepcopy(base)), _theirs(base)
    claims = []
    for name, (their_options, rule, options, how) in CASES.items():
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(ROUNDS + 1):
            sides = [(0, partial(_combine, ours, rule, options, how)), (1, partial(_weighted, theirs, their_options))]
            for side, act in sides[:: 1 if turn % 2 else -1]:
                seconds = act()
                if turn:  # the first turn warms up
                    times[side].append(seconds)
        claims.append(claim(f"{name} of 3 adapters on 168 modules", *times, target=0.05))
    return claims


def _combine(model: Any, rule: str, options: dict[str, Any], how: dict[str, Any]) -> float:
    started = time.perf_counter()
    weft.combine(model, dict(zip(NAMES, WEIGHTS, strict=True)), rule_of(rule, options), name="both", **how)
    seconds = time.perf_counter() - started
    weft.detach(model, "both")
    return seconds


def _weighted(model: Any, options: dict[str, Any]) -> float:
    started = time.perf_counter()
    model.add_weighted_adapter([*NAMES], [*WEIGHTS], "both", **options)
    seconds = time.perf_counter() - started
    model.delete_adapter("both")
    return seconds


def _ours(model: Any) -> Any:
    for seed, name in enumerate(NAMES):
        weft.attach(model, weft.LoRA(rank=RANK, alpha=16), LINEARS, name=name, seed=seed)
    _spread(weft.parameters(model))
    return model


def _theirs(model: Any) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=LINEARS)
        found = peft.get_peft_model(model, config, adapter_name=NAMES[0])
        for name in NAMES[1:]:
            found.add_adapter(name, config)
    _spread([p for name, p in found.named_parameters() if "lora_" in name])
    return found


@torch.no_grad()
def _spread(parameters: Any) -> None:
    """Stand-ins for training: no factor is zero."""
    draw = torch.Generator().manual_seed(0)
    for p in parameters:
        p.copy_(0.02 * torch.randn(p.shape, generator=draw))


if __name__ == "__main__":
    for found in run():
        print(f"{found.name}: {found.ratio:.3f} ({found.low:.3f} to {found.high:.3f}), {found.detail}")
