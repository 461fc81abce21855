"""Tiny random models of six architectures, and what crosses to and from HF PEFT with them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from tests.common import language
from weft.adapter import native_tensors
from weft.attach import records


@dataclass(frozen=True)
class Architecture:
    """A model, a batch for it, and names of its modules as PEFT and we both match them."""

    make: Callable[[], Any]
    linear: tuple[str, ...]
    head: str
    batch: Callable[[], dict[str, Tensor]]
    norm: tuple[str, ...] = ()
    conv: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()


def ids() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(3, 17).view(2, 7)}


def seq2seq() -> dict[str, Tensor]:
    return {**ids(), "decoder_input_ids": torch.ones(2, 3, dtype=torch.long)}


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.linspace(-1, 1, 1536).view(2, 3, 16, 16)}


def bert() -> Any:
    return language.bert(transformers.BertForSequenceClassification)


def mixtral() -> Any:
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, max_position_embeddings=64, **language.SIZE,
    )  # fmt: skip
    config._experts_implementation = "eager"
    return transformers.MixtralForCausalLM(config).eval()


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval()


ARCHITECTURES = {
    "llama": Architecture(
        language.llama, ("q_proj", "down_proj"), "lm_head", ids, ("input_layernorm", "model.norm"),
        embedding=("embed_tokens",),
    ),
    "gpt2": Architecture(
        language.gpt2, ("c_attn", "mlp.c_proj"), "lm_head", ids, ("ln_1",), embedding=("wte",),
    ),
    "bert": Architecture(
        bert, ("query", "intermediate.dense"), "classifier",
        ids, ("attention.output.LayerNorm",), embedding=("word_embeddings",),
    ),
    "t5": Architecture(
        language.t5, ("SelfAttention.q", "wo"), "lm_head", seq2seq,
        ("layer_norm",), embedding=("shared",),
    ),
    "mixtral": Architecture(
        mixtral, ("q_proj",), "lm_head", ids, ("input_layernorm",), embedding=("embed_tokens",),
        parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"),
    ),
    "vit": Architecture(
        vit, ("q_proj", "fc1"), "classifier", image,
        ("layernorm_before",), conv=("projection",),
    ),
}  # fmt: skip


@cache
def _base(name: str) -> Any:
    torch.manual_seed(7)
    model = ARCHITECTURES[name].make()
    with torch.no_grad():  # norms and biases that are all ones and zeros would hide mistakes
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def base(name: str) -> Any:
    """A fresh copy of an architecture's model: the same weights every time."""
    return copy.deepcopy(_base(name))


def shake(parameters: Any, size: float = 0.1) -> None:
    """Move trained tensors away from their start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=generator) * size)


def outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad(), quiet():
        return model(**batch).logits


def quiet() -> Any:
    """PEFT and transformers warn about what these tests do on purpose."""
    return warnings.catch_warnings(action="ignore")


def trained(model: Any, config: peft.PeftConfig, folder: Path | None = None, size: float = 0.1) -> Any:
    """PEFT's adapter on a model, its trained tensors shaken, and saved."""
    with quiet():
        theirs = peft.get_peft_model(model, config).eval()
        shake([p for p in theirs.parameters() if p.requires_grad], size)
        if folder is not None:
            theirs.save_pretrained(folder)
    return theirs


def reloaded(model: Any, folder: Path) -> Any:
    """What PEFT makes of a folder."""
    with quiet():
        return peft.PeftModel.from_pretrained(model, folder).eval()


def assert_close(found: Tensor, wanted: Tensor, plain: Tensor) -> None:
    """Equal to 1e-5, and not because the adapter does nothing."""
    if found.shape != wanted.shape:  # PEFT keeps the virtual tokens in front
        wanted = wanted[:, -found.shape[1] :]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (found - plain).abs().max() > 1e-3, "the adapter did nothing: nothing was compared"


def tensors_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Every tensor of an adapter by address and name."""
    return native_tensors(records(model)[name])


__all__ = [
    "ARCHITECTURES",
    "assert_close",
    "base",
    "outputs",
    "quiet",
    "reloaded",
    "shake",
    "tensors_of",
    "trained",
]
