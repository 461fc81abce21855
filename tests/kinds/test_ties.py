"""Tied weights: refused unless said how, adapted together or apart, and tied again by unmerge."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import weft
from weft.attach import AdapterError


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()


MODELS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "llama": (llama, "embed_tokens", "lm_head"),
    "gpt2": (gpt2, "wte", "lm_head"),
}
IDS = torch.arange(21).view(3, 7) % 40


@pytest.fixture(params=MODELS)
def tied(request: pytest.FixtureRequest) -> tuple[Any, str, str]:
    make, embedding, head = MODELS[request.param]
    model = make()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return model, embedding, head


def fill(model: nn.Module, name: str | None = None, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in weft.parameters(model, name):
            p += 0.3 * torch.randn(p.shape, generator=generator)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_refused_by_default_with_both_ways_out(tied: Any) -> None:
    model, embedding, head = tied
    before = type(model.get_input_embeddings())
    with pytest.raises(AdapterError, match=rf"{head}.*tied='share'.*tied='separate'"):
        weft.attach(model, weft.LoRA(rank=2), embedding)
    assert type(model.get_input_embeddings()) is before
    assert "weave" not in model.__dict__


@pytest.mark.parametrize("mode", ["share", "separate"])
@pytest.mark.parametrize("at", ["embedding", "head"])
def test_live_is_merged_and_unmerge_restores_bits_and_tie(tied: Any, mode: str, at: str, tmp_path: Path) -> None:
    model, embedding, head = tied
    base, bits, one = logits(model), copy.deepcopy(model.state_dict()), model.get_input_embeddings().weight
    weft.attach(model, weft.LoRA(rank=2), embedding if at == "embedding" else head, tied=mode)
    torch.testing.assert_close(logits(model), base, atol=1e-6, rtol=1e-5)
    fill(model)
    live = logits(model)
    weft.merge(model, "default")
    torch.testing.assert_close(logits(model), live, atol=1e-5, rtol=1e-4)
    inside, outside = model.get_input_embeddings(), model.get_output_embeddings()
    assert (inside._parameters["weight"] is outside._parameters["weight"]) == (mode == "share")
    assert model.config.tie_word_embeddings == (mode == "share")

    clean = {k: v for k, v in model.state_dict().items() if ".adapters." not in k}
    model.save_pretrained(tmp_path, state_dict=clean)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), live, atol=1e-5, rtol=1e-4)

    weft.unmerge(model)
    assert inside._parameters["weight"] is outside._parameters["weight"] is one
    assert model.config.tie_word_embeddings
    assert torch.equal(logits(model), live)
    weft.detach(model)
    assert all(torch.equal(v, bits[k]) for k, v in model.state_dict().items())
    assert model.state_dict().keys() == bits.keys()
    assert torch.equal(logits(model), base)
    assert inside.weight is outside.weight is one
    assert type(inside) is nn.Embedding
    assert type(outside) is nn.Linear


def test_share_means_that_both_change_and_separate_that_one_does() -> None:
    changed = {}
    for mode in ("share", "separate"):
        model = llama()
        weft.attach(model, weft.LoRA(rank=2), "embed_tokens", tied=mode)
        fill(model)
        h = torch.randn(2, 16)
        with torch.no_grad():
            changed[mode] = not torch.equal(model.lm_head(h), h @ model.lm_head._parameters["weight"].mT)
        effective = model.model.embed_tokens(torch.arange(40)).mT  # [I, V]
        if mode == "share":
            torch.testing.assert_close(model.lm_head(h), h @ effective, atol=1e-5, rtol=1e-4)
    assert changed == {"share": True, "separate": False}


def test_gradients_come_from_both_uses() -> None:
    grads = {}
    for mode in ("share", "separate"):
        model = llama()
        weft.attach(model, weft.LoRA(rank=2), "embed_tokens", tied=mode)
        fill(model)
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads[mode] = [p.grad for p in weft.parameters(model)]
    assert all(not torch.allclose(a, b) for a, b in zip(*grads.values(), strict=True))


def test_rows_of_a_batch(tied: Any) -> None:
    model, embedding, _ = tied
    for i, name in enumerate("ab"):
        weft.attach(model, weft.LoRA(rank=2), embedding, name=name, tied="share")
        fill(model, name, seed=i)
    alone = []
    for row, name in enumerate(("b", None, "a")):
        weft.use(model, name)
        alone.append(logits(model, IDS[row : row + 1]))
    weft.use(model, ["b", None, "a"])
    torch.testing.assert_close(logits(model), torch.cat(alone), atol=1e-5, rtol=1e-4)
    weft.use(model, {"a": 0.5, "b": 0.5})
    live = logits(model)
    weft.merge(model, {"a": 0.5, "b": 0.5})
    torch.testing.assert_close(logits(model), live, atol=1e-5, rtol=1e-4)


def test_three_holders() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()

    def run() -> Tensor:
        with torch.no_grad():
            return model(input_ids=IDS, decoder_input_ids=IDS[:, :4]).logits

    weft.attach(model, weft.LoRA(rank=2), "lm_head", tied="share")
    fill(model)
    live = run()
    weft.merge(model, "default")
    torch.testing.assert_close(run(), live, atol=1e-5, rtol=1e-4)
    weft.unmerge(model)
    assert model.lm_head._parameters["weight"] is model.shared._parameters["weight"]


def test_both_holders_targeted() -> None:
    model = llama()
    with pytest.raises(AdapterError, match="adapt only one of them"):
        weft.attach(model, weft.LoRA(rank=2), ["embed_tokens", "lm_head"], tied="share")
    one = model.lm_head.weight
    weft.attach(model, weft.LoRA(rank=2), ["embed_tokens", "lm_head"], tied="separate")
    fill(model)
    live = logits(model)
    weft.merge(model, "default")
    torch.testing.assert_close(logits(model), live, atol=1e-5, rtol=1e-4)
    weft.unmerge(model)
    assert model.lm_head._parameters["weight"] is model.model.embed_tokens._parameters["weight"] is one
    assert torch.equal(logits(model), live)


def test_one_way_at_a_time() -> None:
    model = llama()
    weft.attach(model, weft.LoRA(rank=2), "embed_tokens", name="a", tied="share")
    with pytest.raises(AdapterError, match="one way of being tied"):
        weft.attach(model, weft.LoRA(rank=2), "embed_tokens", name="b", tied="separate")
    with pytest.raises(AdapterError, match=r"model\.embed_tokens \(tied='share'\)"):
        weft.attach(model, weft.LoRA(rank=2), "lm_head", name="b", tied="share")
    with pytest.raises(ValueError, match="expected 'refuse'"):
        weft.attach(model, weft.LoRA(rank=2), "embed_tokens", name="b", tied="both")


def test_merge_for_good_keeps_what_was_trainable() -> None:
    model = llama()
    weft.attach(model, weft.LoRA(rank=2), "embed_tokens", tied="separate")
    fill(model)
    live = logits(model)
    weft.merge(model, "default", keep=False)
    torch.testing.assert_close(logits(model), live, atol=1e-5, rtol=1e-4)
    assert all(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_failed_merge_ties_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    weft.attach(model, weft.LoRA(rank=2), ["embed_tokens", "q_proj"], tied="separate")
    seat = model.weave.seats["model.layers.0.self_attn.q_proj"]
    monkeypatch.setattr(seat, "write", lambda value: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        weft.merge(model, "default")
    assert model.lm_head._parameters["weight"] is model.model.embed_tokens._parameters["weight"]
    assert model.config.tie_word_embeddings


def test_deepcopy_keeps_the_tie() -> None:
    model = llama()
    weft.attach(model, weft.LoRA(rank=2), "embed_tokens", tied="share")
    fill(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), logits(model))
    with torch.no_grad():
        weft.parameters(other)[0].zero_()
    assert not torch.equal(logits(other), logits(model))
    assert other.lm_head.__dict__["seats"]["weight"].leader.module is other.model.embed_tokens


def test_inputs_embeds_is_no_false_alarm() -> None:
    model = llama()  # the adapted embedding does not run here, and its weight is read by the head
    weft.attach(model, weft.LoRA(rank=2), "embed_tokens", tied="separate")
    with torch.no_grad():
        model(inputs_embeds=torch.randn(1, 4, 16))
