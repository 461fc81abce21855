"""SMoRA's load: what balances it, and that all ranks together are a LoRA."""

from __future__ import annotations

import torch
from torch import nn

import weft
from weft.attach import records


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.site(x)


def woven(**options: object) -> tuple[Net, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    net = Net()
    weft.attach(net, weft.SMoRA(rank=6, k=2, **options), ["site"], name="a")  # type: ignore[arg-type]
    return net, records(net)["a"].adapters["site"].tensors()


def test_the_gradient_of_c_is_the_load_less_its_fair_share() -> None:
    net, t = woven(balance=2.0)
    x = torch.randn(50, 8)
    net.train()(x).sum().backward()
    chosen = (x @ t["G"].T).topk(2).indices
    load = torch.nn.functional.one_hot(chosen, 6).sum(1).float().mean(0)
    torch.testing.assert_close(t["c"].grad, 2 * (load - 2 / 6))
    net.zero_grad()
    net.eval()(x).sum().backward()
    assert t["c"].grad is None


def test_training_c_evens_the_load_out() -> None:
    net, t = woven()
    x = torch.randn(200, 8) + 1
    with torch.no_grad():
        t["G"].copy_(torch.randn(6, 8) * 0.3)

    def worst() -> float:
        with torch.no_grad():
            chosen = (x @ t["G"].T + t["c"]).topk(2).indices
        return torch.nn.functional.one_hot(chosen, 6).sum(1).float().mean(0).max().item()

    before = worst()
    optimizer = torch.optim.Adam([t["c"]], 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        net.train()(x).sum().backward()
        optimizer.step()
    assert before > 0.6
    assert worst() < 0.45


def test_without_balance_there_is_no_c() -> None:
    _, t = woven(balance=0.0)
    assert set(t) == {"A", "B", "G"}
