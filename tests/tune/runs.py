"""A tiny base with its tokenizer, tiny data, recipes over them, and runs that can be killed."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from weft.recipe import Recipe
from weft.tune import checkpoint, tune

WORDS = ("red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "tree")


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def sentence(i: int, length: int = 5) -> str:
    return " ".join(WORDS[(i * 7 + k * k * (i % 3 + 1)) % len(WORDS)] for k in range(length))


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentence(i) for i in range(50)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", model_max_length=64
    )


def make_base(folder: Path) -> Path:
    """A random two-layer Llama with dropout in attention, and held-out text beside it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    write_rows(folder / "heldout.jsonl", [{"text": sentence(i + 1000, 12)} for i in range(6)])
    return folder


def make_encoder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_data(folder: Path) -> Path:
    """Prompts of uneven length whose completion repeats their first word."""
    for split, count, shift in (("train", 30, 0), ("validation", 9, 200), ("test", 7, 400)):
        texts = [f"{i + shift}: {sentence(i + shift, 2 + i % 5)}" for i in range(count)]
        rows = [{"prompt": t + "\n", "completion": " ".join(t.split()[1 : 2 + i % 3])} for i, t in enumerate(texts)]
        write_rows(folder / f"{split}.jsonl", rows)
        labelled = [{"text": text, "label": "cat" if "cat" in text else "none"} for text in texts]
        write_rows(folder / f"{split}-label.jsonl", labelled)
    return folder


def bare(base: Path, data: Path, output: Path, **train: Any) -> Recipe:
    """A recipe that only trains: nothing is shown, measured or compared that a test does not ask for."""
    return Recipe.model_validate(
        {
            "base": {"model": str(base)},
            "data": {"train": str(data / "train.jsonl")},
            "method": {"name": "lora", "rank": 2, "dropout": 0.3},
            "train": {
                "steps": 12,
                "batch_size": 4,
                "learning_rate": 1e-2,
                "threads": 1,
                "checkpoint_every": 3,
                **train,
            },
            "forgetting": None,
            "check": None,
            "report": {"html": False, "examples": 0, "forecast": False},
            "output": str(output),
        }
    )


def adapter_bits(folder: Path) -> dict[str, bytes]:
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    return {key: value.contiguous().view(torch.uint8).numpy().tobytes() for key, value in tensors.items()}


def run_quietly(recipe: Recipe, resume: bool) -> None:
    torch.set_num_threads(1)
    tune(recipe, resume=resume, console=quiet())


def run_and_die(recipe: Recipe, resume: bool, at: int) -> None:
    """Run, and be killed at the `at`-th moment of writing checkpoints: before a file, before a rename, after one."""
    count = 0

    def guarded(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                path = args[0]
                if path.suffix == ".safetensors":  # half a file
                    path.write_bytes(args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        return call

    checkpoint._write_file = guarded(checkpoint._write_file)
    checkpoint._sync_folder = guarded(checkpoint._sync_folder)
    run_quietly(recipe, resume)
