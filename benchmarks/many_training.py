"""Claim: eight adapters trained in one batch of short rows take at most a third of the time of one by one."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.common import Claim, claim, llama
from weft.recipe import Recipe
from weft.tune import tune, tune_many

COUNT, STEPS, PAIRS = 8, 8, 3
WORDS = 1000
ALIKE = [{"name": "lora", "rank": 8}] * COUNT
MIXED = [
    *[{"name": "lora", "rank": 8}] * 2, *[{"name": "lora", "rank": 16}] * 2, *[{"name": "dora", "rank": 8}] * 2,
    {"name": "ia3"}, {"name": "oft", "block_size": 32},
]  # fmt: skip
CASES = (
    ("8 LoRA r=8, width 256, 1 row of 16 tokens each", 256, 1, 16, ALIKE),
    ("8 LoRA r=8, width 256, 2 rows of 16 tokens each", 256, 2, 16, ALIKE),
    ("8 LoRA r=8, width 256, 1 row of 64 tokens each", 256, 1, 64, ALIKE),
    ("8 LoRA r=8, width 512, 1 row of 16 tokens each", 512, 1, 16, ALIKE),
    ("2 LoRA r=8, 2 r=16, 2 DoRA, IA3, OFT, width 256, 1 row of 16 tokens each", 256, 1, 16, MIXED),
)


def run() -> list[Claim]:
    return [_measured(*case) for case in CASES]


def _measured(name: str, width: int, rows: int, tokens: int, methods: list[dict[str, Any]]) -> Claim:
    """Seconds of all steps, loading and measuring aside, as both commands log them."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = _base(folder / "base", width)
        together, alone = [], []
        for pair in range(PAIRS + 1):
            recipes = [_recipe(folder, base, f"{pair}-{i}", m, rows, tokens) for i, m in enumerate(methods)]
            sides = [(together, lambda r=recipes: _together(r)), (alone, lambda r=recipes: _alone(r))]
            for times, side in sides if pair % 2 else sides[::-1]:
                times.append(side())
    return claim(name, together[1:], alone[1:], target=1 / 3, what="one by one")


def _together(recipes: list[Recipe]) -> float:
    return max(result.seconds for result in tune_many(recipes, overwrite=True, console=_quiet()))


def _alone(recipes: list[Recipe]) -> float:
    return sum(tune(recipe, overwrite=True, console=_quiet()).seconds for recipe in recipes)


def _quiet() -> Console:
    return Console(file=io.StringIO())


def _base(folder: Path, width: int) -> Path:
    """A random Llama of eight layers with a tokenizer of one token a word."""
    model = llama(hidden_size=width, intermediate_size=width * 5 // 2, num_hidden_layers=8)
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<end>": 1} | {f"w{i}": i + 2 for i in range(WORDS)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    return folder


def _recipe(folder: Path, base: Path, name: str, method: dict[str, Any], rows: int, tokens: int) -> Recipe:
    """A run with data of its own, all of whose rows have the same length."""
    data = folder / f"{name}.jsonl"
    texts = [" ".join(f"w{(31 * i + 7 * k + len(name)) % WORDS}" for k in range(tokens - 1)) for i in range(16)]
    data.write_text("".join(json.dumps({"text": f"{i} {text}"[2:]}) + "\n" for i, text in enumerate(texts)))
    return Recipe.model_validate(
        {
            "base": {"model": str(base)},
            "data": {"train": str(data), "format": "text"},
            "method": method,
            "train": {"steps": STEPS, "batch_size": rows, "threads": 1, "checkpoint_every": None, "packing": False},
            "forgetting": None,
            "check": None,
            "report": {"html": False, "examples": 0, "forecast": False},
            "output": str(folder / name),
        }
    )
