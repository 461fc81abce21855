"""Tiny transformers of six architectures, and the state of a model that attaching leaves alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

SIZE = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, **TOKENS, num_key_value_heads=1)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32, **TOKENS)
    ),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZE, num_labels=3)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZE, **TOKENS, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2)
    ),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(**{k: v for k, v in SIZE.items() if k != "vocab_size"}, image_size=8, patch_size=4, num_labels=3)
    ),
}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return MODELS["llama"]().eval()


def state(model: nn.Module) -> tuple[dict[str, Tensor], list[bool], list[bool]]:
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    return tensors, [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]


def assert_same_state(one: tuple, two: tuple) -> None:
    assert one[0].keys() == two[0].keys()
    assert all(torch.equal(v, two[0][k]) for k, v in one[0].items())
    assert one[1:] == two[1:]
