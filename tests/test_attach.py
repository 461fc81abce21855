"""Attaching, switching and detaching leave one state in one place, and a route means the same for every row."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import weft
from tests.common.models import assert_same_state, llama, state
from weft.attach import AdapterError

LORA = weft.LoRA(rank=2)


def adapted(model: nn.Module, *names: str, method: weft.Method = LORA) -> nn.Module:
    """Adapters that change the outputs, each in its own way."""
    for i, name in enumerate(names):
        weft.attach(model, method, targets="all-linear", name=name, seed=i)
        torch.manual_seed(10 + i)
        with torch.no_grad():
            for p in weft.parameters(model, name):
                p.add_(torch.randn_like(p) * 0.3)
    return model


@pytest.mark.parametrize("name", ["", "a.b", "a b", "ä", "-x"])
def test_adapter_names(name: str) -> None:
    model = llama()
    with pytest.raises(AdapterError, match=r"use letters, digits"):
        weft.attach(model, LORA, name=name)
    assert type(model) is LlamaForCausalLM


def test_a_name_is_used_once() -> None:
    model = adapted(llama(), "math")
    before = state(model)
    with pytest.raises(AdapterError, match=r"already has an adapter 'math'; detach it first"):
        weft.attach(model, LORA, name="math")
    assert_same_state(state(model), before)
    with pytest.raises(AdapterError, match=r"has no adapter 'maht'; did you mean 'math'\?"):
        weft.use(model, "maht")
    assert model.weave.route == "math"


def test_detach_gives_back_the_model_that_came_in() -> None:
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    before, types = state(model), [type(m) for m in model.modules()]
    adapted(model, "a", "b")
    assert [n for n, p in model.named_parameters() if p.requires_grad and ".adapters." not in n] == []
    weft.detach(model, "a")
    assert weft.adapters(model).keys() == {"b"}
    weft.detach(model)
    assert_same_state(state(model), before)
    assert [type(m) for m in model.modules()] == types
    with pytest.raises(AdapterError, match=r"no adapter is attached to this LlamaForCausalLM"):
        weft.use(model, None)


def test_switching_never_changes_what_trains_or_any_weight() -> None:
    model = adapted(llama(), "a", "b")
    model.model.layers[0].train()
    before = state(model)
    with weft.using(model, None):
        for route in ("a", "b", ["a", "b"], {"a": 0.5, "b": 0.5}, weft.Stack("a", "b"), None):
            weft.use(model, route)
            assert_same_state(state(model), before)
            with torch.no_grad():
                model(torch.arange(12).view(2, 6))
            assert_same_state(state(model), before)


def test_a_route_is_removed_when_the_call_fails() -> None:
    model = adapted(llama(), "a", "b")
    weft.use(model, "a")
    with pytest.raises(RuntimeError, match="stop"), weft.using(model, "b"):
        raise RuntimeError("stop")
    assert model.weave.route == "a"
    with pytest.raises(AdapterError, match="has no adapter"), weft.using(model, "c"):
        pass
    assert model.weave.route == "a"
    with pytest.raises(ValueError, match="rows"), weft.using(model, ["a", "b", None]):
        model(torch.arange(12).view(2, 6))
    assert model.weave.route == "a"


@pytest.mark.parametrize(("rows", "batch"), [(3, 2), (2, 3), (2, 4), (1, 2)])
def test_rows_that_do_not_fit_the_batch_are_an_error(rows: int, batch: int) -> None:
    model = adapted(llama(), "a", "b")
    weft.use(model, ["a", "b", None][:rows])
    with pytest.raises(
        ValueError, match=rf"the route has {rows} rows and the batch has {batch}: give `weft.use` one entry"
    ):
        model(torch.ones(batch, 5, dtype=torch.long))


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}, {}],
)
def test_generation_under_rows_equals_one_by_one(options: dict[str, object]) -> None:
    model = adapted(llama(), "a", "b")
    ids = torch.randint(3, 32, (3, 5))
    count = options.get("num_return_sequences", 1)
    if options.get("do_sample"):
        options = {**options, "top_k": 1}  # sampling among one token: the same for every order of the draws
    common = {"max_new_tokens": 6, "attention_mask": torch.ones_like(ids), **options}
    weft.use(model, ["a", None, "b"])
    together = model.generate(ids, **common)
    assert model.weave.expand == 1
    changed = False
    for i, route in enumerate(["a", None, "b"]):
        weft.use(model, route)
        alone = model.generate(ids[i : i + 1], **{**common, "attention_mask": common["attention_mask"][:1]})
        mine = together[i * count : (i + 1) * count]
        width = max(alone.shape[1], mine.shape[1])
        pad = [torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in (alone, mine)]
        assert torch.equal(*pad)
        weft.use(model, None)
        base = model.generate(ids[i : i + 1], **{**common, "attention_mask": common["attention_mask"][:1]})
        changed = changed or base.shape != alone.shape or not torch.equal(base, alone)
    assert changed  # an adapter that does nothing would pass as well


@pytest.mark.parametrize(("method", "target"), [(weft.TensorTrain(rank=2), "1"), (weft.Bottleneck(width=2), "0")])
def test_adapters_of_a_sequential_are_none_of_its_steps(method: weft.Method, target: str) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), nn.Linear(8, 8))
    x = torch.randn(3, 8)
    before = model(x)
    weft.attach(model, method, targets=[target])
    assert torch.equal(model(x), before)
    assert (len(model), model[-1], [*model]) == (2, model[1], [model[0], model[1]])
    with torch.no_grad():
        for p in weft.parameters(model):
            p.normal_()
    assert not torch.allclose(model(x), before)
