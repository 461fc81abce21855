"""The bundled model `pico` and example data load offline, are what their cards say, and do not leak."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parent.parent
PICO = ROOT / "src" / "weft" / "assets" / "pico"
DATA = ROOT / "examples" / "data"
SPLITS = ("train", "validation", "test")
KEYS = {
    "docstrings": {"prompt", "completion"},
    "preferences": {"prompt", "chosen", "rejected"},
    "packages": {"text", "label"},
    "headers": {"text"},
}
MEGABYTE = 1_000_000

pytestmark = pytest.mark.skipif(not DATA.exists(), reason="the example data is part of the repository only")


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(PICO, local_files_only=True)


@cache
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(PICO, local_files_only=True, dtype=torch.float32).eval()


@cache
def rows(task: str, split: str) -> list[dict[str, str]]:
    with (DATA / task / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def round_trip(text: str) -> str:
    return tokenizer().decode(tokenizer().encode(text, add_special_tokens=False), skip_special_tokens=False)


@settings(max_examples=150, deadline=None)
@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert round_trip(text) == text


def test_code_survives_the_tokenizer_and_keeps_indentation_whole() -> None:
    for row in rows("docstrings", "test")[:50]:
        assert round_trip(row["prompt"]) == row["prompt"]
    for spaces in (4, 8, 12, 16):
        assert len(tokenizer().encode("\n" + " " * spaces, add_special_tokens=False)) == 1


def test_the_vocabulary_is_the_models() -> None:
    names = ("<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    assert tokenizer().convert_tokens_to_ids(list(names)) == list(range(6))
    assert len(tokenizer()) == model().config.vocab_size == 4096
    assert model().generation_config.eos_token_id == [0, 5]


def test_the_chat_template_masks_what_the_assistant_says() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Write a Python function named f."},
        {"role": "assistant", "content": "def f():\n    pass"},
    ]
    encoded = tokenizer().apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer().decode(said) == "def f():\n    pass<|end|>"
    question = tokenizer().apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert tokenizer().apply_chat_template(messages, tokenize=False).startswith(question)
    assert question.endswith("<|assistant|>")


def test_the_chat_template_refuses_an_unknown_role() -> None:
    with pytest.raises(Exception, match="the role tool is unknown"):
        tokenizer().apply_chat_template([{"role": "tool", "content": "1"}], tokenize=False)


def test_the_weights_are_small_and_in_bfloat16() -> None:
    assert (PICO / "model.safetensors").stat().st_size <= 16 * MEGABYTE
    with safe_open(PICO / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert 5_000_000 < sum(parameter.numel() for parameter in model().parameters()) < 7_000_000


@torch.no_grad()
def bits_per_byte(texts: list[str]) -> float:
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[0, *tokenizer().encode(text, add_special_tokens=False)]])  # [1, T]
        logits = model()(ids[:, :-1], use_cache=False).logits[0]  # [T - 1, vocabulary]
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def test_pico_knows_the_held_out_packages_as_well_as_its_card_says() -> None:
    with (PICO / "heldout.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    assert 120_000 < sum(len(text.encode()) for text in texts) < 180_000
    short = [text for text in texts if len(tokenizer().encode(text)) < 512][:40]
    stated = re.search(r"fewer than ([\d.]+) bits per byte", (PICO / "README.md").read_text(encoding="utf-8"))
    assert stated is not None
    assert bits_per_byte(short) < float(stated[1]) < 3.0  # 8 is a uniform guess


def test_the_card_names_the_corpus_the_licence_and_the_measurements() -> None:
    text = (PICO / "README.md").read_text(encoding="utf-8")
    for expected in ("3.11", "SHA-256", "PSF-2.0", "bits per byte", "loss.svg", "| step |"):
        assert expected in text
    assert (PICO / "loss.svg").read_text(encoding="utf-8").lstrip().startswith("<?xml")


@pytest.mark.parametrize("task", KEYS)
def test_every_row_has_its_keys_and_the_readme_counts_them(task: str) -> None:
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    for split in SPLITS:
        assert all(set(row) == KEYS[task] and all(value.strip() for value in row.values()) for row in rows(task, split))
        assert f"| {task} | {split} | {len(rows(task, split))} |" in readme
    assert len(rows(task, "train")) > 2 * len(rows(task, "test")) > 100


@pytest.mark.parametrize("task", KEYS)
def test_no_source_file_is_in_two_splits(task: str) -> None:
    sources = json.loads((DATA / "modules.json").read_text(encoding="utf-8"))[task]
    assert all(sources[split] for split in SPLITS)
    assert Counter(source for split in SPLITS for source in sources[split]).most_common(1)[0][1] == 1


def test_one_module_has_one_split_in_all_tasks_and_none_is_of_a_held_out_package() -> None:
    sources = json.loads((DATA / "modules.json").read_text(encoding="utf-8"))
    both = [sources["docstrings"], sources["packages"]]
    assigned = {(source, split) for task in both for split in SPLITS for source in task[split]}
    assert len(assigned) == len({source for source, _ in assigned})
    held_out = {"concurrent", "dbm", "email", "html", "sqlite3", "tomllib", "wsgiref", "xmlrpc", "zoneinfo"}
    assert not held_out & {source.split("/", maxsplit=1)[0] for source, _ in assigned}


@pytest.mark.parametrize("task", KEYS)
def test_no_near_verbatim_copy_crosses_splits(task: str) -> None:
    def words(row: dict[str, str]) -> str:
        return " ".join(re.findall(r"[a-z0-9]+", " ".join(v for k, v in row.items() if k != "label").lower()))

    def runs(text: str) -> set[str]:
        parts = text.split()
        return {" ".join(parts[i : i + 5]) for i in range(max(1, len(parts) - 4))}

    places: dict[str, list[int]] = {}
    owners: list[tuple[str, int]] = []
    for split in SPLITS:
        for row in rows(task, split):
            mine = runs(words(row))
            shared = Counter(other for run in mine for other in places.get(run, ()))
            for other, count in shared.items():
                owner, size = owners[other]
                assert owner == split or count / (len(mine) + size - count) < 0.8
            for run in mine:
                places.setdefault(run, []).append(len(owners))
            owners.append((split, len(mine)))


def test_every_class_is_in_every_split() -> None:
    labels = [{row["label"] for row in rows("packages", split)} for split in SPLITS]
    assert labels[0] == labels[1] == labels[2]
    assert len(labels[0]) == 12
    assert max(Counter(row["label"] for row in rows("packages", "train")).values()) <= 150


def test_docstring_pairs_are_short_and_do_not_contain_their_answer() -> None:
    for split in SPLITS:
        for row in rows("docstrings", split):
            assert "\n" not in row["completion"]
            assert row["prompt"].lstrip().startswith(("def ", "async def ", "@"))
    pairs = rows("docstrings", "test")
    assert max(len(tokenizer().encode(row["prompt"] + row["completion"])) for row in pairs) <= 400
    assert sum(row["completion"] in row["prompt"] for row in pairs) <= len(pairs) // 100


def test_the_data_is_small() -> None:
    assert sum(file.stat().st_size for file in DATA.rglob("*") if file.is_file()) <= 4 * MEGABYTE
