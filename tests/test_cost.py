"""The cost reading: counts by hand, equal to what attaching makes, and nothing allocated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import weft
from tests.common.language import llama
from tests.test_parity import METHODS, SMALL
from weft.attach import records


class Allocated(TorchDispatchMode):
    """Notes every tensor of more than a few numbers that is made on a real device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, Tensor) and t.device.type != "meta" and t.numel() > 64:
                self.found.append((str(func), tuple(t.shape)))
        return result


@pytest.mark.parametrize("name", METHODS)
def test_counts_what_attaching_makes_and_allocates_nothing(name: str) -> None:
    method = weft.methods()[name](**SMALL.get(name, {}))
    with torch.device("meta"):
        model = llama()
    keys = [*model.state_dict()]
    with Allocated() as allocated:
        found = weft.cost(model, method)
    assert allocated.found == []
    assert [*model.state_dict()] == keys
    real = llama()
    weft.attach(real, method, name="a")
    record = records(real)["a"]
    holders = [*record.adapters.values(), *record.shared.values()]
    buffers = [b for h in holders for b in h.buffers()]
    assert found.parameters == sum(p.numel() for p in weft.parameters(real))
    assert found.frozen == sum(b.numel() for b in buffers)
    assert found.bytes == sum(t.numel() * t.element_size() for t in [*weft.parameters(real), *buffers])
    assert bool(found.uncounted) == (next(iter(method.kinds)) in ("input", "attention", "side") or method.surveys)


def test_flops_by_hand() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4))
    found = weft.cost(model, weft.LoRA(rank=2), "re:.*")
    assert found.flops_per_token == 2 * 2 * (8 + 12 + 12 + 4)
    assert found.base_flops_per_token == 2 * (8 * 12 + 12 * 4)
    assert weft.cost(model, weft.LoRA(rank=2), "0").flops_per_token == 2 * 2 * (8 + 12)
    conv = weft.cost(nn.Sequential(nn.Conv2d(3, 5, 3)), weft.LoRA(rank=2), "0")
    assert conv.flops_per_token == 2 * (2 * 27 + 2 * 5)
    assert "trained parameters    72" in str(found)
