"""Claim: a batch whose 16 rows use 16 adapters takes at most 1/0.85 of the same batch with one; a top-2 of 8 trains at
1.3 of one LoRA of the same total rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch

import weft
from benchmarks.common import LINEARS, Claim, claim, llama, paired

ROWS, TARGET = 16, 1 / 0.85
SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
METHODS = {
    "LoRA": {"name": "lora", "rank": 8},
    "DoRA": {"name": "dora", "rank": 8},
    "IA3": {"name": "ia3"},
    "RoAd": {"name": "road"},
    "OFT": {"name": "oft", "block_size": 32},
    "VeRA": {"name": "vera"},
}


def run() -> list[Claim]:
    rows = [_mixed("LoRA", tokens, theirs=_peft(tokens)) for tokens in (1, 16, 64, 256)]
    rows += [_mixed(name, 16) for name in METHODS if name != "LoRA"]
    rows += [_ranks(), _loaded(), _top_two()]
    return rows


def _with(settings: dict[str, Any], count: int) -> torch.nn.Module:
    from weft.registry import method_from_spec

    model = llama(**SHAPE)
    for i in range(count):
        weft.attach(model, method_from_spec(settings), LINEARS, name=f"a{i}", seed=i)
    with torch.no_grad():
        for p in weft.parameters(model):
            p.add_(0.02 * torch.randn_like(p))
    return model


def _call(model: torch.nn.Module, ids: torch.Tensor, route: Any) -> Callable[[], Any]:
    from weft.core.route import as_route

    kept = as_route(route)  # one route for all calls, as a server keeps it

    def call() -> None:
        weft.use(model, kept)
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)

    return call


def _ids(tokens: int, rows: int = ROWS) -> torch.Tensor:
    return torch.randint(0, 1024, (rows, tokens), generator=torch.Generator().manual_seed(0))


def _mixed(name: str, tokens: int, theirs: float | None = None) -> Claim:
    """16 rows of 16 adapters against the same rows with one."""
    model, ids = _with(METHODS[name], ROWS), _ids(tokens)
    sides = _call(model, ids, [f"a{i}" for i in range(ROWS)]), _call(model, ids, "a0")
    what = "one adapter" + (f"; PEFT's own mixed batch {theirs:.2f} of its one adapter" if theirs else "")
    title = f"16 rows of {tokens} tokens, 16 {name}"
    return claim(title, *paired(*sides, pairs=9, warmup=2), target=TARGET, what=what)


def _peft(tokens: int) -> float:
    """The same ratio of HF PEFT's mixed batch."""
    config = peft.LoraConfig(r=8, target_modules=LINEARS)
    model = peft.get_peft_model(llama(**SHAPE), config, adapter_name="a0").eval()
    for i in range(1, ROWS):
        model.add_adapter(f"a{i}", config)
    ids, names = _ids(tokens), [f"a{i}" for i in range(ROWS)]
    with torch.inference_mode():
        mixed = partial(model, input_ids=ids, use_cache=False, adapter_names=names)
        alone = partial(model, input_ids=ids, use_cache=False)
        return claim("", *paired(mixed, alone, pairs=5, warmup=1), target=1.0).ratio


def _ranks() -> Claim:
    """Ranks are not padded to the largest: one adapter of rank 128 among 15 of rank 4, against 16 of rank 4."""
    sides = []
    for ranks in ([4] * (ROWS - 1) + [128], [4] * ROWS):
        model = llama(**SHAPE)
        for i, rank in enumerate(ranks):
            weft.attach(model, weft.LoRA(rank=rank), LINEARS, name=f"a{i}")
        sides.append(_call(model, _ids(16), [f"a{i}" for i in range(ROWS)]))
    title = "16 rows of 16 tokens, 15 LoRA r=4 and one r=128"
    return claim(title, *paired(*sides, pairs=9, warmup=2), target=TARGET, what="16 LoRA r=4")


def _loaded() -> Claim:
    """256 adapters loaded, 16 of them in a batch, against 16 loaded."""
    shape = {**SHAPE, "num_hidden_layers": 4}
    sides = []
    for count in (256, ROWS):
        model = llama(**shape)
        for i in range(count):
            weft.attach(model, weft.LoRA(rank=8), LINEARS, name=f"a{i}")
        sides.append(_call(model, _ids(16), [f"a{i * count // ROWS}" for i in range(ROWS)]))
    return claim("16 of 256 loaded LoRA", *paired(*sides, pairs=9, warmup=2), target=1.05, what="16 of 16")


def _top_two() -> Claim:
    """A training step of top-2 of 8 LoRA r=8 against one LoRA r=64."""
    sides = []
    for method in (weft.TopK(experts=weft.experts(weft.LoRA(rank=8), 8), k=2), weft.LoRA(rank=64)):
        model = llama(**SHAPE)
        weft.attach(model, method, LINEARS, name="a")
        sides.append(partial(_step, model.train(), _ids(256, rows=4)))
    return claim("training step, top-2 of 8 LoRA r=8", *paired(*sides, pairs=7), target=1.3, what="LoRA r=64")


def _step(model: torch.nn.Module, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for p in weft.parameters(model):
        p.grad = None
