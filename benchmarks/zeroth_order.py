"""Claim: the peak memory of a MeZO or AdaZeta step is at most 1.1 of inference on the same batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import Claim

TARGET, REPEATS, STEPS = 1.1, 3, 2
SIDES: dict[str, dict[str, Any] | None] = {
    "inference": None,
    "mezo": {"name": "mezo"},
    "adazeta": {"name": "adazeta", "queries": 4, "factor": 4.0},
    "adamw": {"name": "adamw"},
}
# The default allocator keeps hundreds of MB of fragments, which would hide any difference.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def run() -> list[Claim]:
    """Every side in processes of its own, in turn."""
    found: dict[str, list[dict[str, int]]] = {side: [] for side in SIDES}
    for _ in range(REPEATS):
        for side, figures in found.items():
            figures.append(_measured(side))
    middle = {side: sorted(figures, key=lambda f: f["total"])[REPEATS // 2] for side, figures in found.items()}
    backward = middle["adamw"]["total"] / middle["inference"]["total"]
    claims = []
    for side in ("mezo", "adazeta"):
        low, ratio, high = sorted(
            mine["total"] / theirs["total"] for mine, theirs in zip(found[side], found["inference"], strict=True)
        )
        above = middle[side]["above"] / middle["inference"]["above"]
        sizes = " against ".join(f"{middle[each]['total'] / 1e6:.0f} MB" for each in (side, "inference"))
        detail = f"{sizes}, weights included; above the weights {above:.2f}; AdamW with a backward pass {backward:.2f}"
        claims.append(Claim(f"peak memory of a step of {side}", ratio, low, high, TARGET, detail))
    return claims


def _measured(side: str) -> dict[str, int]:
    """Bytes at the peak of one side: above the process before the model, and above the process with it."""
    environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.zeroth_order", side]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found: dict[str, int] = json.loads(printed.splitlines()[-1])
    return found


def _peak(side: str) -> dict[str, int]:
    import torch

    import weft
    from benchmarks.common import LINEARS, llama
    from weft import objectives
    from weft.data import IGNORED, Example, collate
    from weft.recipe import Train
    from weft.tune.evaluate import evaluating
    from weft.tune.keeper import named_parameters
    from weft.tune.optimizers import make_optimizer
    from weft.tune.step import Learner, backpropagate, make_scaler, train_step, update_all
    from weft.tune.trained import trained_tensors
    from weft.tune.zeroth_order import against_slopes, slopes

    torch.set_num_threads(1)
    _forward_once(llama(num_hidden_layers=1))  # what libraries load on first use is no one's memory
    empty = _status("VmRSS")
    model = llama(
        vocab_size=32_000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8
    )
    method = weft.TensorTrain(rank=8) if side == "adazeta" else weft.LoRA(rank=8)
    weft.attach(model, method, LINEARS, name="a")
    ids = torch.randint(0, 32_000, (4, 256)).tolist()
    part = collate([Example(tuple(row), (IGNORED, *row[1:]), "", i) for i, row in enumerate(ids)], pad_token=0)
    loss_of, _ = objectives.chunked_loss_of("causal-lm", model)
    loaded = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of making the model
    spec = SIDES[side]
    if spec is None:
        with torch.no_grad(), evaluating(model):
            for _ in range(STEPS):
                loss_of(model, part)
    else:
        train, forward_only = Train(optimizer=spec, learning_rate=1e-6), side != "adamw"
        optimizer = make_optimizer(named_parameters(model, "a"), train, tensors=trained_tensors(model, "a"))
        learner = Learner(
            model, named_parameters(model, "a"), optimizer, make_scaler(torch.device("cpu"), None), loss_of,
            gradient=slopes if forward_only else backpropagate, update=against_slopes if forward_only else update_all,
        )  # fmt: skip
        model.train()
        for step in range(STEPS):
            train_step(learner, [part], train, rate=1e-6, step=step)
    peak = _status("VmHWM")
    return {"total": peak - empty, "above": peak - loaded}


def _forward_once(model: Any) -> None:
    import torch

    model(torch.ones(1, 8, dtype=torch.long), labels=torch.ones(1, 8, dtype=torch.long)).loss.backward()


def _status(key: str) -> int:
    """Bytes of this process, as Linux counts them."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(_peak(sys.argv[1])))
