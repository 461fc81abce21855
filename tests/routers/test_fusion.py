"""AdapterFusion: what it starts as, what keeps V near the identity, and what it records."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weft
from tests.common.language import ids, llama
from weft.attach import records

TOKENS = ids()
SITE = "model.layers.0.mlp.up_proj"


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = llama()
    for seed, name in enumerate(("math", "code")):
        weft.attach(model, weft.Bottleneck(width=4), ["up_proj"], name=name, seed=seed)
    with torch.no_grad():
        for p in weft.parameters(model):
            p.add_(0.2 * torch.randn_like(p))
    return model


def logits(model: nn.Module, route: object) -> torch.Tensor:
    with torch.no_grad(), weft.using(model, route):
        return model(TOKENS).logits


def test_experts_that_all_score_alike_are_averaged_until_it_is_trained(model: nn.Module) -> None:
    weft.join(model, weft.Fusion(), ["math", "code"], name="fused")
    with torch.no_grad():
        for adapter in records(model)["fused"].adapters.values():
            adapter.tensors()["K"].zero_()
    torch.testing.assert_close(logits(model, "fused"), logits(model, {"math": 0.5, "code": 0.5}))


def test_v_is_kept_near_the_identity(model: nn.Module) -> None:
    weft.join(model, weft.Fusion(regularisation=0.5), ["math", "code"], name="fused")
    adapter = records(model)["fused"].adapters[SITE]
    assert adapter.penalty() == 0
    with torch.no_grad():
        adapter.tensors()["V"][0, 1] += 2
    assert adapter.penalty().item() == pytest.approx(2)
    weft.join(model, weft.Fusion(regularisation=0), ["math", "code"], name="free")
    assert records(model)["free"].adapters[SITE].penalty() is None


def test_its_attention_is_recorded(model: nn.Module) -> None:
    weft.join(model, weft.Fusion(), ["math", "code"], name="fused")
    with weft.recording() as choices:
        logits(model, "fused")
    gates = choices.gates(SITE)
    assert gates.shape == (TOKENS.numel(), 2)
    torch.testing.assert_close(gates.sum(-1), torch.ones(TOKENS.numel()))
    assert choices.names[SITE] == ("math", "code")


def test_dropout_acts_in_training_only(model: nn.Module) -> None:
    weft.join(model, weft.Fusion(dropout=0.5), ["math", "code"], name="fused")
    assert torch.equal(logits(model, "fused"), logits(model, "fused"))
    model.train()
    assert not torch.equal(logits(model, "fused"), logits(model, "fused"))
