"""Tiny random language models, and batches for them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from weft.attach import records

SIZE = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama(**extra: Any) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, **SIZE, **extra,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def mistral() -> Any:
    config = transformers.MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=None, **SIZE,
    )  # fmt: skip
    return transformers.MistralForCausalLM(config).eval()


def gpt2(**extra: Any) -> Any:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SIZE, **extra)
    return transformers.GPT2LMHeadModel(config).eval()


def bert(cls: Any = transformers.BertForMaskedLM) -> Any:
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        **SIZE,
    )  # fmt: skip
    return cls(config).eval()


def t5() -> Any:
    config = transformers.T5Config(
        d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=96, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


CAUSAL = {"llama": llama, "mistral": mistral, "gpt2": gpt2}


def ids(rows: int = 2, size: int = 7) -> Tensor:
    return torch.randint(3, 96, (rows, size))


def padded(rows: Tensor, amounts: tuple[int, ...], side: str = "left") -> dict[str, Tensor]:
    """A batch whose rows have lost tokens to padding."""
    rows, mask = rows.clone(), torch.ones_like(rows)
    for i, n in enumerate(amounts):
        where = slice(0, n) if side == "left" else slice(rows.shape[1] - n, None)
        rows[i, where], mask[i, where] = 0, 0
    return {"input_ids": rows, "attention_mask": mask}


def tensors(model: nn.Module, name: str) -> dict[str, dict[str, Tensor]]:
    return {address: a.tensors() for address, a in records(model)[name].adapters.items()}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def generate(model: Any, batch: dict[str, Tensor], **how: Any) -> Tensor:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Position ids are not supported")  # PEFT drops them
        return model.generate(**batch, max_new_tokens=6, min_new_tokens=6, pad_token_id=0, **how)
