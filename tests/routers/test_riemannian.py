"""Low-rank experts under optimisers that know pairs: each is preconditioned by its own factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import weft
from weft.attach import records
from weft.optim import Setting, resolve
from weft.tune.trained import trained_tensors


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x)


def test_every_expert_is_preconditioned_by_its_own_factors() -> None:
    torch.manual_seed(0)
    net = Net().double()
    experts = weft.experts(weft.LoRA(rank=2, alpha=2.0), 3)
    weft.attach(net, weft.TopK(experts=experts, k=2, balance=0.0, root_gates=True), ["site"], name="mix")
    t = records(net)["mix"].adapters["site"].tensors()
    with torch.no_grad():
        for p in weft.parameters(net):
            p.add_(torch.randn_like(p))
    found = trained_tensors(net, "mix")
    assert [(p.down is t[f"{k}:A"], p.up is t[f"{k}:B"]) for k, p in enumerate(found.pairs)] == [(True, True)] * 3
    setting = Setting(found.trained, 0.1, pairs=found.pairs)
    groups = [{"params": [each.parameter for each in found.trained]}]
    optimizer = resolve({"name": "scaled-sgd", "damping": 1e-3}).make(groups, setting)
    net.train()(torch.randn(9, 6, dtype=torch.float64)).square().sum().backward()
    before = {k: (v.detach().clone(), v.grad.clone()) for k, v in t.items() if v.grad is not None}
    optimizer.step()
    eye = 1e-3 * torch.eye(2, dtype=torch.float64)
    for k in range(3):
        (a, g_a), (b, g_b) = before[f"{k}:A"], before[f"{k}:B"]
        torch.testing.assert_close(t[f"{k}:A"].detach(), a - 0.1 * torch.linalg.inv(b.mT @ b + eye) @ g_a)
        torch.testing.assert_close(t[f"{k}:B"].detach(), b - 0.1 * g_b @ torch.linalg.inv(a @ a.mT + eye))
    g, slope = before["G"]
    torch.testing.assert_close(t["G"].detach(), g - 0.1 * slope)
