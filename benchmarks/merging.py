"""Claim: merging two checkpoints takes half of mergekit's time and memory; by linear, little more than copying them."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from benchmarks.common import Claim

SHAPE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 28, "vocab_size": 32_000}
"""About a gigabyte in bfloat16."""
ROUNDS = 3


def run() -> list[Claim]:
    """Each side in a process of its own, in turns; copying the two files between them."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _models(folder)
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(ROUNDS):
            found.setdefault("copy", []).append(_copy(folder))
            for rule in ("linear", "ties"):
                for side in ("weft", "mergekit"):
                    found.setdefault(f"{side} {rule}", []).append(_child(side, rule, folder))
    claims = []
    for rule in ("linear", "ties"):
        ours, theirs = found[f"weft {rule}"], found[f"mergekit {rule}"]
        claims.append(_claim(f"{rule}: time over mergekit", ours, theirs, "seconds", 0.5))
        claims.append(_claim(f"{rule}: peak memory over mergekit", ours, theirs, "bytes", 0.5))
    claims.append(_claim("linear: time over copying both files", found["weft linear"], found["copy"], "seconds", 1.5))
    return claims


def _claim(name: str, ours: list[dict[str, float]], theirs: list[dict[str, float]], key: str, target: float) -> Claim:
    from benchmarks.common import Claim

    ratios = sorted(a[key] / b[key] for a, b in zip(ours, theirs, strict=True))
    unit, size = ("s", 1.0) if key == "seconds" else ("MB", 1e6)
    mine, other = (statistics.median(s[key] for s in side) / size for side in (ours, theirs))
    return Claim(
        name, statistics.median(ratios), ratios[0], ratios[-1], target, f"{mine:.1f} {unit}, {other:.1f} {unit}"
    )


def _models(folder: Path) -> None:
    from benchmarks.common import llama  # not above: a measured process holds what its side imports, and nothing else

    torch.manual_seed(0)
    model = llama(**SHAPE).to(torch.bfloat16)
    for name in ("base", "one", "two"):
        model.save_pretrained(folder / name)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn_like(p))


def _copy(folder: Path) -> dict[str, float]:
    started = time.perf_counter()
    for name in ("one", "two"):
        shutil.copyfile(folder / name / "model.safetensors", folder / f"copy-{name}")
    seconds = time.perf_counter() - started
    for name in ("one", "two"):
        (folder / f"copy-{name}").unlink()
    return {"seconds": seconds}


def _child(side: str, rule: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.merging", side, rule, str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    shutil.rmtree(folder / "out")
    return json.loads(found.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _measured(side: str, rule: str, folder: Path) -> None:
    one, two, base, out = (str(folder / name) for name in ("one", "two", "base", "out"))
    if side == "weft":
        from weft.checkpoints import merge_checkpoints
        from weft.combining import rule_of

        options = {"density": 0.5} if rule == "ties" else {}
        started = time.perf_counter()
        merge_checkpoints([one, two], rule_of(rule, options), out, base=base if rule == "ties" else None)
    else:
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        models = [{"model": name, "parameters": {"weight": 1.0}} for name in (one, two)]
        body = {"merge_method": rule, "models": models, "parameters": {"density": 0.5} if rule == "ties" else {}}
        config = MergeConfiguration.model_validate(body | ({"base_model": base} if rule == "ties" else {}))
        started = time.perf_counter()
        run_merge(config, out, MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False))
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])
    print(json.dumps({"seconds": seconds, "bytes": float(peak)}))


if __name__ == "__main__":
    _measured(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
