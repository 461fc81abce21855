"""Coefficients that are made once for all batches of a step: the same gradients, one computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import weft
from weft.core.adapter import Adapter
from weft.core.held import made_once
from weft.registry import method_class

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2}, "dora": {"rank": 2}, "oft": {"block_size": 4}, "boft": {}, "vera": {"rank": 3},
    "fourierft": {"num_frequencies": 9},
}  # fmt: skip


def model_with(name: str) -> tuple[nn.Module, list[Adapter]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    weft.attach(model, method_class(name)(**OPTIONS[name]), targets=["0", "2"], name="a")
    with torch.no_grad():
        for parameter in weft.parameters(model, "a"):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, [m for m in model.modules() if isinstance(m, Adapter)]


def gradients(model: nn.Module, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    for batch in batches:
        model(batch).square().sum().backward()
    return gathered(model)


def gathered(model: nn.Module) -> list[torch.Tensor]:
    found = [p.grad for p in weft.parameters(model, "a")]
    model.zero_grad()
    assert all(g is not None for g in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("name", OPTIONS)
def test_equal_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapters = model_with(name)
    batches = list(torch.randn(3, 4, 8, dtype=torch.float64).unbind())
    wanted = gradients(model, batches)
    calls: list[str] = []
    original = Adapter._compute
    monkeypatch.setattr(Adapter, "_compute", lambda self, op: (calls.append(self.site.address), original(self, op))[1])
    with made_once(adapters):
        for batch in batches:
            model(batch).square().sum().backward()
    for a, b in zip(gathered(model), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    if name != "fourierft":  # its delta is as large as the weight: made for every batch, held for none
        assert sorted(calls) == ["0", "2"]


def test_a_failed_step_holds_nothing() -> None:
    model, adapters = model_with("lora")
    with pytest.raises(RuntimeError, match="shapes"), made_once(adapters):
        model(torch.randn(1, 9, dtype=torch.float64))
    assert all(a.held is None for a in adapters)
