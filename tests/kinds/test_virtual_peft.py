"""Virtual tokens with the same numbers through HF PEFT: the same logits, losses and texts."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import weft
from tests.common.language import CAUSAL, bert, close, generate, ids, padded, t5, tensors
from weft.attach import records

pytestmark = pytest.mark.oracle


def rival(model: nn.Module, config: peft.PeftConfig) -> Any:
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


@torch.no_grad()
def prompt_pair(model: Any, task: str, num: int = 5, **options: Any) -> tuple[Any, Any]:
    """The same random prompt through Weft and through PEFT."""
    other = rival(model, peft.PromptTuningConfig(task_type=task, num_virtual_tokens=num, **options))
    weft.attach(model, weft.PromptTuning(num_tokens=num), name="p")
    (own,) = tensors(model, "p").values()
    own["tokens"].copy_(other.prompt_encoder["default"].embedding.weight[:num])
    return model, other


@torch.no_grad()
def prefix_pair(model: Any, num: int = 4, projection: bool = False) -> tuple[Any, Any]:
    """The same random prefix through Weft and through PEFT."""
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=num, prefix_projection=projection, encoder_hidden_size=24
    )
    other = rival(model, config)
    weft.attach(model, weft.PrefixTuning(num_tokens=num, projection=projection, hidden_size=24), name="x")
    encoder = other.prompt_encoder["default"]
    if projection:
        first, _, last = encoder.transform
        shared = records(model)["x"].shared["prefix"].tensors()
        for name, value in (("E", encoder.embedding.weight), ("U", first.weight.T), ("u", first.bias)):
            shared[name].copy_(value)
        for i, own in enumerate(tensors(model, "x").values()):
            width = own["w"].shape[0]
            own["W"].copy_(last.weight.T[:, i * width : (i + 1) * width])
            own["w"].copy_(last.bias[i * width : (i + 1) * width])
        return model, other
    rows = encoder.embedding.weight.chunk(2 * len(tensors(model, "x")), dim=1)  # key and value of each layer in turn
    for i, own in enumerate(tensors(model, "x").values()):
        own["keys"].copy_(rows[2 * i])
        own["values"].copy_(rows[2 * i + 1])
    return model, other


@torch.no_grad()
def adaption_pair(model: Any, layers: int) -> tuple[Any, Any]:
    """The same LLaMA-Adapter, its gates open, through Weft and through PEFT."""
    other = rival(model, peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=6, adapter_layers=layers))
    weft.attach(model, weft.LlamaAdapter(num_tokens=6, num_layers=layers), name="a")
    theirs = dict(other.named_parameters())
    for address, own in tensors(model, "a").items():
        where = "base_model.model." + address.removesuffix(".attention")
        theirs[f"{where}.adaption_gate"].fill_(0.7)
        own["prompt"].copy_(theirs[f"{where}.adaption_prompt"][0])
        own["gate"].fill_(0.7)
    return model, other


@pytest.mark.parametrize("family", CAUSAL)
def test_prompt_equals_peft_in_logits_and_loss(family: str) -> None:
    ours, theirs = prompt_pair(CAUSAL[family](), "CAUSAL_LM")
    batch = padded(ids(), (0, 2), "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    mine, other = ours(**batch, labels=labels), theirs(**batch, labels=labels)
    assert mine.logits.shape[1] == 7
    assert other.logits.shape[1] == 12
    close(mine.logits, other.logits[:, 5:])
    close(mine.loss, other.loss)
    close(ours(**batch).logits, mine.logits, 1e-6)
    (a,), b = torch.autograd.grad(mine.loss, weft.parameters(ours)), theirs.prompt_encoder["default"].embedding.weight
    close(a, torch.autograd.grad(other.loss, b)[0])


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("family", CAUSAL)
def test_prefix_equals_peft_in_logits_and_loss(family: str, projection: bool) -> None:
    ours, theirs = prefix_pair(CAUSAL[family](), projection=projection)
    for batch in ({"input_ids": ids()}, padded(ids(), (0, 2), "right")):
        mine, other = ours(**batch, labels=batch["input_ids"]), theirs(**batch, labels=batch["input_ids"])
        close(mine.logits, other.logits)
        close(mine.loss, other.loss)
        close(ours(**batch, use_cache=False).logits, other.logits)


@pytest.mark.parametrize("family", CAUSAL)
def test_llama_adapter_equals_peft(family: str) -> None:
    ours, theirs = adaption_pair(CAUSAL[family](), layers=2)
    batch = {"input_ids": ids()}
    with weft.using(ours, None):
        closed = ours(**batch).logits
    close(ours(**batch).logits, theirs(**batch).logits)
    assert (ours(**batch).logits - closed).abs().max() > 1e-3


def test_bert_prompt_equals_peft() -> None:
    model = bert(transformers.BertForSequenceClassification)
    ours, theirs = prompt_pair(model, "SEQ_CLS")
    batch = {**padded(ids(), (0, 2), "right"), "token_type_ids": torch.ones(2, 7, dtype=torch.long)}
    labels = torch.tensor([0, 1])
    mine, other = ours(**batch, labels=labels), theirs(**batch, labels=labels)
    close(mine.logits, other.logits)
    close(mine.loss, other.loss)


def test_t5_prompt_equals_peft_also_in_generation() -> None:
    ours, theirs = prompt_pair(t5(), "SEQ_2_SEQ_LM")
    batch = padded(ids(), (0, 2), "right")
    labels = ids(2, 4)
    for inputs in (batch, {"input_ids": batch["input_ids"]}):
        mine, other = ours(**inputs, labels=labels), theirs(**inputs, labels=labels)
        close(mine.logits, other.logits)
        close(mine.loss, other.loss)
    for how in ({}, {"num_beams": 3}, {"use_cache": False}):
        options = {**batch, "max_new_tokens": 6, "min_new_tokens": 6, **how}
        assert torch.equal(ours.generate(**options), theirs.generate(**options))


GENERATIONS: list[dict[str, Any]] = [
    {}, {"use_cache": False}, {"num_beams": 3}, {"num_beams": 2, "use_cache": False},
    {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2},
]  # fmt: skip


@pytest.mark.parametrize("how", GENERATIONS, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("pair", ["prompt", "prefix"])
def test_generation_equals_peft(pair: str, family: str, how: dict[str, Any]) -> None:
    model = CAUSAL[family]()
    ours, theirs = prompt_pair(model, "CAUSAL_LM") if pair == "prompt" else prefix_pair(model)
    batch = {"input_ids": ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    # without a cache PEFT loses the prefix after the first token: what it says with one counts
    same = {**how, "use_cache": True} if pair == "prefix" else how
    assert torch.equal(generate(ours, batch, **how), generate(theirs, batch, **same))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("pair", ["prompt", "prefix"])
def test_left_padded_rows_generate_what_peft_does_for_the_row_alone(pair: str, family: str, use_cache: bool) -> None:
    model = CAUSAL[family]()
    ours, theirs = prompt_pair(model, "CAUSAL_LM") if pair == "prompt" else prefix_pair(model)
    batch = padded(ids(2), (0, 3))
    alone = {"input_ids": batch["input_ids"][1:, 3:], "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    mine = generate(ours, batch, use_cache=use_cache)
    assert torch.equal(mine[1, 7:], generate(theirs, alone)[0, 4:])
