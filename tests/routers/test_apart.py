"""Losses and gradients that keep the experts of a mixture apart: against loops over tokens, and where they act."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.attach import records
from weft.core.penalty import gathered


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x)


METHODS = {
    "pairs": lambda: weft.experts(weft.LoRA(rank=1), 3),
    "each by itself": lambda: weft.experts(weft.LoRA(rank=4), 3),
}


def mixed(**options: object) -> tuple[Net, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = Net().double()
    weft.attach(net, weft.TopK(balance=0, **options), ["site"], name="mix")  # type: ignore[arg-type]
    with torch.no_grad():
        for p in weft.parameters(net):
            p.add_(torch.randn_like(p))
    return net, records(net)["mix"].adapters["site"].tensors()


def added(t: dict[str, Tensor], x: Tensor, k: int) -> Tensor:
    return 16 / len(t[f"{k}:A"]) * (x @ t[f"{k}:A"].T) @ t[f"{k}:B"].T


def gates_of(t: dict[str, Tensor], x: Tensor, k: int) -> Tensor:
    p = (x @ t["G"].T).softmax(-1)
    p = p * (p >= p.sort(-1).values[..., -k, None])
    return p / p.sum(-1, keepdim=True)


def gradients(net: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    loss.backward()
    return {n.rpartition(".")[2]: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def test_the_contrast_is_that_of_all_pairs_of_outputs() -> None:
    net, t = mixed(experts=METHODS["pairs"](), k=2, contrast=1.0, temperature=0.5)
    x = torch.randn(5, 8, dtype=torch.float64)
    chosen = gates_of(t, x, 2) > 0
    t = {k: v.detach() for k, v in t.items()}
    outputs = [(k, e / e.norm()) for i in range(5) for k in range(3) if chosen[i, k] for e in [added(t, x[i], k)]]
    terms = []
    for i, (expert, own) in enumerate(outputs):
        others = [(k, (own @ e).item() / 0.5) for j, (k, e) in enumerate(outputs) if j != i]
        total = math.log(sum(math.exp(s) for _, s in others))
        terms += [total - s for k, s in others if k == expert]
    with gathered() as found, torch.no_grad():
        net.train()(x)
    assert sum(found).item() == pytest.approx(sum(terms) / len(terms))
    with gathered() as found, torch.no_grad():
        net.eval()(x)
    assert sum(found) == 0


def test_minimising_the_contrast_moves_experts_apart() -> None:
    net, t = mixed(experts=METHODS["each by itself"](), k=None, contrast=1.0)
    net.train()
    x = 1 + torch.randn(20, 8, dtype=torch.float64)

    def gap() -> float:
        """By how much outputs of one expert are more alike than those of two."""
        with torch.no_grad():
            each = torch.stack([torch.nn.functional.normalize(added(t, x, k), dim=-1) for k in range(3)])
            alike = torch.einsum("kno,lmo->kl", each, each) / 20**2
            return (alike.diagonal().mean() - alike[[0, 0, 1], [1, 2, 2]].mean()).item()

    before = gap()
    optimizer = torch.optim.Adam(weft.parameters(net), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        (0 * net(x)).sum().backward()
        optimizer.step()
    assert gap() > before + 0.2


def test_fresh_experts_that_add_nothing_have_no_contrast() -> None:
    net = Net()
    weft.attach(net, weft.TopK(experts=METHODS["pairs"](), contrast=1.0, balance=0.0), ["site"], name="mix")
    (0 * net.train()(torch.randn(4, 8))).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in weft.parameters(net))


@pytest.mark.parametrize("experts", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("k", [1, 2])
def test_roots_of_gates_weigh_the_gradients_of_experts_only(experts: Callable[[], tuple], k: int) -> None:  # type: ignore[type-arg]
    net, t = mixed(experts=experts(), k=k, normalise=False, root_gates=True)
    plain, _ = mixed(experts=experts(), k=k, normalise=False)
    x, target = torch.randn(7, 8, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    net.train(), plain.train()
    y, same = net(x), plain(x)
    torch.testing.assert_close(y, same)
    found, usual = gradients(net, (y * target).sum()), gradients(plain, (same * target).sum())
    torch.testing.assert_close(found["G"], usual["G"])
    p = (x @ t["G"].T).softmax(-1)
    gates = (p * (p >= p.sort(-1).values[..., -k, None])).detach()
    for each in range(3):
        h = x @ t[f"{each}:A"].T.detach()
        scale = 16 / h.shape[-1]
        expected = scale * target.T @ (gates[:, each, None].sqrt() * h)
        if f"{each}:B" in found:
            torch.testing.assert_close(found[f"{each}:B"], expected)
        else:
            assert not expected.any()
    net.eval()
    torch.testing.assert_close(net(x), same)
