"""Tensors in code in a file: the same tensors come back, and what is damaged or unknown is refused with a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weft
from weft import adapter as on_disk
from weft.adapter import AdapterFileError, native_tensors
from weft.attach import records
from weft.compress import Code, expanded, few_bits, half, packed, ternary
from weft.compress.code import code_class


def some() -> tuple[dict[str, Tensor], dict[str, Code]]:
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(4, 12, generator=draw) for name in "abcd"} | {"whole": torch.arange(3)}
    tensors["c"] = tensors["c"].bfloat16()
    codes = {"a": ternary(tensors["a"]), "b": few_bits(tensors["b"], bits=3, group_size=4), "c": half(tensors["c"])}
    return tensors, codes


def test_what_has_a_code_comes_back_as_it_and_the_rest_as_it_was() -> None:
    tensors, codes = some()
    held, facts = packed(tensors, codes)
    found = expanded(held, facts["packed"])
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], codes[name].tensor()) for name in codes)
    assert all(torch.equal(found[name], tensors[name]) for name in ("d", "whole"))
    assert found["c"].dtype == torch.bfloat16


def changed(
    change: Callable[[dict[str, Any]], Any],
) -> Callable[[dict[str, Tensor], str], tuple[dict[str, Tensor], str]]:
    def act(held: dict[str, Tensor], index: str) -> tuple[dict[str, Tensor], str]:
        known = json.loads(index)
        change(known)
        return held, json.dumps(known)

    return act


DAMAGE = {
    "another version": (changed(lambda i: i.update(version=9)), "in layout 9, and this Weft reads 1: upgrade weft"),
    "an unknown code": (changed(lambda i: i["tensors"]["a"].__setitem__(0, "ternery")), "no code 'ternery'.*ternary"),
    "another shape": (changed(lambda i: i["tensors"]["b"].__setitem__(2, [4, 24])), "b cannot be unpacked"),
    "other options": (changed(lambda i: i["tensors"]["b"].__setitem__(3, [3])), "b cannot be unpacked.*2 options"),
    "other places": (changed(lambda i: i["tensors"]["a"].__setitem__(3, [4, 1, 2])), "a cannot be unpacked"),
    "no numbers": (changed(lambda i: i["tensors"]["b"].__setitem__(4, -1)), "not the six parts"),
    "no format": (changed(lambda i: i["tensors"]["a"].__setitem__(1, "nn")), "no number format 'nn'"),
    "no index": (lambda held, index: (held, index[:-9]), "index of packed tensors is not readable"),
    "no bytes": (lambda held, index: ({"d": held["d"]}, index), "lacks packed.codes and packed.scales"),
    "fewer bytes": (lambda held, index: (held | {"packed.codes": held["packed.codes"][:-1]}, index), "it is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused_with_a_sentence(what: str) -> None:
    act, said = DAMAGE[what]
    held, facts = packed(*some())
    with pytest.raises(ValueError, match=said):
        expanded(*act(held, facts["packed"]))


def test_no_two_codes_have_one_name() -> None:
    assert [code_class(name).name for name in ("ternary", "gaussian", "half")] == ["ternary", "gaussian", "half"]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64))
    weft.attach(model, weft.methods()["lora"](rank=4), ["0", "1"], name="a")
    with torch.no_grad():
        for p in weft.parameters(model):
            p.normal_()
    return model


def saved(model: nn.Module, place: Path) -> dict[str, Code]:
    tensors = native_tensors(records(model)["a"])
    codes: dict[str, Code] = {name: few_bits(t, bits=2) for name, t in tensors.items() if name != "1.B"}
    weft.save(model, place, "a", held=packed(tensors, codes))
    return codes


def test_a_folder_in_code_loads_as_an_ordinary_adapter(model: nn.Module, tmp_path: Path) -> None:
    codes = saved(model, tmp_path / "small")
    weft.save(model, tmp_path / "large", "a", format="weft")
    small, large = ((tmp_path / n / "adapter_model.safetensors").stat().st_size for n in ("small", "large"))
    assert small < 0.6 * large
    weft.load(model, tmp_path / "small", "b")
    read, before = native_tensors(records(model)["b"]), native_tensors(records(model)["a"])
    assert all(torch.equal(t, codes[name].tensor() if name in codes else before[name]) for name, t in read.items())
    weft.save(model, tmp_path / "again", "b")  # ordinary again
    assert json.loads((tmp_path / "again/weft.json").read_text())["format"] == 1


def test_a_reader_of_plain_folders_says_what_to_do(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(model, tmp_path / "small")
    monkeypatch.setattr(on_disk, "FORMAT", 1)
    with pytest.raises(AdapterFileError, match="has format 2, this Weft reads up to 1: upgrade weft"):
        weft.load(model, tmp_path / "small", "b")


def test_a_damaged_folder_is_refused_by_name(model: nn.Module, tmp_path: Path) -> None:
    saved(model, tmp_path / "small")
    file = tmp_path / "small" / "adapter_model.safetensors"
    held = load_file(file)
    save_file({**held, "packed.codes": held["packed.codes"][:-1]}, file, {"packed": packed(*some())[1]["packed"]})
    with pytest.raises(AdapterFileError, match=r"small/adapter_model.safetensors: it packs .* it is damaged"):
        weft.load(model, tmp_path / "small", "b")
    assert [*records(model)] == ["a"]


def test_peft_is_not_given_what_it_cannot_read(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="PEFT reads no packed tensors"):
        weft.save(model, tmp_path / "small", "a", format="peft", held=({}, {}))
