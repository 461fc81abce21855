"""Claim: attaching LoRA to a 24-layer model takes at most 0.15 of PEFT's `get_peft_model`."""

from __future__ import annotations

import peft

import weft
from benchmarks.common import LINEARS, Claim, claim, llama, paired


def run() -> list[Claim]:
    ours, theirs = llama(), llama()

    def attach() -> None:
        weft.attach(ours, weft.LoRA(rank=8), LINEARS, name="a")
        weft.detach(ours)

    def wrap() -> None:
        config = peft.LoraConfig(r=8, target_modules=LINEARS)
        peft.get_peft_model(theirs, config).unload()

    with_inverse = paired(attach, wrap, pairs=9)
    first, second = _forward_only(ours, theirs)
    return [
        claim("attach LoRA at 168 linears", first, second, target=0.15, what="get_peft_model"),
        claim("attach and detach", *with_inverse, target=0.15, what="get_peft_model and unload"),
    ]


def _forward_only(ours, theirs) -> tuple[list[float], list[float]]:
    """The act alone, its undoing left out of the time."""
    import time

    first, second = [], []
    for i in range(9):
        for side in ("ours", "theirs") if i % 2 == 0 else ("theirs", "ours"):
            start = time.perf_counter()
            if side == "ours":
                weft.attach(ours, weft.LoRA(rank=8), LINEARS, name="a")
                first.append(time.perf_counter() - start)
                weft.detach(ours)
            else:
                wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=8, target_modules=LINEARS))
                second.append(time.perf_counter() - start)
                wrapped.unload()
    return first, second
