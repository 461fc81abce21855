"""Adapters of any methods under a router: one adapter, which is what its parts say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import weft
from tests.common.language import ids, llama
from weft.attach import records
from weft.errors import AdapterError

TOKENS = ids()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = llama()
    weft.attach(model, weft.LoRA(rank=3), ["q_proj", "v_proj"], name="math", seed=1)
    weft.attach(model, weft.IA3(), ["v_proj", "down_proj"], name="code", seed=2)
    weft.attach(model, weft.VeRA(rank=4), ["q_proj", "up_proj"], name="law", seed=3)
    with torch.no_grad():
        for p in weft.parameters(model):
            p.add_(0.2 * torch.randn_like(p))
    return model


def logits(model: nn.Module, route: object) -> torch.Tensor:
    with torch.no_grad(), weft.using(model, route):
        return model(TOKENS).logits


def test_each_expert_counts_where_its_adapter_sits(model: nn.Module) -> None:
    plan = weft.join(model, weft.TopK(k=None), ["math", "code", "law"], name="all")
    there = {s.site.address.rsplit(".", 1)[-1]: [e.name for e in s.method.experts] for s in plan.sites}
    assert there == {"q_proj": ["math", "law"], "v_proj": ["math", "code"], "down_proj": ["code"], "up_proj": ["law"]}


def test_a_router_of_one_is_its_adapter(model: nn.Module) -> None:
    for name in ("math", "code", "law"):
        alone = logits(model, name)
        weft.join(model, weft.TopK(k=1), [name], name="one")
        torch.testing.assert_close(logits(model, "one"), alone)
        weft.detach(model, "one")


def test_what_is_not_trained_is_not_copied(model: nn.Module) -> None:
    weft.join(model, weft.TopK(k=None), ["math", "law"], name="both")
    held = records(model)["both"].adapters["model.layers.0.self_attn.q_proj"]
    own = records(model)["math"].adapters["model.layers.0.self_attn.q_proj"]
    assert held.tensors()["math:A"].data_ptr() == own.tensors()["A"].data_ptr()
    assert {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if "both" in n and p.requires_grad} == {"G"}
    weft.join(model, weft.TopK(k=None), ["math"], name="trained", train_experts=True)
    held = records(model)["trained"].adapters["model.layers.0.self_attn.q_proj"]
    assert held.tensors()["math:A"].data_ptr() != own.tensors()["A"].data_ptr()
    assert held.tensors()["math:A"].requires_grad


def test_it_is_saved_and_loaded_without_its_parts(model: nn.Module, tmp_path: Path) -> None:
    weft.join(model, weft.TopK(k=1, balance=0), ["math", "code", "law"], name="all")
    expected = logits(model, "all")
    weft.save(model, tmp_path / "all", "all")
    torch.manual_seed(0)
    fresh = llama()
    weft.load(fresh, tmp_path / "all")
    assert torch.equal(logits(fresh, "all"), expected)


def test_it_shares_a_batch_with_others(model: nn.Module) -> None:
    weft.join(model, weft.TopK(k=1), ["math", "code", "law"], name="all")
    rows = ["all", "math", None, "code"]
    tokens = TOKENS[:1].expand(4, -1)
    with torch.no_grad():
        with weft.using(model, rows):
            mixed = model(tokens).logits
        for row, name in enumerate(rows):
            with weft.using(model, name):
                torch.testing.assert_close(mixed[row], model(tokens[:1]).logits[0])


def test_routers_nest(model: nn.Module) -> None:
    weft.join(model, weft.TopK(k=1), ["math", "code"], name="inner")
    weft.join(model, weft.TopK(k=None), ["inner", "law"], name="outer")
    outer = logits(model, "outer")
    assert not torch.equal(outer, logits(model, "inner"))
    weft.join(model, weft.TopK(k=1), ["inner"], name="same")
    torch.testing.assert_close(logits(model, "same"), logits(model, "inner"))


def test_its_choices_are_recorded(model: nn.Module) -> None:
    weft.join(model, weft.TopK(k=1), ["math", "law"], name="both")
    with weft.recording() as choices:
        logits(model, "both")
    gates = choices.gates("model.layers.0.self_attn.q_proj")
    assert gates.shape == (TOKENS.numel(), 2)
    torch.testing.assert_close(gates.sum(-1), torch.ones(TOKENS.numel()))
    assert set(gates.unique().tolist()) <= {0.0, 1.0}
    assert choices.shares()["model.layers.0.mlp.up_proj"] == {"law": pytest.approx(1.0)}


def test_what_cannot_be_joined_says_why(model: nn.Module) -> None:
    with pytest.raises(AdapterError, match=r"no adapter 'maths'.*math"):
        weft.join(model, weft.TopK(), ["maths"])
    with pytest.raises(ValueError, match="has experts already"):
        weft.join(model, weft.TopK(experts=weft.experts(weft.LoRA(), 2)), ["math"])
    with pytest.raises(ValueError, match="k=2 is more than its 1 experts"):
        weft.join(model, weft.TopK(k=2), ["math"])
    with pytest.raises(ValueError, match="has no experts to weigh"):
        weft.attach(model, weft.TopK(), name="none")
    weft.attach(model, weft.methods()["norm_tuning"](), name="norms")
    with pytest.raises(ValueError, match="kind norm"):
        weft.join(model, weft.TopK(k=1), ["norms"])


def test_layers_have_routes_of_their_own(model: nn.Module) -> None:
    route = weft.Layers({"0": "math", "1-2": {"code": 0.5, "law": 0.5}})
    with torch.no_grad(), weft.using(model, route):
        model(TOKENS)
    expected = {}
    for layer, name in (("0", "math"), ("2", "code")):
        module = model.get_submodule(f"model.layers.{layer}.self_attn.v_proj")
        x = torch.randn(1, 4, 32)
        with torch.no_grad():
            with weft.using(model, route):
                mine = module(x)
            with weft.using(model, name if layer == "0" else {"code": 0.5}):
                expected[layer] = module(x)
        torch.testing.assert_close(mine, expected[layer])
    live = logits(model, route)
    weft.merge(model, route)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, live, atol=1e-4, rtol=1e-4)
    weft.unmerge(model)
    with pytest.raises(ValueError, match="names layer 1"):
        weft.Layers({"0-1": "math", "1": "code"})
    with pytest.raises(ValueError, match="expected numbers and ranges"):
        weft.Layers({"3-1": "math"})


def test_spans_of_tokens_have_routes_of_their_own(model: nn.Module) -> None:
    route = weft.Split(("math", 3), (None, 2), ({"code": 0.5}, None))
    module, x = model.get_submodule("model.layers.1.self_attn.v_proj"), torch.randn(2, 8, 32)
    with torch.no_grad():
        with weft.using(model, route):
            mixed = module(x)
        for name, low, high in (("math", 0, 3), (None, 3, 5), ({"code": 0.5}, 5, 8)):
            with weft.using(model, name):
                torch.testing.assert_close(mixed[:, low:high], module(x)[:, low:high])
    with pytest.raises(ValueError, match="None, the rest, comes last"):
        weft.Split(("math", None), ("code", 2))
    with pytest.raises(AdapterError, match="per span of tokens"):
        weft.merge(model, route)


def test_spans_go_on_behind_a_cache(model: nn.Module) -> None:
    route = weft.Split(("math", 4), ("code", None))
    whole = logits(model, route)
    with torch.no_grad(), weft.using(model, route):
        cut = TOKENS.shape[1] - 3
        first = model(TOKENS[:, :cut], use_cache=True)
        rest = model(TOKENS[:, cut:], past_key_values=first.past_key_values).logits
        row = model(TOKENS).logits
        with weft.using(model, [route, "math"]):
            both = model(TOKENS[:1].expand(2, -1)).logits
    torch.testing.assert_close(rest, whole[:, cut:])
    torch.testing.assert_close(row, whole)
    torch.testing.assert_close(both[0], whole[0])


def test_layers_may_have_other_numbers_of_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama()
    few = {"experts": {"name": "lora", "rank": 2, "count": 2}}
    method = weft.TopK(experts=weft.experts(weft.LoRA(rank=2), 4))
    plan = weft.attach(model, method, {r"re:.*layers\.0\..*q_proj": few, "q_proj": {}}, name="mola")
    assert [len(s.method.experts) for s in plan.sites] == [2, 4, 4]
    weft.save(model, tmp_path / "mola", "mola")
    torch.manual_seed(0)
    fresh = llama()
    weft.load(fresh, tmp_path / "mola")
    assert torch.equal(logits(fresh, "mola"), logits(model, "mola"))


def test_blocks_of_tokens_apart_are_split_and_others_say_why_not(model: nn.Module) -> None:
    weft.attach(model, weft.Bottleneck(width=4), "mlp-blocks", name="mlps", seed=4)
    weft.attach(model, weft.Bottleneck(width=4), "attention-blocks", name="attentions", seed=5)
    with torch.no_grad():
        for p in [*weft.parameters(model, "mlps"), *weft.parameters(model, "attentions")]:
            p.add_(0.2 * torch.randn_like(p))
    block, x = model.get_submodule("model.layers.0.mlp"), torch.randn(2, 6, 32)
    with torch.no_grad():
        with weft.using(model, weft.Split(("mlps", 2), (None, None))):
            mixed = block(x)
        for name, part in (("mlps", slice(0, 2)), (None, slice(2, 6))):
            with weft.using(model, name):
                torch.testing.assert_close(mixed[:, part], block(x)[:, part])
    with pytest.raises(TypeError, match="mixes tokens"), weft.using(model, weft.Split(("attentions", 2))):
        model(TOKENS)
