"""Stochastic routing: one expert in a training step and at a site, and their mean when training is over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weft
from tests.common.language import close
from weft.attach import records

X = torch.linspace(-2, 2, 2 * 3 * 8).view(2, 3, 8).sin()
LORAS = weft.experts(weft.LoRA(rank=2), 3)


def made(router: Any, module: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8) if module is None else module)
    weft.attach(model, router, "0", name="s")
    with torch.no_grad():
        for p in weft.parameters(model):
            p.normal_()
    return model


def own(model: nn.Module) -> dict[str, Tensor]:
    return records(model)["s"].adapters["0"].tensors()


def update(t: dict[str, Tensor], k: int) -> Tensor:
    return 8 * t[f"{k}:B"] @ t[f"{k}:A"]  # alpha 16 and rank 2


def test_a_step_is_one_expert_and_trains_it_alone() -> None:
    model = made(weft.Stochastic(experts=LORAS)).train()
    base, t, seen = F.linear(X, model[0].weight, model[0].bias), own(model), []
    for _ in range(30):
        model.zero_grad()
        y = model(X)
        y.square().sum().backward()
        k = next(k for k in range(3) if (y - base - X @ update(t, k).mT).abs().max() < 1e-4)
        assert {name.partition(":")[0] for name, p in t.items() if p.grad is not None} == {str(k)}
        seen.append(k)
    assert set(seen) == {0, 1, 2}


def test_trained_it_is_the_mean_of_parameters_and_merges() -> None:
    model = made(weft.Stochastic(experts=LORAS)).eval()
    t = own(model)
    a, b = (torch.stack([t[f"{k}:{name}"] for k in range(3)]).mean(0) for name in "AB")
    wanted = F.linear(X, model[0].weight + 8 * b @ a, model[0].bias)
    close(model(X), wanted, 1e-4)
    weft.merge(model, "s", keep=False)
    assert type(model[0]) is nn.Linear
    close(model(X), wanted, 1e-4)


def test_unlike_experts_are_averaged_by_what_they_add() -> None:
    unlike = (LORAS[0], weft.experts(weft.IA3(), 2)[1])
    with pytest.raises(ValueError, match="give average='changes'"):
        made(weft.Stochastic(experts=unlike))
    model = made(weft.Stochastic(experts=unlike, average="changes")).eval()
    base, t = F.linear(X, model[0].weight, model[0].bias), own(model)
    gain = base * t["1:gain"] if "1:gain" in t else None
    assert gain is not None
    close(model(X), base + (X @ update(t, 0).mT + gain - base) / 2, 1e-4)


def test_places_have_no_mean() -> None:
    with pytest.raises(ValueError, match="the indices of these experts differ"):
        made(weft.Stochastic(experts=weft.experts(weft.SHiRA(rank=1), 2)))
    made(weft.Stochastic(experts=weft.experts(weft.SHiRA(rank=1), 2), average="changes"))


def test_redundancy_is_mixphms() -> None:
    model = made(weft.Stochastic(experts=LORAS[:1], redundancy=0.3)).train()
    t = own(model)
    model(X).sum().backward()
    found = {name: p.grad.clone() for name, p in t.items()}
    model.zero_grad()
    base, added = F.linear(X, model[0].weight, model[0].bias).flatten(0, 1), (X @ update(t, 0).mT).flatten(0, 1)
    u, h = (z / z.norm(dim=1, keepdim=True) for z in (added, base))
    c = u.mT @ h
    loss = 0.3 * (c.square().sum() - c.diagonal().square().sum()) / 2
    (base + added).sum().add(loss).backward()
    for name, p in t.items():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="tokens with channels"):
        made(weft.Stochastic(experts=LORAS, redundancy=0.3), nn.Conv2d(8, 8, 1))


@pytest.mark.parametrize(
    ("module", "x"),
    [(nn.Conv1d(8, 6, 1), X.mT), (nn.Embedding(5, 8), torch.tensor([[1, 4, 2]]))],
    ids=["conv", "embedding"],
)
def test_it_draws_at_other_kinds_too(module: nn.Module, x: Tensor) -> None:
    model = made(weft.Stochastic(experts=weft.experts(weft.LoRA(rank=1), 2)), module).train()
    with torch.no_grad():
        assert len({model(x).sum().item() for _ in range(20)}) == 2
        model.eval()
        assert len({model(x).sum().item() for _ in range(5)}) == 1


def test_what_was_drawn_is_recorded_and_compiled_steps_draw_too() -> None:
    model = made(weft.Stochastic(experts=LORAS)).train()
    with weft.recording() as choices, torch.no_grad():
        for _ in range(30):
            model(X)
    gates = choices.gates("0")
    assert set(gates.sum(1).tolist()) == {1.0}
    assert set(gates.argmax(1).tolist()) == {0, 1, 2}
    torch._dynamo.reset()
    compiled, t = torch.compile(model, fullgraph=True, backend="eager"), own(model)
    base = F.linear(X, model[0].weight, model[0].bias)
    each = [base + X @ update(t, k).mT for k in range(3)]
    for _ in range(5):
        y = compiled(X)
        assert min((y - wanted).abs().max().item() for wanted in each) < 1e-4
