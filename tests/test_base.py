"""Loading a base: by name and by folder, in the dtype that was asked for, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import weft
from tests.common.language import llama
from weft.base import BaseError, find_base
from weft.errors import WeftError


def test_the_bundled_base() -> None:
    model, tokenizer = weft.load_base("pico")
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    batch = tokenizer("def add(a, b):\n    return a", return_tensors="pt")
    with torch.no_grad():
        assert model(**batch, labels=batch["input_ids"]).loss < 5  # a model that knows nothing has log 4096 = 8.3
    assert model.config._name_or_path == "pico"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    for file in Path(find_base("pico")).glob("tokenizer*"):
        shutil.copy(file, tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_keeps_its_numbers(folder: Path, dtype: Any) -> None:
    model, _ = weft.load_base(str(folder), dtype=dtype)
    stored = load_file(folder / "model.safetensors")
    assert type(model) is type(llama())
    assert all(torch.equal(p, stored[n].to(getattr(torch, dtype))) for n, p in model.named_parameters() if n in stored)
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}


def test_an_adapter_knows_its_base_by_the_weights(folder: Path, tmp_path: Path) -> None:
    one, _ = weft.load_base(str(folder))
    low, _ = weft.load_base(str(folder), dtype="bfloat16")
    weft.attach(one, weft.LoRA(rank=2), name="a")
    weft.save(one, tmp_path / "a")
    weft.load(low, tmp_path / "a")  # the dtype a base is loaded in does not matter
    assert {p.dtype for p in weft.parameters(low)} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("./nowhere", {}, "there is no base './nowhere'"),
        ("picco", {}, "did you mean 'pico'"),
        ("pico", {"dtype": "float23"}, "did you mean 'float32'"),
        ("pico", {"quantize": "nf5"}, "did you mean 'nf4'"),
    ],
)
def test_what_is_not_there_is_named(name: str, options: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        weft.load_base(name, **options)


def test_a_base_stored_as_a_pickle_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseError, match="could not be loaded"):
        weft.load_base(str(folder))
    assert issubclass(BaseError, WeftError)
