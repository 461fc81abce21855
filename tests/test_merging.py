"""Merged checkpoints: every shard once, in the format of the base's files, equal to the live adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import weft
from tests.common import language
from weft.errors import AdapterError
from weft.merging import check_checkpoint, merge_checkpoint

TOKENS = torch.arange(3, 23)[None]


def saved(model: Any, folder: Path, **options: Any) -> str:
    from tests.tune.runs import make_tokenizer

    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(folder, **options)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def trained(base: str, folder: Path, method: Any, **options: Any) -> tuple[Any, Path]:
    """The live model and its adapter's folder."""
    model, _ = weft.load_base(base)
    weft.attach(model, method, name=folder.name, **options)
    with torch.no_grad():
        for p in weft.parameters(model):
            p.add_(torch.randn_like(p) * 0.1)
    return model, weft.save(model, folder)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_shard_by_shard(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    base = saved(transformers.LlamaForCausalLM(config), tmp_path / "base", max_shard_size="8KB")
    live, adapter = trained(base, tmp_path / "a", weft.DoRA(rank=2), targets="all-linear")
    done = merge_checkpoint(None, [adapter], tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    assert len(names) > 3
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == names
    assert done.num_shards == len(names)
    assert not done.whole
    assert max(done.errors.values()) < 1e-6
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    held = {key: name for name in names for key in load_file(tmp_path / "out" / name)}
    assert held == index
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(merged), logits(live), atol=1e-5, rtol=1e-5)
    with weft.using(live, None):
        assert (logits(merged) - logits(live)).abs().max() > 1e-2
    assert check_checkpoint(tmp_path / "out", [adapter], route="a").passed
    assert not check_checkpoint(tmp_path / "out", [adapter], route=None).passed


def test_low_precision_says_what_it_cost(tmp_path: Path) -> None:
    base = saved(language.llama().to(torch.bfloat16), tmp_path / "base")
    _, adapter = trained(base, tmp_path / "a", weft.LoRA(rank=2), targets="mlp")
    done = merge_checkpoint(None, [adapter], tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert 1e-5 < max(done.errors.values()) < 1e-2
    assert "writing them in bfloat16" in str(done)
    exact, _ = weft.load_base(base, dtype="float32")
    weft.load(exact, adapter, "a")
    weft.merge(exact, "a")
    for address, error in done.errors.items():
        off = (exact.get_parameter(f"{address}.weight") - tensors[f"{address}.weight"].float()).abs().max().item()
        assert off == pytest.approx(error, rel=1e-4)


def test_a_blend_of_two(tmp_path: Path) -> None:
    base = saved(language.gpt2(), tmp_path / "base")
    live, first = trained(base, tmp_path / "a", weft.LoRA(rank=2))
    _, second = trained(base, tmp_path / "b", weft.IA3())
    weft.load(live, second, "b")
    route = {"a": 0.7, "b": 0.3}
    merge_checkpoint(None, [first, second], tmp_path / "out", route=route)
    weft.use(live, route)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(merged), logits(live), atol=1e-5, rtol=1e-5)
    with pytest.raises(AdapterError, match="say with a route"):
        merge_checkpoint(None, [first, second], tmp_path / "again")


def test_experts_stored_one_by_one(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64,
    )  # fmt: skip
    base = saved(transformers.MixtralForCausalLM(config), tmp_path / "base")
    live, adapter = trained(base, tmp_path / "a", weft.LoRA(rank=2), targets=["*.experts.gate_up_proj"])
    done = merge_checkpoint(None, [adapter], tmp_path / "out")
    assert done.whole
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(merged), logits(live), atol=1e-5, rtol=1e-5)


def test_nothing_is_left_of_a_refusal(tmp_path: Path) -> None:
    base = saved(language.llama(), tmp_path / "base")
    _, adapter = trained(base, tmp_path / "a", weft.Bottleneck(), targets="mlp")
    with pytest.raises(AdapterError, match="no weight can express it"):
        merge_checkpoint(None, [adapter], tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(AdapterError, match="is there already"):
        merge_checkpoint(None, [adapter], tmp_path / "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base", "there"]
