"""The parity gate: every method through every form of it, a difference that is found, and a model left as it came."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.common.language import ids, llama, t5
from weft.errors import AdapterError
from weft.quantise import quantise_model

ENCODERS_ONLY = {"soft_slots"}  # every other method has a place in a decoder
METHODS = sorted({n for n, cls in weft.methods().items() if cls.__module__.startswith("weft.")} - ENCODERS_ONLY)


def small(name: str) -> dict[str, Any]:
    """Options that fit a tiny model: those of the method's dense reference, where it has one."""
    own: dict[str, dict[str, Any]] = {
        "prompt": {"num_tokens": 3}, "prefix": {"num_tokens": 3}, "llama_adapter": {"num_tokens": 3, "num_layers": 2},
        "multitask_prompt": {"num_tokens": 3}, "p_tuning": {"num_tokens": 3}, "cartridge": {"num_tokens": 3},
        "cpt": {"init_ids": (5, 6, 7)}, "smt": {"block": 4, "choose": "random"},
        "fourierft": {"num_frequencies": 20}, "vera": {"rank": 4},
        "xlora": {"experts": weft.experts(weft.LoRA(rank=1), 2), "hidden_size": 32},
    }  # fmt: skip
    if name in own or importlib.util.find_spec(f"tests.common.references.{name}") is None:
        return own.get(name, {})
    found: dict[str, Any] = importlib.import_module(f"tests.common.references.{name}").SMALL[0]
    return found


SMALL = {name: small(name) for name in METHODS}
needs_quantisation = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs weft[quant]")


def adapted(name: str, model: nn.Module | None = None, **options: Any) -> nn.Module:
    model = llama() if model is None else model
    method = weft.methods()[name](**{**SMALL.get(name, {}), **options})
    weft.attach(model, method, name="a")
    weft.given(model, **dict.fromkeys(method.conditions, 0))
    with torch.no_grad():
        for p in weft.parameters(model):
            p.add_(torch.randn_like(p) * 0.1)
    return model


def can_be_folded(model: nn.Module) -> bool:
    try:
        weft.merge(model, "a")
    except AdapterError:
        return False
    weft.unmerge(model)
    return True


@pytest.mark.parametrize("name", METHODS)
def test_every_form_of_every_method_agrees_or_says_why_it_is_not_there(name: str) -> None:
    model = adapted(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = weft.parity(model, "a", {"input_ids": ids()}, ways=("saved", "merged", "unmerged", "peft"))
    rows = {r.way: r for r in found.rows}
    assert found.passed, str(found)
    assert rows["saved"].max_logit_difference == 0
    merges = can_be_folded(model)
    assert (rows["merged"].max_logit_difference is not None) == merges
    assert all(r.note for r in found.rows if r.max_logit_difference is None)
    if merges:
        assert rows["unmerged"].max_logit_difference == 0
    assert merges or name not in ("lora", "dora", "vera", "ia3", "oft", "full", "shira", "lokr")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (model.weave.route, [*weft.adapters(model)]) == ("a", ["a"])


def test_what_does_not_agree_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("lora")
    monkeypatch.setattr("weft.kinds.seat.Seat.write_weight", lambda *_: None)
    found = weft.parity(model, "a", {"input_ids": ids()}, ways=("saved", "merged"))
    assert [r.passed for r in found.rows] == [True, False]
    assert not found.passed
    assert "DIFFERS" in str(found)


def test_padding_does_not_count() -> None:
    model, x = adapted("lora"), ids(2, 6)
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    model.register_forward_hook(lambda m, args, result: spoil(m, result, mask))
    assert weft.parity(model, "a", {"input_ids": x, "attention_mask": mask}, ways=("unmerged",)).passed
    assert not weft.parity(model, "a", {"input_ids": x}, ways=("unmerged",)).passed


def spoil(model: Any, result: Any, mask: torch.Tensor) -> Any:
    """Another number at padded positions in every call."""
    model.__dict__["calls"] = calls = model.__dict__.get("calls", 0) + 1
    result.logits = result.logits + calls * (1 - mask)[..., None]
    return result


def test_a_mode_and_a_route_come_back_after_an_error() -> None:
    model = adapted("lora").train()
    weft.use(model, None)
    with pytest.raises(ValueError, match="input_ids"):
        weft.parity(model, "a", {"nonsense": ids()})
    assert model.training
    assert model.weave.route is None


def test_unknown_forms_and_names_are_named() -> None:
    model = adapted("lora")
    with pytest.raises(ValueError, match="did you mean 'merged'"):
        weft.parity(model, "a", {"input_ids": ids()}, ways=("mergd",))
    with pytest.raises(ValueError, match="no adapter 'b'"):
        weft.parity(model, "b", {"input_ids": ids()})


@needs_quantisation
@pytest.mark.parametrize("name", ["lora", "prompt"])
def test_on_a_quantised_base(name: str) -> None:
    found = weft.parity(adapted(name), "a", {"input_ids": ids()}, ways=("quantized",))
    assert found.passed
    assert found.rows[0].note == "base in nf4"
    assert found.rows[0].max_logit_difference > 0
    model = llama()
    quantise_model(model, "torchao-int8")
    rows = weft.parity(adapted(name, model), "a", {"input_ids": ids()}, ways=("saved", "quantized")).rows
    assert rows[0].max_logit_difference == 0
    assert rows[1].note == "the base is quantised already"


@needs_quantisation
def test_layers_that_must_stay_in_float32_are_not_quantised() -> None:
    model = t5()
    quantise_model(model, "nf4")
    kinds = {n.rpartition(".")[2]: type(m).__name__ for n, m in model.named_modules()}
    assert (kinds["wo"], kinds["wi"], kinds["q"]) == ("Linear", "Linear4bit", "Linear4bit")
