"""Forecasts of what trains in turns, and of starts that go by data or by what quantising lost."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tune import runs
from weft.core.starts import NEEDS, SUBTRACTED
from weft.kinds.packed import GPTQLinear, pack_bits, unpack_bits
from weft.plan.memory import Memory
from weft.recipe import Recipe
from weft.tune.ahead import foresee_memory, sampled
from weft.tune.skeleton import skeleton


def recipe(tiny: Path, *, method: dict[str, Any] | None = None, quantize: str | None = None, **train: Any) -> Recipe:
    made = runs.bare(tiny / "base", tiny / "data", tiny / "out", packing=False, **train)
    base = made.base.model_copy(update={"quantize": quantize})
    return made.model_copy(update={"base": base, "method": method or {"name": "lora", "rank": 2}})


def memory(wanted: Recipe) -> Memory:
    tokenizer, splits, _ = sampled(wanted)
    return foresee_memory(wanted, tokenizer, splits)


@pytest.mark.parametrize("optimizer", [{"name": "lisa", "layers": 1}, {"name": "badam", "period": 5}])
def test_one_of_two_layers_trains_at_a_time(tiny: Path, optimizer: dict[str, Any]) -> None:
    always, turns = memory(recipe(tiny)), memory(recipe(tiny, optimizer=optimizer))
    assert turns.optimizer == pytest.approx(always.optimizer / 2, rel=0.02)
    assert turns.adapters == always.adapters
    assert turns.activations < always.activations


def test_the_turn_with_the_most_memory_counts(tiny: Path) -> None:
    def turn(steps: int, *, middling: bool = False) -> Any:
        wanted = recipe(tiny, optimizer={"name": "badam", "period": 4, "order": "descending"}, steps=steps)
        tokenizer, splits, _ = sampled(wanted)
        return skeleton(wanted, tokenizer, splits, middling=middling)

    assert turn(4).turn == {1}  # the run ends before the lower layer has its turn
    assert turn(8).turn == {0}
    assert turn(8, middling=True).turn in ({0}, {1})
    assert skeleton(recipe(tiny), *sampled(recipe(tiny))[:2]).turn is None


def test_lisa_draws_what_the_run_draws(tiny: Path) -> None:
    """The layers are drawn with real numbers, though the model has none."""
    found = set()
    for seed in range(6):
        wanted = recipe(tiny, optimizer={"name": "lisa", "layers": 1}, seed=seed, steps=2)
        tokenizer, splits, _ = sampled(wanted)
        found.add(skeleton(wanted, tokenizer, splits).turn)
    assert found == {frozenset({0}), frozenset({1})}


@pytest.mark.parametrize("start", ["eva", "lora-ga", "loftq", "lq-lora-fisher", "apiq"])
def test_a_start_changes_no_shape(tiny: Path, start: str) -> None:
    quantize = "packed-int4" if "original" in NEEDS[start] else None
    plain = memory(recipe(tiny, quantize=quantize))
    found = memory(recipe(tiny, method={"name": "lora", "rank": 2, "start": start}, quantize=quantize))
    if start in SUBTRACTED:  # a copy of the start is kept, and taken off
        assert plain.adapters < found.adapters <= 2 * plain.adapters
    else:
        assert found == plain


class Live(TorchDispatchMode):
    """The most bytes of results that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[Any, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        storage = result.untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.alive.pop(key)), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


def test_packed_codes_become_a_weight_with_two_tensors_of_its_size() -> None:
    """What a forecast of a packed base says; one more for each step that keeps its input, two in int64."""
    layer = GPTQLinear.of(torch.randn(256, 512), None, 4, 64)
    with Live() as live:
        weight = layer.dequantize()
    assert live.most < 2.2 * weight.numel() * 4
    codes = torch.randint(0, 8, (64, 5), dtype=torch.int32)
    back = unpack_bits(pack_bits(codes, 3), 3, 64)
    assert back.dtype == torch.int32
    assert torch.equal(back, codes)
