"""Polytropon and multi-head routing beside PEFT: outputs, gradients, starts and draws."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import weft
from tests.methods.test_against_peft import ours, theirs
from weft.attach import AdapterError, records
from weft.core.skills import gates

oracle = pytest.mark.oracle
X = torch.linspace(-2, 2, 3 * 5 * 16).view(3, 5, 16).sin()
TASKS = [1, 0, 2]


class Two(nn.Module):
    """Two linear layers; as PEFT's layers are called, with the task of every row."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16, bias=False)

    def forward(self, x: Tensor, task_ids: Tensor | None = None) -> Tensor:
        known = {} if task_ids is None else {"task_ids": task_ids}
        return self.down(torch.tanh(self.up(x, **known)), **known)


def copied(model: nn.Module, splits: int, skills: int) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name in ("up", "down"):
        layer = getattr(model, name)
        a, b = layer.poly_lora_A["default"], layer.poly_lora_B["default"]
        z = layer.poly_router["default"].module_logits
        found[name] = {
            "A": a.mT.flatten(1, 2).unsqueeze(0),
            "B": b.flatten(1, 2).unsqueeze(0),
            "Z": z.view(-1, splits, skills),
        }
    return found


@oracle
@pytest.mark.parametrize("splits", [1, 2, 8])
def test_outputs_and_gradients_are_pefts(splits: int) -> None:
    net = Two()
    config = peft.PolyConfig(r=4, n_tasks=3, n_skills=3, n_splits=splits, target_modules=["up", "down"])
    model = theirs(net, config)
    with torch.no_grad():
        for name in ("up", "down"):
            getattr(model, name).poly_router["default"].module_logits.mul_(20)
            getattr(model, name).poly_lora_B["default"].mul_(4)
    method = weft.Poly(rank=4, num_tasks=3, num_skills=3, num_splits=splits)
    mine = ours(net, method, copied(model, splits, 3))
    y = model(X, task_ids=torch.tensor(TASKS))
    with weft.given(mine, task=TASKS):
        z = mine(X)
    torch.testing.assert_close(z, y, rtol=1e-5, atol=1e-5)
    assert (z - net(X)).abs().max() > 1e-2, "PEFT's adapter did nothing: nothing was compared"
    y.square().sum().backward()
    z.square().sum().backward()
    record = records(mine)["default"]
    for name in ("up", "down"):
        layer, own = getattr(model, name), record.adapters[name].tensors()
        a, z_grad = layer.poly_lora_A["default"].grad, layer.poly_router["default"].module_logits.grad
        torch.testing.assert_close(own["A"].grad[0], a.mT.flatten(1, 2), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own["Z"].grad.flatten(1), z_grad, rtol=1e-4, atol=1e-5)


@oracle
def test_fresh_ones_have_pefts_spread() -> None:
    net = Two()
    config = peft.PolyConfig(r=16, n_tasks=30, n_skills=8, n_splits=2, target_modules=["up", "down"])
    layer = peft.inject_adapter_in_model(config, copy.deepcopy(net)).up
    weft.attach(net, weft.Poly(rank=16, num_tasks=30, num_skills=8, num_splits=2), ["up"])
    own = records(net)["default"].adapters["up"].tensors()
    assert own["A"].abs().max().item() == pytest.approx(layer.poly_lora_A["default"].abs().max().item(), rel=0.02)
    assert own["Z"].abs().max().item() == pytest.approx(1e-3, rel=0.05)
    assert not own["B"].any()


def test_an_order_has_the_spread_of_plain_factors() -> None:
    deep, plain = (nn.Sequential(nn.Linear(1024, 8)) for _ in range(2))
    for net, order in ((deep, 2), (plain, 1)):
        weft.attach(net, weft.Poly(rank=64, num_skills=4, order=order), "0")
    made = [weft.core.skills.products(records(n)["default"].adapters["0"].tensors()["A"], 1024) for n in (deep, plain)]
    assert made[0].std().item() == pytest.approx(made[1].std().item(), rel=0.05)


class Drawn:
    """An op that draws uniform numbers."""

    def chance(self, *size: int) -> Tensor:
        return torch.rand(size, generator=torch.Generator().manual_seed(size[0]))


def test_draws_are_relaxed_bernoulli() -> None:
    z = torch.tensor([[2.0, -1.0]]).expand(50000, -1)
    op: Any = Drawn()
    found = gates(op, z)
    torch.manual_seed(0)
    wanted = torch.distributions.RelaxedBernoulli(torch.tensor(1.0), logits=z).sample()
    torch.testing.assert_close(found.mean(0), (wanted / wanted.sum(-1, keepdim=True)).mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(found.std(0), (wanted / wanted.sum(-1, keepdim=True)).std(0), atol=0.01, rtol=0)
    sharp = gates(op, z[:, :1].expand(-1, 2), 0.01)
    assert ((sharp < 0.01) | (sharp > 0.99) | ((sharp - 0.5).abs() < 0.01)).float().mean() > 0.95


def test_gates_are_drawn_in_training_alone() -> None:
    net = nn.Sequential(nn.Linear(16, 8))
    weft.attach(net, weft.Poly(rank=2, num_tasks=3), "0", name="p")
    with torch.no_grad():
        for p in weft.parameters(net):
            p.normal_()
    with weft.given(net, task=TASKS), torch.no_grad():
        net.eval()
        assert torch.equal(net(X), net(X))
        net.train()
        assert not torch.equal(net(X), net(X))


@pytest.mark.parametrize(("splits", "order"), [(1, 1), (4, 1), (2, 2)])
def test_rows_of_any_layout_and_one_task_for_all(splits: int, order: int) -> None:
    net = nn.Sequential(nn.Linear(16, 8)).eval()
    weft.attach(net, weft.Poly(rank=2, num_tasks=4, num_splits=splits, order=order), "0", name="p")
    with torch.no_grad():
        for p in weft.parameters(net):
            p.normal_()

    def run(x: Tensor, task: Any) -> tuple[Tensor, list[Tensor]]:
        net.zero_grad()
        with weft.given(net, task=task):
            y = net(x)
        y.square().sum().backward()
        return y.detach().view(3, 5, 8), [p.grad for p in weft.parameters(net) if p.grad is not None]

    tasks = [3, 0, 2]  # not all of them
    rows, wanted = run(X, tasks)
    of_tokens = torch.tensor([tasks]).repeat_interleave(5, 1)
    for x, task in ((X.reshape(1, 15, 16), of_tokens), (X.reshape(15, 16), tasks), (X.reshape(15, 16), of_tokens)):
        y, found = run(x, task)
        torch.testing.assert_close(y, rows, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    for row, task in enumerate(tasks):
        torch.testing.assert_close(run(X, task)[0][row], rows[row], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(run(X.reshape(15, 16), task)[0][row], rows[row], rtol=1e-4, atol=1e-4)
    with pytest.raises(AdapterError, match="reads the task of every row"):
        weft.merge(net, "p")


def test_shapes_and_tasks_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="num_splits=3 does not divide 16 and 8"):
        weft.attach(nn.Sequential(nn.Linear(16, 8)), weft.Poly(num_splits=3), "0")
    with pytest.raises(ValueError, match="num_tasks=2 tasks are numbered from 0"):
        weft.attach(nn.Sequential(nn.Linear(16, 8)), weft.Poly(task=2), "0")
