"""Claim: a one-token forward costs at most 1.15 of the base's with one LoRA (PEFT: 1.42), 1.2 with DoRA (PEFT: 4.3)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import peft
import torch

import weft
from benchmarks.common import LINEARS, Claim, claim, llama, paired


def run() -> list[Claim]:
    base, ids = llama(), torch.ones(1, 1, dtype=torch.long)
    claims = []
    for name, method, dora, target in (
        ("LoRA", weft.LoRA(rank=8), False, 1.15),
        ("DoRA", weft.DoRA(rank=8), True, 1.2),
    ):
        ours = llama()
        weft.attach(ours, method, LINEARS, name="a")
        theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=8, use_dora=dora, target_modules=LINEARS)).eval()
        with torch.inference_mode():
            sides = [(partial(m, ids, use_cache=False), partial(base, ids, use_cache=False)) for m in (ours, theirs)]
            mine = claim(f"one-token forward with {name}", *paired(*sides[0], pairs=60, warmup=5), target=target)
            rival = claim("", *paired(*sides[1], pairs=30, warmup=3), target=1.0)
        detail = f"{mine.detail.partition(' (')[0]} of the base; PEFT {rival.ratio:.2f}"
        claims.append(replace(mine, detail=detail))
    return claims
