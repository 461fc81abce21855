"""Claim: a training step costs little more than the frozen base alone, with every method, and less than PEFT's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import nn

import weft
from benchmarks.common import LINEARS, Claim, claim, llama
from weft.registry import method_class

SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 8192}
ROWS, TOKENS, ROUNDS = 4, 256, 5


@dataclass(frozen=True)
class Side:
    """One way to adapt: Weft's method, PEFT's configuration of the same sizes, and what ours may cost of the floor."""

    method: Any
    config: Callable[[], peft.PeftConfig] | None = None
    target: float = 1.30
    targets: Any = None


def _ours(name: str, **options: Any) -> Any:
    return method_class(name)(**options)


def _theirs(kind: str, **options: Any) -> Callable[[], peft.PeftConfig]:
    return lambda: getattr(peft, kind)(**{"target_modules": LINEARS, **options})


SIDES: dict[str, Side] = {
    "LoRA": Side(_ours("lora"), _theirs("LoraConfig", r=8), 1.08),
    "LoRA with dropout": Side(_ours("lora", dropout=0.05), _theirs("LoraConfig", r=8, lora_dropout=0.05), 1.11),
    "DoRA": Side(_ours("dora"), _theirs("LoraConfig", r=8, use_dora=True), 1.15),
    "IA3": Side(_ours("ia3"), _theirs("IA3Config", feedforward_modules=[])),
    "VeRA": Side(_ours("vera"), _theirs("VeraConfig", r=256)),
    "OFT": Side(_ours("oft"), _theirs("OFTConfig", oft_block_size=32)),
    "BOFT": Side(_ours("boft"), _theirs("BOFTConfig", boft_block_size=4)),
    "LoHa": Side(_ours("loha"), _theirs("LoHaConfig", r=8)),
    "LoKr": Side(_ours("lokr"), _theirs("LoKrConfig", r=8)),
    "FourierFT": Side(_ours("fourierft"), _theirs("FourierFTConfig", n_frequency=1000)),
    "SHiRA": Side(_ours("shira", rank=32), _theirs("ShiraConfig", r=32)),
    "RoAd": Side(_ours("road"), _theirs("RoadConfig", variant="road_1")),
    "norm tuning": Side(_ours("norm_tuning"), _theirs("LNTuningConfig", target_modules=None), targets="norms"),
    "RandLoRA": Side(_ours("randlora"), _theirs("RandLoraConfig")),
    "HiRA": Side(_ours("hira"), _theirs("HiraConfig")),
    "DeLoRA": Side(_ours("delora"), _theirs("DeloraConfig")),
    "GraLoRA": Side(_ours("gralora"), _theirs("GraloraConfig")),
    "MiSS": Side(_ours("miss"), _theirs("MissConfig")),
    "AdaLoRA": Side(_ours("adalora"), _theirs("AdaLoraConfig", total_step=1000, tinit=100, tfinal=300)),
    "Lily": Side(_ours("lily"), _theirs("LilyConfig")),
    "PVeRA": Side(_ours("pvera"), _theirs("PveraConfig")),
    "VB-LoRA": Side(_ours("vblora"), _theirs("VBLoRAConfig")),
    "Uni-LoRA": Side(_ours("unilora"), _theirs("UniLoraConfig")),
    "TinyLoRA": Side(_ours("tinylora"), _theirs("TinyLoraConfig")),
    "DEFT": Side(_ours("deft"), _theirs("DeftConfig")),
    "PEANuT": Side(_ours("peanut"), _theirs("PeanutConfig")),
    "GLoRA": Side(_ours("glora"), _theirs("GloraConfig")),
    "Super-Tuning": Side(_ours("supertuning"), _theirs("SupertuningConfig")),
    "HRA": Side(_ours("hra"), _theirs("HRAConfig")),
    "PSOFT": Side(_ours("psoft"), _theirs("PsoftConfig")),
    "OSF": Side(_ours("osf"), _theirs("OSFConfig")),
    "C3A": Side(_ours("c3a"), _theirs("C3AConfig", block_size=256)),
    "WaveFT": Side(_ours("waveft"), _theirs("WaveFTConfig")),
    "ETHER": Side(_ours("ether")),
    "SVFT": Side(_ours("svft")),
    "tensor train": Side(_ours("tensor_train")),
    "top-2 of 4 LoRA": Side(_ours("top_k", experts=weft.experts(weft.LoRA(rank=4), 4))),
    "bottleneck": Side(_ours("bottleneck"), targets="mlp-blocks"),
    "bias tuning": Side(_ours("bias_tuning")),
    "full": Side(_ours("full"), target=1.44, targets=LINEARS),
}


def run() -> list[Claim]:
    """All methods at hidden 512, 8 layers; then the common ones at hidden 2048, 2 layers. Two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wide = {**SHAPE, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2}
        rows = [c for name in SIDES for c in _compare(name, SHAPE, ROUNDS)]
        for name in ("LoRA", "LoRA with dropout", "DoRA", "LoKr", "VeRA"):
            rows += _compare(name, wide, 3, where=", hidden 2048")
        return rows
    finally:
        torch.set_num_threads(threads)


def _compare(name: str, shape: dict[str, Any], rounds: int, where: str = "") -> list[Claim]:
    side = SIDES[name]
    ids = torch.randint(0, 8192, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    runs = {"floor": _floor(llama(**shape), ids), "ours": _step(adapted(llama(**shape), side), ids)}
    if side.config is not None:
        runs["peft"] = _step(peft.get_peft_model(llama(**shape).train(), side.config()), ids)
    times = _in_turn(runs, rounds)
    floor, ours, theirs = times["floor"], times["ours"], times.get("peft")
    known = f"; PEFT {claim('', theirs, floor, target=0).ratio:.2f}" if theirs else ""
    found = claim(f"{name} step{where}", ours, floor, target=side.target, what=f"the frozen base{known}")
    return [found] + ([claim(f"{name} step against PEFT{where}", ours, theirs, target=1.0)] if theirs else [])


def adapted(model: nn.Module, side: Side) -> nn.Module:
    """The model in training with Weft's adapter, and nothing else trained."""
    weft.attach(model, side.method, side.targets or LINEARS, name="a")
    return model.train()


def _in_turn(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {key: [] for key in runs}
    for round_ in range(-1, rounds):  # the first warms up
        for key in list(runs) if round_ % 2 else list(runs)[::-1]:
            start = time.perf_counter()
            runs[key]()
            if round_ >= 0:
                times[key].append(time.perf_counter() - start)
    return times


def _step(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def _floor(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """Forward and backward through all activations with every weight frozen: what no method can be below."""
    model.train().requires_grad_(False)

    def step() -> None:
        inputs = model.get_input_embeddings()(ids).requires_grad_()  # type: ignore[operator]
        model(inputs_embeds=inputs, labels=ids, use_cache=False).loss.backward()

    return step
