"""Fused experts: the tokens' reading, the weight's reading and the merged weight are one map, in every layout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AriaTextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import weft
from weft.core.route import Stack
from weft.kinds import experts as kind
from weft.kinds.experts import ExpertsSeat, is_experts, is_transposed

BOTH = ["gate_up_proj", "down_proj"]
SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def mixtral(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, **options)).eval()


def qwen() -> nn.Module:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, head_dim=4, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2)
    ).eval()


def gpt_oss() -> nn.Module:
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**SMALL, head_dim=4, num_local_experts=4, num_experts_per_tok=2)).eval()
    for p in model.parameters():  # its biases start at zero, which would hide a bias that is lost
        nn.init.normal_(p, std=0.3)
    return model


def llama4() -> nn.Module:
    torch.manual_seed(0)
    return Llama4ForCausalLM(
        Llama4TextConfig(
            **SMALL, head_dim=4, intermediate_size_mlp=24, num_local_experts=4, num_experts_per_tok=1, pad_token_id=0
        )
    ).eval()


def fill(model: nn.Module, name: str | None = None, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in weft.parameters(model, name):
            p += 0.3 * torch.randn(p.shape, generator=generator)


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


IDS = torch.arange(24).view(3, 8) % 40
MODELS = {"mixtral": mixtral, "qwen": qwen, "gpt_oss": gpt_oss, "llama4": llama4}
METHODS = {
    "lora": lambda: weft.LoRA(rank=3),
    "full": weft.Full,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


def materialised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kind, "_is_standard", lambda *_: False)


def test_what_experts_are() -> None:
    assert is_experts(mixtral().model.layers[0].mlp.experts)
    assert not is_transposed(mixtral().model.layers[0].mlp.experts)
    assert is_transposed(gpt_oss().model.layers[0].mlp.experts)
    assert is_transposed(llama4().model.layers[0].feed_forward.experts)  # it says nothing: its shapes do
    positions = nn.Module()
    positions.num_experts = 4
    positions.embedding = nn.Parameter(torch.zeros(1, 9, 16))
    assert not is_experts(positions)


def test_shape_is_seen_in_one_orientation() -> None:
    for model in (mixtral(), gpt_oss()):
        plan = weft.resolve(model, weft.LoRA(rank=2), BOTH)
        shapes = {s.site.address.rsplit(".", 1)[1]: (s.site.experts, *s.site.shape) for s in plan.sites}
        assert shapes == {"gate_up_proj": (4, 48, 16), "down_proj": (4, 16, 24)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "up", "down"])
def test_live_is_merged_and_unmerge_restores_the_bits(model: nn.Module, method: str, targets: list[str]) -> None:
    before = copy.deepcopy(model.state_dict())
    base = logits(model, IDS)
    weft.attach(model, METHODS[method](), targets)
    torch.testing.assert_close(logits(model, IDS), base, atol=1e-5, rtol=1e-5)
    fill(model)
    live = logits(model, IDS)
    assert (live - base).abs().max() > 1e-3
    errors = weft.merge(model, "default")
    assert max(errors.values()) < 1e-6
    torch.testing.assert_close(logits(model, IDS), live, atol=1e-4, rtol=1e-4)
    weft.unmerge(model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    weft.use(model, None)
    assert torch.equal(logits(model, IDS), base)
    weft.detach(model)
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen", "gpt_oss"])
def test_tokens_reading_is_weight_reading(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]()
    model.config._experts_implementation = implementation
    weft.attach(model, weft.LoRA(rank=3), BOTH)
    fill(model)
    by_tokens = logits(model, IDS)
    materialised(monkeypatch)
    torch.testing.assert_close(logits(model, IDS), by_tokens, atol=1e-4, rtol=1e-4)


def test_gradients_of_both_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixtral()
    weft.attach(model, weft.LoRA(rank=3), BOTH)
    fill(model)
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad.clone() for p in weft.parameters(model)])
        materialised(monkeypatch)
    assert all(g.abs().max() > 0 for g in grads[0])
    for by_tokens, by_weight in zip(*grads, strict=True):
        torch.testing.assert_close(by_tokens, by_weight, atol=1e-6, rtol=1e-3)
    assert all(p.grad is None for n, p in model.named_parameters() if ".adapters." not in n)


@pytest.mark.parametrize("reading", ["tokens", "weight"])
def test_rows_with_different_adapters(reading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixtral()
    for i, name in enumerate(("a", "b")):
        weft.attach(model, weft.LoRA(rank=2 + i), BOTH, name=name)
        fill(model, name, seed=i)
    if reading == "weight":
        materialised(monkeypatch)
    alone = []
    for row, name in enumerate(("b", None, "a")):
        weft.use(model, name)
        alone.append(logits(model, IDS[row : row + 1]))
    weft.use(model, ["b", None, "a"])
    torch.testing.assert_close(logits(model, IDS), torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert (alone[0] - alone[2]).abs().max() > 1e-3


def test_rows_are_refused_where_tokens_come_sorted() -> None:
    model = llama4()
    weft.attach(model, weft.LoRA(rank=2), BOTH)
    weft.use(model, ["default", None, "default"])
    with pytest.raises(ValueError, match="sorted by expert"):
        logits(model, IDS)


def test_blend_and_stack() -> None:
    model = mixtral()
    for i, name in enumerate(("a", "b")):
        weft.attach(model, weft.LoRA(rank=2), BOTH, name=name)
        fill(model, name, seed=i)
    for route in ({"a": 0.3, "b": -0.5}, Stack("a", "b")):
        weft.use(model, route)
        live = logits(model, IDS)
        weft.merge(model, route)
        torch.testing.assert_close(logits(model, IDS), live, atol=1e-4, rtol=1e-4)
        weft.unmerge(model)


def test_weight_is_computed_once_in_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    materialised(monkeypatch)
    model = mixtral(experts_implementation="eager")
    weft.attach(model, weft.LoRA(rank=2), BOTH)
    computed = []
    value = ExpertsSeat.value
    monkeypatch.setattr(
        ExpertsSeat, "value", lambda self, route: computed.append(self.site.address) or value(self, route)
    )
    logits(model, IDS)
    assert sorted(computed) == sorted(s.site.address for s in weft.adapters(model)["default"].sites)


@pytest.mark.parametrize(("cls", "config"), [
    (NemotronHExperts, NemotronHConfig(hidden_size=16, moe_intermediate_size=12, n_routed_experts=4)),
    (AriaExperts, AriaTextConfig(hidden_size=32, intermediate_size=12, moe_num_experts=4)),
], ids=["no gate", "transposed"])  # fmt: skip
def test_other_layouts(cls: type[nn.Module], config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config._experts_implementation = "eager"
    experts = cls(config)
    for p in experts.parameters():
        nn.init.normal_(p, std=0.3)
    model = nn.ModuleDict({"experts": experts})
    model.forward = experts.forward  # type: ignore[method-assign]
    weft.attach(model, weft.LoRA(rank=2), ExpertsSeat.params(experts))
    fill(model)
    x, index = torch.randn(10, config.hidden_size), torch.randint(0, 4, (10, 2))
    with torch.no_grad():
        arguments = (x, index, torch.rand(10, 2))
        by_tokens = experts(*arguments)
        materialised(monkeypatch)
        torch.testing.assert_close(experts(*arguments), by_tokens, atol=1e-5, rtol=1e-4)
        weft.use(model, None)
        assert (experts(*arguments) - by_tokens).abs().max() > 1e-3


def test_experts_without_tokens_raise_nothing() -> None:
    model = mixtral()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # every token goes to the first experts
    weft.attach(model, weft.LoRA(rank=2), BOTH)
    fill(model)
    logits(model, IDS[:, :1])
    model(input_ids=IDS[:, :1], labels=IDS[:, :1]).loss.backward()


@pytest.mark.oracle
def test_lora_agrees_with_peft() -> None:
    peft = pytest.importorskip("peft")
    ours, theirs = mixtral(), mixtral()
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    theirs = peft.get_peft_model(theirs, config)
    weft.attach(ours, weft.LoRA(rank=3, alpha=6.0), BOTH)
    fill(ours)
    wrapped = dict(theirs.named_modules())
    for address, adapter in _adapters(ours).items():
        path, _, param = address.rpartition(".")
        layer = wrapped[f"base_model.model.{path}"]
        while layer.parameter_name != param:
            layer = layer.base_layer
        a, b = adapter["A"], adapter["B"]  # [E, R, I], [E, O, R]
        layer.lora_A["default"].weight.data = a.flatten(0, 1)
        layer.lora_B["default"].weight.data = b.permute(1, 2, 0).flatten(1)
    torch.testing.assert_close(logits(ours, IDS), logits(theirs, IDS), atol=1e-5, rtol=1e-4)


def _adapters(model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    return {a: {k: t.data for k, t in s.adapters["default"].tensors().items()} for a, s in model.weave.seats.items()}
