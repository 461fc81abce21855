"""Claim: a training step keeps and takes little more memory than the frozen base alone, with dropout too.

Peaks do not depend on a quiet machine, so it may run beside other work. Every side is measured in a process of its own,
forked from one that has loaded the libraries, and written to build/train_memory.jsonl as soon as it is known, with its
error where it failed; a run that was interrupted goes on from there.
`MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536 python -m benchmarks.train_memory [NAME...]` measures some.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from benchmarks.common import Claim, llama
from benchmarks.train_step import ROWS, SHAPE, SIDES, TOKENS, adapted

# MiB at this size, as the figures of PEFT are: peak above the base, kept for the backward
TARGETS = {"LoRA": (455, 354), "LoRA with dropout": (455, 354), "DoRA": (480, 372)}
HIGHEST = (560, 450)
TIGHT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # freed blocks go back at once
FOUND = Path(__file__).parent.parent / "build" / "train_memory.jsonl"
LONGEST_SECONDS = 3600  # a process that gets little of a busy machine is slow, and its peak is the same
NAMES = [name for name in SIDES if name != "full"]  # all gradients and states of the base: no adapter
_SAID = {"peak": "peak above the loaded base", "kept": "kept for the backward"}


def run() -> list[Claim]:
    """Every method in a process of its own, beside PEFT's in another; ours first, so that they are known soonest."""
    command = [sys.executable, "-m", "benchmarks.train_memory"]
    subprocess.run(command, env={**os.environ, **TIGHT}, check=True)  # the allocator is set where a process starts
    known = _known()
    FOUND.unlink()  # whole: the next run measures anew
    return [claim for name in NAMES for claim in _claims(name, known)]


def measure(names: list[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """The figures of some methods by (library, name): those that the file holds, and the others measured now."""
    known = _known()
    if known:
        print(f"    {len(known)} measurements of an interrupted run are in {FOUND}", flush=True)
    FOUND.parent.mkdir(exist_ok=True)
    beside = [("peft", name) for name in names if SIDES[name].config is not None]
    for key in (("floor", ""), *(("weft", name) for name in names), *beside):
        if key in known and "error" not in known[key]:
            continue
        known[key] = {"library": key[0], "name": key[1], **_child(*key)}
        with FOUND.open("a", encoding="utf-8") as file:
            file.write(json.dumps(known[key]) + "\n")
        figures = known[key].get("error") or f"peak {known[key]['peak']:.0f} MiB, kept {known[key]['kept']:.0f} MiB"
        print(f"    {key[0]:6}{key[1]:20}{figures}", flush=True)
    return known


def _known() -> dict[tuple[str, str], dict[str, Any]]:
    lines = FOUND.read_text(encoding="utf-8").splitlines() if FOUND.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {(row["library"], row["name"]): row for row in rows}


def _claims(name: str, known: dict[tuple[str, str], dict[str, Any]]) -> list[Claim]:
    ours, theirs, floor = known["weft", name], known.get(("peft", name), {}), known["floor", ""]
    found = []
    for what, target in zip(_SAID, TARGETS.get(name, HIGHEST), strict=True):
        if what not in ours:  # a method that fails has missed its target
            found.append(Claim(f"{name}: {_SAID[what]}", *[float("inf")] * 3, 1.0, ours["error"]))
            continue
        beside = f"; PEFT {theirs[what]:.0f} MiB" if what in theirs else ""
        detail = f"{ours[what]:.0f} MiB{beside}; the frozen base {floor[what]:.0f} MiB; target {target} MiB"
        found.append(Claim(f"{name}: {_SAID[what]}", *[ours[what] / target] * 3, 1.0, detail))
    return found


def _child(library: str, name: str) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe(duplex=False)
    child = context.Process(target=_report, args=(library, name, its))
    child.start()
    its.close()
    try:
        if not mine.poll(LONGEST_SECONDS):
            child.kill()
            return {"error": f"it took more than {LONGEST_SECONDS} s"}
        return mine.recv()  # type: ignore[no-any-return]
    except EOFError:
        return {"error": "its process ended without a figure"}
    finally:
        child.join()


def _report(library: str, name: str, answer: Connection) -> None:
    try:
        answer.send(_figures(library, name))
    except Exception as error:
        answer.send({"error": f"{type(error).__name__}: {error}"})


def _figures(library: str, name: str) -> dict[str, float]:
    """Of two steps: the first makes the optimiser's states and is looked into, the second finds them there."""
    torch.set_num_threads(1)
    ids = torch.randint(0, 8192, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    model = llama(**SHAPE).train()
    _warm_up()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = _status("VmRSS")
    step, model = _made(model, library, name, ids)
    kept = _kept(model, step)
    _update(model, library)
    step().backward()
    _update(model, library)
    return {"peak": (_status("VmHWM") - before) / 2**20, "kept": kept / 2**20}


def _update(model: Any, library: str) -> None:
    if library != "floor":
        model.optimiser.step()
        model.optimiser.zero_grad()


def _made(model: nn.Module, library: str, name: str, ids: torch.Tensor) -> Any:
    if library == "floor":
        model.requires_grad_(False)

        def floor() -> torch.Tensor:
            inputs = model.get_input_embeddings()(ids).requires_grad_()  # type: ignore[operator]
            return model(inputs_embeds=inputs, labels=ids, use_cache=False).loss  # type: ignore[no-any-return]

        return floor, model
    side = SIDES[name]
    model = adapted(model, side) if library == "weft" else peft.get_peft_model(model, side.config())  # type: ignore[misc]
    trained = [p for p in model.parameters() if p.requires_grad]
    model.__dict__["optimiser"] = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss, model


def _kept(model: nn.Module, forward: Any) -> int:
    """Bytes of distinct tensors, other than the model's own, that a forward saves for its backward."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        for part in (t._indices(), t._values()) if t.is_sparse else (t,):
            if part.untyped_storage().data_ptr() not in own:
                sizes[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = forward()
    total = sum(sizes.values())
    loss.backward()
    return total


def _warm_up() -> None:
    """What the libraries load at their first matmul belongs to no method."""
    x = torch.randn(64, 64, requires_grad=True)
    (x @ x).sum().backward()


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    measured = measure(sys.argv[1:] or NAMES)
    for named in [name for library, name in measured if library == "weft"]:
        for claim in _claims(named, measured):
            print(f"  {claim.name}: {claim.ratio:.3f}, {'holds' if claim.holds else 'MISSED'} ({claim.detail})")
