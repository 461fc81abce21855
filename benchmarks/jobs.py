"""One training job in a process of its own, by Weft or by TRL's SFTTrainer with PEFT: seconds, real tokens, memory.

    python -m benchmarks.jobs '{"side": "weft", ...}'

Both sides read the very same tokens, and validation loss is measured by the same code on both.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from weft.plan.truth import Peak, resident_bytes

ROOT = Path(__file__).resolve().parent.parent
DATA = {split: str(ROOT / f"examples/data/docstrings/{split}.jsonl") for split in ("train", "validation")}
TIGHT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # freed blocks go back at once
BASE_TRAIN = {
    "epochs": 1, "batch_size": 16, "learning_rate": 2e-3, "warmup": 0.05, "checkpoint_every": None, "log_every": 1000,
}  # fmt: skip


def job(side: str, *, tight: bool = False, **options: Any) -> dict[str, Any]:
    """Run one job and give what it found; {"error": ...} with its last line where it could not.

    tight: give freed memory back at once. Peaks are then those of tensors, and both sides are slower.
    """
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.jobs", json.dumps({"side": side, **options})]
    environment = {**os.environ, **(TIGHT if tight else {}), "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, cwd=ROOT)
    if found.returncode:
        return {"error": (found.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return json.loads(found.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main(options: dict[str, Any]) -> dict[str, Any]:
    """What a child does."""
    torch.set_num_threads(options.pop("threads", 2))
    side = options.pop("side")
    return {"weft": weft_job, "trl": trl_job}[side](**options)  # type: ignore[operator]


def weft_job(
    base: str, rows: int, seed: int, train: dict[str, Any] | None = None, quantize: str | None = None,
    verbs: bool = False, rank: int = 16,
) -> dict[str, Any]:  # fmt: skip
    """The loop of `weft tune`, without its reports. verbs: read methods verb by verb, not as fused steps."""
    from rich.console import Console

    from weft.core import fused
    from weft.recipe import Recipe
    from weft.tune.evaluate import measure, pad_token
    from weft.tune.learn import make_learner
    from weft.tune.loop import Progressed
    from weft.tune.loop import train as train_all
    from weft.tune.session import attach_adapter, prepare

    if verbs:
        fused.fuses = lambda _: False  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.model_validate({
            "base": {"model": base, "quantize": quantize}, "data": {**DATA, "limit": rows},
            "method": {"name": "lora", "rank": rank, "alpha": 2 * rank},
            "train": {**BASE_TRAIN, "seed": seed, **(train or {})}, "forgetting": None, "check": None,
            "output": f"{folder}/run",
        })  # fmt: skip
        session = prepare(recipe, Console(file=sys.stderr).print)
        gc.collect()
        before, peak = resident_bytes(), Peak(session.device)
        attach_adapter(session)
        learner, marks, done = make_learner(session), [time.perf_counter()], Progressed()
        result = {"tokens": 0}

        def after(step: Any) -> bool:
            marks.append(time.perf_counter())
            result["tokens"] += step.num_tokens
            return True

        pad = pad_token(session.tokenizer)
        train_all(learner, session.splits.train, recipe.train, done, pad_token=pad, after_step=after)
        top = peak.bytes() - before
        loss = measure(session.model, session.tokenizer, session.splits.validation.examples)["loss"]  # type: ignore[union-attr]
    return _found(marks, result["tokens"], top, loss)


def trl_job(
    base: str, rows: int, seed: int, args: dict[str, Any] | None = None, quantize: str | None = None, rank: int = 16
) -> dict[str, Any]:
    """SFTTrainer with a PEFT LoRA on the same tokens."""
    warnings.simplefilter("ignore")
    import datasets
    import peft
    import transformers
    from trl import SFTConfig, SFTTrainer

    from weft.base import load_base
    from weft.data import IGNORED, load_data
    from weft.recipe import Data
    from weft.tune.evaluate import measure, pad_token

    model, tokenizer = load_base(base, quantize=quantize)
    splits = load_data(Data(**DATA, limit=rows), tokenizer, task="causal-lm", context=512)
    examples = splits.train.examples
    table = datasets.Dataset.from_dict({
        "input_ids": [list(e.input_ids) for e in examples],
        "completion_mask": [[int(label != IGNORED) for label in e.labels] for e in examples],  # type: ignore[union-attr]
    })  # fmt: skip
    tokenizer.pad_token_id = pad_token(tokenizer)
    steps = -(-rows // BASE_TRAIN["batch_size"])  # type: ignore[operator]
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(**{
            "output_dir": folder, "num_train_epochs": 1, "per_device_train_batch_size": BASE_TRAIN["batch_size"],
            "learning_rate": BASE_TRAIN["learning_rate"], "lr_scheduler_type": "cosine",
            "warmup_steps": round(0.05 * steps), "seed": seed, "report_to": [], "save_strategy": "no",
            "logging_steps": 10_000, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
            "completion_only_loss": True, "max_length": None, "disable_tqdm": True, "pad_to_multiple_of": 1,
            **(args or {}),
        })  # fmt: skip
        adapter = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        marks: list[float] = []

        class Clock(transformers.TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                marks.append(time.perf_counter())

            def on_step_end(self, *_: Any, **__: Any) -> None:
                marks.append(time.perf_counter())

        gc.collect()
        before, peak = resident_bytes(), Peak(torch.device("cpu"))
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=table, processing_class=tokenizer, peft_config=adapter,
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
        top = peak.bytes() - before
        loss = measure(trainer.model, tokenizer, splits.validation.examples)["loss"]  # type: ignore[union-attr]
    return _found(marks, sum(len(e.input_ids) for e in examples), top, loss)


def _found(marks: list[float], tokens: int, top: int, loss: float) -> dict[str, Any]:
    """seconds: of all steps; step: the median of them without the first."""
    each = [b - a for a, b in pairwise(marks)]
    return {
        "seconds": sum(each), "step": statistics.median(each[1:] or each), "tokens": tokens,
        "tokens_per_second": tokens / sum(each), "peak": top, "loss": loss,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
