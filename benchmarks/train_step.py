"""Claim: a LoRA training step is never slower than PEFT's, and stays near the bound of a frozen base."""

from __future__ import annotations

from collections.abc import Callable

import peft
import torch

import weft
from benchmarks.common import LINEARS, Claim, claim, llama, paired


def run() -> list[Claim]:
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 4096}
    ids = torch.randint(0, 4096, (4, 128), generator=torch.Generator().manual_seed(0))
    ours, theirs, frozen = llama(**shape).train(), llama(**shape).train(), llama(**shape).train()
    weft.attach(ours, weft.LoRA(rank=8), LINEARS, name="a")
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=8, target_modules=LINEARS))
    frozen.requires_grad_(False)
    ours_step, theirs_step = _step(ours, ids), _step(theirs, ids)
    bound = _bound(frozen, ids)
    return [
        claim("LoRA training step", *paired(ours_step, theirs_step, pairs=15), target=1.0, what="PEFT"),
        claim(
            "LoRA training step against the bound", *paired(ours_step, bound, pairs=9), target=1.17, what="frozen base"
        ),
    ]


def _step(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def _bound(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """Forward and backward through all activations with every weight frozen: what no method can be below."""

    def step() -> None:
        inputs = model.get_input_embeddings()(ids).requires_grad_()
        model(inputs_embeds=inputs, labels=ids, use_cache=False).loss.backward()

    return step
