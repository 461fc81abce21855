"""Recomputing, choosing what to recompute, and moving away: the same bits, and really fewer of them kept."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MptConfig, MptForCausalLM

import weft
from weft.data import Batch
from weft.errors import WeftError
from weft.objectives import chunked_loss_of
from weft.tune.activations import (
    CHOICES,
    Choice,
    Cost,
    Kept,
    choose,
    fit,
    keep_activations,
    kept_bytes,
    layers_of,
    measure_costs,
    set_activations,
)
from weft.tune.activations.budget import peak_bytes
from weft.tune.offload import check_offload, offloading


def llama(attention: str = "sdpa", *, dropout: float = 0.0, num_layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, attention_dropout=dropout, attn_implementation=attention, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def adapted(method: weft.Method | None = None, **options: Any) -> LlamaForCausalLM:
    model = llama(**options)
    weft.attach(model, method or weft.LoRA(rank=2, dropout=0.2))
    with torch.no_grad():
        for p in weft.parameters(model):
            p.add_(torch.randn_like(p) * 0.05)
    return model.train()


def batch(length: int = 48, *, padded: bool = True) -> Batch:
    ids = torch.arange(2 * length).view(2, length) % 90 + 3
    mask = torch.ones_like(ids)
    mask[0, length - 9 :] = 0 if padded else 1
    return Batch(ids, mask, ids, 2 * (length - 1), 2 * length)


def step(model: nn.Module, rows: Batch) -> list[Tensor]:
    """The loss and all gradients, with the same draws of dropout every time."""
    loss_of, _ = chunked_loss_of("causal-lm", model)
    torch.manual_seed(5)
    loss = loss_of(model, rows)[0]
    trained = weft.parameters(model)
    return [loss, *torch.autograd.grad(loss, trained), torch.rand(1)]


def kept(model: nn.Module, rows: Batch) -> Kept:
    loss_of, _ = chunked_loss_of("causal-lm", model)
    return kept_bytes(model, lambda: loss_of(model, rows), layers=layers_of(model))


METHODS = {
    "lora": weft.LoRA(rank=2, dropout=0.2), "dora": weft.DoRA(rank=2), "bottleneck": weft.Bottleneck(),
    "prompt": weft.PromptTuning(num_tokens=3), "prefix": weft.PrefixTuning(num_tokens=3), "vera": weft.VeRA(rank=4),
}  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
def test_recomputing_changes_no_bit(method: str, attention: str) -> None:
    """Dropout in the adapter and in the attention is replayed; the generator ends where it would have ended."""
    model, rows = adapted(METHODS[method], attention=attention, dropout=0.1), batch()
    expected = step(model, rows)
    for choices in ("attention", "recompute", ("keep", "recompute", "attention")):
        set_activations(model, choices)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(step(model, rows), expected, strict=True)), choices
    keep_activations(model)
    assert all(torch.equal(a, b) for a, b in zip(step(model, rows), expected, strict=True))


@pytest.mark.parametrize(("method", "bits"), [("lora", False), ("dora", False), ("bottleneck", True), ("prefix", True)])
def test_recomputing_under_autocast(method: str, bits: bool) -> None:
    """Where several layers read one input, its cast is shared while it lives, which is shorter in a recomputed layer:
    gradients of the casts are then added up in float32 instead of bfloat16."""
    model, rows = adapted(METHODS[method]), batch()

    def under() -> list[Tensor]:
        loss_of, _ = chunked_loss_of("causal-lm", model)
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, rows)[0]
        return [loss, *torch.autograd.grad(loss, weft.parameters(model))]

    expected = under()
    for choice in CHOICES:
        set_activations(model, choice)
        found = under()
        assert torch.equal(found[0], expected[0])
        for a, b in zip(found, expected, strict=True):
            near = 0.0 if bits or choice != "recompute" else 5e-2 * float(b.detach().abs().max())
            torch.testing.assert_close(a, b, rtol=0, atol=near)


SHARE = {("eager", 0.0): 0.9, ("eager", 0.1): 0.7, ("sdpa", 0.1): 0.7, ("sdpa", 0.0): 0.98}
"""What is left with the attention core recomputed, at most; kernels that keep no scores have little to give."""


@pytest.mark.parametrize(("attention", "dropout"), SHARE)
def test_less_is_kept(attention: str, dropout: float) -> None:
    model, rows = adapted(attention=attention, dropout=dropout), batch()
    whole = kept(model, rows)
    set_activations(model, "attention")
    core = kept(model, rows)
    set_activations(model, "recompute")
    layer = kept(model, rows)
    hidden = 2 * 48 * 32 * 4
    assert core.layers[1] < SHARE[attention, dropout] * whole.layers[1]
    assert layer.layers[1] == hidden  # its input and no more
    assert layer.outside <= whole.outside
    set_activations(model, ["keep", "recompute", "keep"])
    mixed = kept(model, rows)
    assert mixed.layers == (whole.layers[0], hidden, whole.layers[2])
    set_activations(model, ["recompute", "keep", "keep"])
    assert kept(model, rows).layers == (hidden, *whole.layers[1:])  # what layers share is no layer's own


def test_counting_counts_what_a_forward_keeps_and_holds_none_of_it() -> None:
    first, second = nn.Linear(8, 16), nn.Linear(16, 4)
    model, x = nn.Sequential(first, nn.Tanh(), second), torch.randn(5, 8)
    found = kept_bytes(model, lambda: model(x), layers=[first, second])
    # x for the first weight; tanh's result for tanh and the second weight, once
    assert found == Kept((5 * 8 * 4, 0), 5 * 16 * 4)
    assert found.total == 5 * 24 * 4
    assert not first._forward_hooks
    assert not first._forward_pre_hooks


def test_what_cannot_be_recomputed_is_refused() -> None:
    with pytest.raises(WeftError, match="a Sequential has no layers that transformers can recompute"):
        set_activations(nn.Sequential(nn.Linear(2, 2)), "recompute")
    mpt = MptForCausalLM(MptConfig(vocab_size=101, d_model=16, n_heads=2, n_layers=1))
    with pytest.raises(WeftError, match="compute their attention themselves"):
        set_activations(mpt, "attention")
    set_activations(mpt, "recompute")
    keep_activations(mpt)
    with pytest.raises(WeftError, match="activation_budget: a Sequential has no layers"):
        measure_costs(nn.Sequential(nn.Linear(2, 2)), lambda: None)


def cost(keep: int, core: int, layer: int, slow: float) -> Cost:
    seconds: dict[Choice, float] = {"keep": 0.0, "attention": slow / 7, "recompute": slow}
    return Cost({"keep": keep, "attention": core, "recompute": layer}, seconds)


COSTS = st.lists(
    st.tuples(st.integers(50, 90), st.integers(20, 50), st.integers(1, 10), st.floats(0.1, 2.0)).map(
        lambda t: cost(*t)
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(costs=COSTS, limit=st.integers(40, 500), outside=st.integers(0, 30))
def test_the_choice_is_the_best_there_is(costs: list[Cost], limit: int, outside: int) -> None:
    """Against every possible choice. Bytes this small are counted one by one, so the answer is exact."""
    possible = [
        (sum(c.seconds[choice] for c, choice in zip(costs, each, strict=True)), each)
        for each in itertools.product(CHOICES, repeat=len(costs))
        if peak_bytes(costs, each, outside=outside) <= limit
    ]
    found = choose(costs, limit, outside=outside)
    if not possible:
        assert found is None
        return
    assert found is not None
    assert found.peak_bytes <= limit
    assert found.peak_bytes == peak_bytes(costs, found.choices, outside=outside)
    assert found.seconds == pytest.approx(min(possible)[0])


def test_large_sizes_stay_within_the_limit_and_the_last_layer_is_kept() -> None:
    costs = [cost(10**9, 6 * 10**8, 10**7, 1.0) for _ in range(24)]
    for share in (0.2, 0.5, 0.9):
        limit = int(24 * 10**9 * share)
        found = choose(costs, limit)
        assert found is not None
        assert 0.9 * limit < found.peak_bytes <= limit
        assert found.choices[-1] == "keep"  # all of it is there anyway when its backward begins
    unlimited = choose(costs, 25 * 10**9)
    assert unlimited is not None
    assert set(unlimited.choices) == {"keep"}


def test_a_budget_is_measured_chosen_and_kept() -> None:
    model, rows = adapted(attention="eager", num_layers=4), batch()
    loss_of, _ = chunked_loss_of("causal-lm", model)
    expected = step(model, rows)
    random = torch.get_rng_state()
    costs, outside = measure_costs(model, lambda: loss_of(model, rows))
    torch.set_rng_state(random)
    whole = kept(model, rows)
    assert tuple(c.kept_bytes["keep"] for c in costs) == whole.layers
    assert all(0 < c.seconds["attention"] < c.seconds["recompute"] for c in costs)
    limit = outside + int(0.6 * sum(whole.layers))
    chosen = fit(model, lambda: loss_of(model, rows), limit)
    assert {"keep"} < set(chosen.choices)
    now = kept(model, rows)
    assert now.total <= chosen.peak_bytes <= limit < whole.total
    assert all(torch.equal(a, b) for a, b in zip(step(model, rows), expected, strict=True))
    with pytest.raises(WeftError, match=r"train.activation_budget: 1,000 bytes; the largest batch needs [\d,]+ even"):
        fit(model, lambda: loss_of(model, rows), 1000)


def test_moved_away_and_back_is_the_same_bits() -> None:
    """On a CPU nothing is gained, so recipes refuse it; that nothing changes can be seen there all the same."""
    model, rows = adapted(), batch()
    expected = step(model, rows)
    moved: list[Tensor] = []
    copy = torch.Tensor.copy_

    def counted(self: Tensor, other: Tensor, non_blocking: bool = False) -> Tensor:
        moved.append(other)
        return copy(self, other, non_blocking)

    for choice in ("keep", "recompute"):
        set_activations(model, choice)  # type: ignore[arg-type]
        loss_of, _ = chunked_loss_of("causal-lm", model)
        torch.manual_seed(5)
        with pytest.MonkeyPatch.context() as patch, offloading(torch.device("cpu"), least_bytes=1024):
            patch.setattr(torch.Tensor, "copy_", counted)
            loss = loss_of(model, rows)[0]
        found = [loss, *torch.autograd.grad(loss, weft.parameters(model)), torch.rand(1)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    weights = {p.data_ptr() for p in model.parameters()}
    assert moved
    assert not any(t.data_ptr() in weights for t in moved)
    assert all(t.numel() * t.element_size() >= 1024 for t in moved)


def test_a_tensor_that_is_saved_twice_is_moved_once_and_another_in_its_place_is_not_mistaken_for_it() -> None:
    weight, x = torch.ones(512, requires_grad=True), torch.arange(512.0)
    moved: list[int] = []
    copy = torch.Tensor.copy_
    with pytest.MonkeyPatch.context() as patch, offloading(torch.device("cpu"), least_bytes=1024):
        patch.setattr(torch.Tensor, "copy_", lambda self, *rest, **named: moved.append(1) or copy(self, *rest, **named))
        same = weight * x + weight * x
        assert len(moved) == 1
        others = [weight * torch.full((512,), float(i)) for i in range(20)]  # each freed, and its place used again
    (gradient,) = torch.autograd.grad(same.sum() + sum(o.sum() for o in others), weight)
    assert torch.equal(gradient, 2 * x + sum(range(20)))


def test_weights_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(32, 32), torch.randn(4, 32, requires_grad=True)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *_, **__: pytest.fail("something was moved"))
    with offloading(torch.device("cpu"), least_bytes=1024):
        (layer(x) @ layer.weight.mT).sum().backward()  # the weight and a view of it; the rest is small


def test_a_cpu_has_nowhere_to_move_to() -> None:
    with pytest.raises(WeftError, match="offload_activations: the model is on the CPU"):
        check_offload(torch.device("cpu"))


def test_choices_are_those_of_the_recipe() -> None:
    from weft.recipe import Train

    assert Train.model_fields["activations"].annotation == Choice
