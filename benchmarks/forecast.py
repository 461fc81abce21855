"""Claim: a forecast of peak memory is within 4 % (median) and of time within 10 %, on configurations it never saw.

Each truth is measured in a process of its own, and nothing of the forecast was fitted to any of them. Run it alone on a
quiet machine: `python -m benchmarks.forecast [--memory-only] [--rows FILE] [NUMBER...]`; it takes the time of 60
processes. A time is also judged at the machine's speed at that moment: every truth measures the calibration's own step
too, because a shared machine is a fifth faster or slower from one minute to the next. With --rows every configuration
is written to the file as soon as it is known, with its error where it failed, and those that the file holds already are
not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import Claim

DATA = Path(__file__).parent.parent / "examples" / "data" / "docstrings" / "train.jsonl"
THREADS = 1
STEPS = 3
LONGEST_SECONDS = 600
# The default allocator keeps 20 to 75 % of what tensors gave back, which no forecast of tensors can know.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

SHAPES: dict[str, dict[str, Any]] = {
    "wide": {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 3, "num_attention_heads": 10},
    "deep": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 10, "num_attention_heads": 4},
    "grouped": {
        "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "words": {
        "hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 4, "num_attention_heads": 5,
        "vocab_size": 24000, "tie_word_embeddings": True,
    },
}  # fmt: skip


def configurations(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and recipe of each: methods, sizes, number formats, batches, levers."""
    methods = (
        "lora", "dora", "vera", "oft", "ia3", "loha", "lokr", "fourierft", "boft", "shira", "svft", "road", "full",
        "bottleneck", "prompt", "prefix", "norm_tuning", "tensor_train", "ether", "sora",
    )  # fmt: skip
    for i, method in enumerate(methods):
        shape = ("deep", "grouped", "wide", "words")[i % 4]
        yield f"{method} on {shape}", recipe(folder, shape, {"name": method}, batch_size=(2, 4, 6)[i % 3])
    for shape in SHAPES:
        for batch_size in (1, 3, 8):
            yield f"lora, batch {batch_size} on {shape}", recipe(folder, shape, batch_size=batch_size)
    for rank in (1, 32, 128):
        yield f"lora rank {rank}", recipe(folder, "grouped", {"name": "lora", "rank": rank}, batch_size=4)
    levers: dict[str, dict[str, Any]] = {
        "padded": {"packing": False},
        "padded, all logits": {"packing": False, "loss_chunk": 0},
        "bucketed": {"bucket_by_length": True},
        "accumulated": {"accumulate": 4, "batch_size": 2},
        "attention again": {"activations": "attention"},
        "layers again": {"activations": "recompute"},
        "layers again, padded": {"activations": "recompute", "packing": False, "batch_size": 6},
        "in backward": {"optimizer_in_backward": True, "clip_norm": None},
        "sgd": {"optimizer": "sgd"},
        "bf16 adapter": {"adapter_dtype": "bfloat16", "batch_size": 2},
    }
    for name, train in levers.items():
        yield name, recipe(folder, "deep", **{"batch_size": 4, **train})
    for name in ("in backward", "layers again", "sgd"):
        yield f"full, {name}", recipe(folder, "wide", {"name": "full"}, **{"batch_size": 2, **levers[name]})
    for scheme in ("nf4", "int8", "torchao-int8", "packed-int4"):
        yield scheme, recipe(folder, "wide", base={"quantize": scheme}, batch_size=2)
    yield "nf4, layers again", recipe(folder, "deep", base={"quantize": "nf4"}, batch_size=4, activations="recompute")
    yield "bf16 base", recipe(folder, "grouped", base={"dtype": "bfloat16"}, batch_size=1)
    yield "autocast", recipe(folder, "grouped", batch_size=1, precision="bfloat16")
    yield "pico", recipe(None, "pico", batch_size=8)
    yield "pico, dropout", recipe(None, "pico", {"name": "lora", "dropout": 0.1}, batch_size=4)
    for layers in ("0-1", "5-9", "9"):
        yield f"layers {layers}", recipe(folder, "deep", layers=layers, batch_size=4)


def recipe(
    folder: Path | None, shape: str, method: dict[str, Any] | None = None, *, base: dict[str, Any] | None = None,
    layers: str | None = None, **train: Any,
) -> dict[str, Any]:  # fmt: skip
    model = shape if folder is None else str(folder / shape)
    return {
        "base": {"model": model, **(base or {})},
        "data": {"train": str(DATA), "limit": 72},
        "method": method or {"name": "lora"},
        "layers": layers,
        "train": {"threads": THREADS, "epochs": 1, **train},
        "forgetting": None,
    }


def truth(settings: dict[str, Any], *, memory_only: bool) -> dict[str, float]:
    """In this process: the peak above what there was before, and the seconds of a step, over the run's largest batch
    and its first steps; the peak of the largest batch alone where time is not asked for."""
    import torch

    from weft.plan.load import LoadMeter
    from weft.plan.truth import Peak, resident_bytes
    from weft.recipe import Recipe
    from weft.tune.ahead import largest_and_first
    from weft.tune.learn import make_learner, without_cache
    from weft.tune.packing import packed_attention
    from weft.tune.session import attach_adapter, prepare
    from weft.tune.step import train_step

    torch.set_num_threads(THREADS)
    before = resident_bytes()
    session = prepare(Recipe.model_validate(settings), lambda _: None)
    attach_adapter(session)
    largest, first = largest_and_first(session, STEPS)
    learner, train = make_learner(session), session.recipe.train
    session.model.train()
    highest = Peak(session.device, before)
    times = []
    with without_cache(session.model), packed_attention(session.model, session.packed_from):
        train_step(learner, largest, train, rate=1e-6, step=1)
        meter = LoadMeter(THREADS)
        for parts in (largest,) if memory_only else (largest, *first):
            started = time.perf_counter()
            train_step(learner, parts, train, rate=1e-6, step=1)
            times.append(time.perf_counter() - started)
    # of the first steps: how long they take beside the forecast of the very same ones
    found = {"memory": highest.bytes(), "seconds": sum(times[1:]), "busy": meter.load().share}
    if not memory_only:
        from weft.tune.calibrate import reference_seconds

        found["reference"] = reference_seconds(session.device)
    return found


def forecast(settings: dict[str, Any], *, memory_only: bool) -> dict[str, float]:
    """In this process, without the history of past runs. memory_only: without measuring this machine's speed."""
    import torch

    from weft.recipe import Recipe
    from weft.tune.ahead import foresee_memory, foresee_steps, sampled
    from weft.tune.calibrate import calibrated

    torch.set_num_threads(THREADS)
    recipe = Recipe.model_validate(settings)
    if memory_only:
        tokenizer, splits, _ = sampled(recipe)
        return {"memory": foresee_memory(recipe, tokenizer, splits).total}
    memory, seconds = foresee_steps(recipe, STEPS)
    return {"memory": memory, "seconds": seconds, "reference": calibrated(torch.device("cpu")).reference_seconds}


def calibrate(settings: dict[str, Any], *, memory_only: bool) -> dict[str, Any]:  # noqa: ARG001
    """Measure this machine for every forecast that follows, and say what was in the way."""
    import torch

    from weft.tune.calibrate import calibrated

    torch.set_num_threads(THREADS)
    rates = calibrated(torch.device("cpu"), recalibrate=True)
    return {"call_seconds": rates.call_seconds, "scale": rates.scale, "busy": rates.busy}


def compare(
    *, memory_only: bool = False, chosen: list[int] | None = None, rows: Path | None = None
) -> list[dict[str, Any]]:
    """Every configuration with its forecast and its truth. rows: a file that holds some, and gets the others."""
    found = []
    known = {row["name"]: row for row in _read(rows) if "error" not in row and (memory_only or _timed(row))}
    with tempfile.TemporaryDirectory(prefix="weft-forecast-") as name:
        folder = Path(name)
        _make_bases(folder)
        os.environ["WEFT_CACHE"] = str(folder / "cache")
        if not memory_only:  # once, before any configuration, and alone
            print(f"machine: {_child('calibrate', '{}')}", flush=True)
        for number, (title, settings) in enumerate(configurations(folder)):
            if chosen and number not in chosen:
                continue
            row = known.get(title) or {"number": number, "name": title, **_both(settings, memory_only)}
            found.append(row)
            if rows is not None and title not in known:
                with rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            shown = f"{number:3} {title:34} memory {_percent(row, 'memory')}"
            print(shown + ("" if memory_only else f"   time {_percent(row, 'seconds')}"), flush=True)
    return found


def run() -> list[Claim]:
    """Median and worst errors, as ratios to what was promised."""
    every = compare()
    rows = [row for row in every if "error" not in row]
    failed = "".join(f"; failed: {row['name']} ({row['error']})" for row in every if "error" in row)
    drift = "; by the calibration's own step, measured with each"
    claims = []
    for name, median, worst, of, said in (
        ("peak memory", 0.04, 0.12, [_off(row, "memory") for row in rows], ""),
        ("time of a step", 0.10, 0.30, [_off(row, "seconds") for row in rows], ""),
        ("time of a step at the machine's speed then", 0.10, 0.30, _offs_then(rows), drift),
    ):
        if len(of) > 1:
            errors = sorted(map(abs, of))
            low, middle, high = statistics.quantiles(errors, n=4)
            detail = f"{len(of)} configurations{failed}{said}"
            claims.append(Claim(f"{name}: median error of the forecast", middle, low, high, median, detail))
            claims.append(Claim(f"{name}: worst error of the forecast", errors[-1], low, high, worst, detail))
    return claims


def _off(row: dict[str, Any], key: str) -> float:
    return float(row["forecast"][key] / row["truth"][key] - 1)


def _off_then(row: dict[str, Any]) -> float | None:
    """The error of a time where the machine is as fast as when it was calibrated: by a step measured both times."""
    then, now = row["forecast"].get("reference"), row["truth"].get("reference")
    return (1 + _off(row, "seconds")) * now / then - 1 if then and now else None


def _offs_then(rows: list[dict[str, Any]]) -> list[float]:
    return [off for off in map(_off_then, rows) if off is not None]


def _both(settings: dict[str, Any], memory_only: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for what in ("truth", "forecast"):
        found[what] = _child(what, json.dumps(settings), *(["--memory-only"] if memory_only else []))
        if "error" in found[what]:
            return {"error": f"{what}: {found[what]['error']}"}
    return found


def _child(what: str, settings: str, *options: str) -> dict[str, Any]:
    """What a process of its own finds, or its error."""
    environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(THREADS)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.forecast", f"--{what}", *options], input=settings, text=True,
            capture_output=True, env=environment, check=False, timeout=LONGEST_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"it took more than {LONGEST_SECONDS} s"}
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or ["it said nothing"]
    if done.returncode:
        return {"error": f"exit code {done.returncode}: {lines[-1]}"}
    try:
        return json.loads(lines[-1])  # type: ignore[no-any-return]
    except json.JSONDecodeError:
        return {"error": f"no figures in {lines[-1]!r}"}


def _read(rows: Path | None) -> list[dict[str, Any]]:
    if rows is None or not rows.exists():
        return []
    return [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def _timed(row: dict[str, Any]) -> bool:
    return "seconds" in row["forecast"]


def _percent(row: dict[str, Any], key: str) -> str:
    if "error" in row:
        return f"failed: {row['error']}"
    unit, name = (1e6, "MB") if key == "memory" else (1, "s")
    told, real = row["forecast"][key], row["truth"][key]
    busy = row["truth"]["busy"]
    disturbed = f", while others took {busy:.0%}" if key == "seconds" and busy > 0.05 else ""
    then = _off_then(row) if key == "seconds" else None
    shown = f"{told / real - 1:+.1%}" + ("" if then is None else f", {then:+.1%} at the machine's speed then")
    return f"{told / unit:8.2f} for {real / unit:8.2f} {name} ({shown}{disturbed})"


def _make_bases(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from weft.base import find_base

    tokenizer = AutoTokenizer.from_pretrained(find_base("pico"))
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        config = LlamaConfig(**{"vocab_size": 4096, "max_position_embeddings": 1024, **shape})
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


if __name__ == "__main__":
    sides: dict[str, Callable[..., dict[str, Any]]] = {
        "--truth": truth, "--forecast": forecast, "--calibrate": calibrate,
    }  # fmt: skip
    if side := sides.get("".join(sys.argv[1:2])):
        print(json.dumps(side(json.load(sys.stdin), memory_only="--memory-only" in sys.argv)))
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("numbers", nargs="*", type=int, help="of the configurations; all where none is given")
        parser.add_argument("--memory-only", action="store_true", help="show no times")
        parser.add_argument("--rows", type=Path, help="a file of JSON lines: what it holds is not measured again")
        asked = parser.parse_args()
        found = compare(memory_only=asked.memory_only, chosen=asked.numbers or None, rows=asked.rows)
        for what in ("memory",) if asked.memory_only else ("memory", "seconds"):
            told = [r for r in found if "error" not in r]
            named = {what: [_off(r, what) for r in told]}
            if what == "seconds":
                named["seconds at the machine's speed then"] = _offs_then(told)
            for name, off in named.items():
                if off:
                    worst = max(map(abs, off))
                    print(f"{name}: median {statistics.median(map(abs, off)):.1%}, worst {worst:.1%} of {len(off)}")
