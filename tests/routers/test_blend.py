"""Blends of trained adapters: learnt weights over any of them, at any kind of site, that merge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.common.language import close, ids, llama
from weft.attach import records
from weft.errors import AdapterError

TOKENS = ids()
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = llama()
    weft.attach(model, weft.LoRA(rank=3), ["q_proj", "v_proj"], name="math", seed=1)
    weft.attach(model, weft.IA3(), ["v_proj", "down_proj", "embed_tokens"], name="code", seed=2)
    with torch.no_grad():
        for p in weft.parameters(model):
            p.add_(0.2 * torch.randn_like(p))
    return model


def logits(model: nn.Module, route: object) -> Tensor:
    with torch.no_grad(), weft.using(model, route):
        return model(TOKENS).logits


def weights(model: nn.Module, address: str) -> dict[str, Tensor]:
    found = records(model)["mix"].adapters[address].tensors()
    return {k: t for k, t in found.items() if k.startswith("w_")}


@pytest.mark.parametrize("by_channel", [False, True])
def test_equal_weights_are_the_route_with_them(model: nn.Module, by_channel: bool) -> None:
    weft.join(model, weft.Blend(start=1.2, by_channel=by_channel), ["math", "code"], name="mix")
    for address, adapter in records(model)["mix"].adapters.items():
        for w in weights(model, address).values():
            assert w.shape == ((adapter.site.out_features,) if by_channel else (1,))
            close(w.detach(), torch.full_like(w, 1.2 / len(adapter.method.experts)))
            with torch.no_grad():
                w.fill_(0.4)
    close(logits(model, "mix"), logits(model, {"math": 0.4, "code": 0.4}))


def test_it_starts_as_the_base_where_its_weights_sum_to_nothing(model: nn.Module) -> None:
    weft.join(model, weft.Blend(start=0.0), ["math", "code"], name="mix")
    assert torch.equal(logits(model, "mix"), logits(model, None))
    with weft.using(model, "mix"):
        model(TOKENS).logits.square().mean().backward()
    trained = weft.parameters(model, "mix")
    assert len(trained) == sum(len(a.method.experts) for a in records(model)["mix"].adapters.values())
    assert all(p.grad is not None and p.grad.any() for p in trained)


def test_it_merges_at_every_kind_of_site(model: nn.Module) -> None:
    weft.join(model, weft.Blend(by_channel=True), ["math", "code"], name="mix")
    with torch.no_grad():
        for p in weft.parameters(model, "mix"):
            p.normal_()
    live, base = logits(model, "mix"), logits(model, None)
    weft.merge(model, "mix", keep=False)
    with torch.no_grad():
        merged = model(TOKENS).logits
    torch.testing.assert_close(merged, live, atol=1e-4, rtol=1e-4)
    assert (merged - base).abs().max() > 0.1


def test_shared_weights_know_every_expert_of_every_site(model: nn.Module) -> None:
    weft.join(model, weft.Blend(share_weights=True), ["math", "code"], name="mix")
    trained = weft.parameters(model, "mix")
    assert [p.numel() for p in trained] == [1, 1]
    with torch.no_grad():
        for p, value in zip(trained, (0.3, 0.8), strict=True):
            p.fill_(value)
    close(logits(model, "mix"), logits(model, {"math": 0.3, "code": 0.8}))
    with pytest.raises(ValueError, match="sites of one width"):
        weft.join(model, weft.Blend(share_weights=True, by_channel=True), ["math", "code"], name="other")


def test_pairs_are_one_pair_in_training(model: nn.Module) -> None:
    weft.attach(model, weft.LoRA(rank=2), ["q_proj"], name="law", seed=4)
    weft.join(model, weft.Blend(), ["math", "law"], name="mix", train_experts=True)
    seat = model.weave.seats[Q]
    x = torch.randn(2, 3, seat.site.in_features, requires_grad=True)
    with weft.using(model, "mix"):
        y = seat.run(x)
    assert type(y.grad_fn).__name__ == "MapBackward", "the map and all its experts are one step of autograd"


def test_dropout_leaves_whole_weights_out_in_training_only(model: nn.Module) -> None:
    weft.join(model, weft.Blend(dropout=0.5), ["code"], name="mix")
    assert torch.equal(logits(model, "mix"), logits(model, "mix"))
    model.train()
    seen = {logits(model, "mix").sum().item() for _ in range(6)}
    assert len(seen) > 1


def test_it_shows_its_weights_and_refuses_what_has_no_change(model: nn.Module) -> None:
    weft.join(model, weft.Blend(), ["math", "code"], name="mix")
    with weft.recording() as choices:
        logits(model, "mix")
    assert choices.gates(V).shape == (TOKENS.numel(), 2)
    assert choices.shares()[V] == {"math": pytest.approx(0.5), "code": pytest.approx(0.5)}
    weft.attach(model, weft.MultitaskPrompt(task=0), name="prompt")
    with pytest.raises(ValueError, match="of kind input"):
        weft.join(model, weft.Blend(), ["prompt"], name="no")
    with pytest.raises(AdapterError):
        weft.join(model, weft.Blend(), ["nothing"], name="no")
