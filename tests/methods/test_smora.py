"""SMoRA's load: what counts it, and what balances it."""

from __future__ import annotations

import torch
from torch import nn

import weft
from weft.attach import records
from weft.core import Part, Progress


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


def load_of(t: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        chosen = ((x @ t["G"].T).sigmoid() + t["c"]).topk(2).indices
    return torch.nn.functional.one_hot(chosen, 6).sum(1).float().mean(0)


def evolve(net: Net) -> None:
    adapter = records(net)["a"].adapters["site"]
    part = Part(adapter.site, adapter.tensors(), {}, lambda name, where: None)
    with torch.no_grad():
        adapter.method.evolve([part], Progress(1, 10))


def test_the_gradient_of_load_is_the_load_less_its_fair_share() -> None:
    net, t = woven()
    x = torch.randn(50, 8)
    net.train()(x).sum().backward()
    torch.testing.assert_close(1e6 * t["load"].grad, load_of(t, x) - 2 / 6)
    net.zero_grad()
    net.eval()(x).sum().backward()
    assert t["load"].grad is None


def test_a_step_moves_c_by_the_sign_of_what_is_missing() -> None:
    net, t = woven(bias_rate=0.25)
    x = torch.randn(50, 8)
    missing = 2 / 6 - load_of(t, x)
    for _ in range(2):  # two batches of a step
        net.train()(x).sum().backward()
    with torch.no_grad():
        t["load"].sub_(0.1)  # the optimiser's step
    evolve(net)
    torch.testing.assert_close(t["c"], 0.25 * missing.sign())
    assert not t["load"].any()


def test_training_evens_the_load_out() -> None:
    net, t = woven(bias_rate=0.01)
    x = torch.randn(200, 8) + 1
    with torch.no_grad():
        t["G"].copy_(torch.randn(6, 8) * 0.3)
    before = load_of(t, x).max()
    for _ in range(60):
        net.zero_grad()
        net.train()(x).sum().backward()
        evolve(net)
    assert before > 0.6
    assert load_of(t, x).max() < 0.45


def test_without_a_rate_there_is_no_c() -> None:
    _, t = woven(bias_rate=0.0)
    assert set(t) == {"A", "B", "G"}
