"""Bottlenecks whose units are only in another order are the same adapter, and their aligned mean is that adapter."""

from __future__ import annotations

import itertools

import pytest
import torch

import weft
from tests.common.language import llama
from weft.aligning import _plan, combine_aligned
from weft.attach import records
from weft.combine import RuleError
from weft.errors import AdapterError

pytest.importorskip("ot")


def carrying(*widths, **options):
    torch.manual_seed(0)
    model = llama()
    for seed, width in enumerate(widths):
        method = weft.Bottleneck(width=width, **options)
        weft.attach(model, method, "mlp-blocks", name=f"a{seed}", seed=seed)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in weft.parameters(model, f"a{seed}"):
                p.add_(0.3 * torch.randn(p.shape, generator=draw))
    weft.use(model, None)
    return model


def shuffled(model, source, name):
    """The same adapter with its hidden units in another order."""
    weft.attach(model, next(iter(records(model)[source].adapters.values())).method, "mlp-blocks", name=name)
    weft.use(model, None)
    with torch.no_grad():
        for address, adapter in records(model)[source].adapters.items():
            order = torch.randperm(adapter.down.shape[0], generator=torch.Generator().manual_seed(len(address)))
            other = records(model)[name].adapters[address]
            for key in ("down", "down_bias"):
                getattr(other, key).copy_(getattr(adapter, key)[order])
            other.up.copy_(adapter.up[:, order])
            other.up_bias.copy_(adapter.up_bias)


def test_a_shuffled_adapter_is_found_to_be_the_same() -> None:
    model = carrying(6)
    shuffled(model, "a0", "b")
    found = combine_aligned(model, ["a0", "b"], name="both")
    for address, adapter in records(model)["a0"].adapters.items():
        for key, tensor in adapter.tensors().items():
            torch.testing.assert_close(records(model)["both"].adapters[address].tensors()[key], tensor)
    assert all(after < 1e-9 < before for before, after in found.distances.values())


def test_it_says_what_aligning_did() -> None:
    made = combine_aligned(carrying(6, 6), ["a0", "a1"], name="both")
    assert "both = linear(1 x a0, 1 x a1): bottleneck, " in str(made.as_combination())
    assert "without aligning them" in str(made.as_combination())


@torch.no_grad()
def test_what_is_moved_computes_the_same() -> None:
    model = carrying(6, 6)
    combine_aligned(model, {"a0": 0.0, "a1": 1.0}, name="only")
    ids = torch.arange(1, 9)[None]
    with weft.using(model, "a1"):
        wanted = model(ids).logits
    with weft.using(model, "only"):
        torch.testing.assert_close(model(ids).logits, wanted)


def test_the_plan_is_the_best_one() -> None:
    cost = torch.rand(4, 4, generator=torch.Generator().manual_seed(2))
    best = min(sum(float(cost[i, j]) for i, j in enumerate(order)) for order in itertools.permutations(range(4)))
    assert float((_plan(cost) * cost).sum()) == pytest.approx(best / 4)


def test_widths_may_differ_and_what_units_give_is_kept() -> None:
    model = carrying(4, 6)
    combine_aligned(model, {"a0": 0.0, "a1": 1.0}, name="only")
    for address, adapter in records(model)["only"].adapters.items():
        other = records(model)["a1"].adapters[address]
        assert adapter.down.shape[0] == 4
        torch.testing.assert_close(adapter.up.sum(1), other.up.sum(1))
        assert adapter.down.min() >= other.down.min()


@pytest.mark.parametrize(
    ("names", "error", "said"),
    [
        (["a0", "a9"], AdapterError, "no adapter 'a9'"),
        ({"a0": 1.0, "a1": -1.0}, RuleError, "do not add up to 0"),
        (["a0", "low"], AdapterError, "one of them alone adapts"),
        (["low"], AdapterError, "lora has no hidden units"),
        (["a0", "relu"], AdapterError, "only the width may differ"),
    ],
)
def test_what_cannot_be_averaged_is_said(names, error, said) -> None:
    model = carrying(4, 4)
    weft.attach(model, weft.LoRA(rank=2), "q_proj", name="low")
    weft.attach(model, weft.Bottleneck(width=4, activation="relu"), "mlp-blocks", name="relu")
    with pytest.raises(error, match=said):
        combine_aligned(model, names, name="both")
    assert "both" not in weft.adapters(model)
