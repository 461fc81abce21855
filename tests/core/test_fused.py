"""The training reading: the same numbers as the verbs one by one, with less kept, dropout found again from its seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import weft
from weft.core import fused
from weft.core.dropout import Dropout
from weft.registry import method_class


class Two(nn.Module):
    """Two maps of one input, as q and k are."""

    def __init__(self, inputs: int = 24, outputs: int = 16):
        super().__init__()
        self.q, self.k = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x).tanh() + self.k(x)


METHODS: dict[str, Any] = {
    "lora": weft.LoRA(rank=3),
    "wide": weft.LoRA(rank=14),
    "dora": weft.DoRA(rank=3),
    "vera": method_class("vera")(rank=32),
    "ia3": method_class("ia3")(),
    "road": method_class("road")(group_size=8),
    "shira": method_class("shira")(rank=1),
    "fourierft": method_class("fourierft")(num_frequencies=20),
    "lokr": method_class("lokr")(rank=2),
    "boft": method_class("boft")(block_size=4, factors=2),
    "top_k": method_class("top_k")(experts=weft.experts(weft.LoRA(rank=2), 3), balance=0),
    "bottleneck": method_class("bottleneck")(width=4),
    "gralora": method_class("gralora")(rank=4, num_blocks=2),
    "miss": method_class("miss")(rank=4),
    "oft": method_class("oft")(block_size=4),
    "lily": method_class("lily")(rank=3),
    "waveft": method_class("waveft")(num_frequencies=20),
    "freeze_a": weft.LoRA(rank=3, freeze_a=True),
    "c3a": method_class("c3a")(block_size=8),
    "pvera": method_class("pvera")(rank=8),
}


def attached(name: str, *, dtype: torch.dtype = torch.float32) -> Two:
    torch.manual_seed(3)
    model = Two().to(dtype)
    weft.attach(model, METHODS[name], targets=["q", "k"], name="a")
    with torch.no_grad():
        for parameter in weft.parameters(model, "a"):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def gradients(model: Two, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of x and of everything that trains."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = model(x)
    trained = list(weft.parameters(model, "a"))
    return [y.detach(), *torch.autograd.grad((y * torch.arange(y.numel()).view(y.shape)).sum(), [x, *trained])]


@pytest.mark.parametrize("tokens", [5, 20])  # with fewer rows than channels and with more: then updates are added to W
@pytest.mark.parametrize("name", METHODS)
def test_equal_to_the_verbs_one_by_one(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, tokens, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = attached(name, dtype=torch.float64)
    ours = gradients(model, x)
    calls: list[int] = []
    monkeypatch.setattr(fused, "fuses", lambda op: calls.append(1) is not None)
    theirs = gradients(model, x)
    assert len(calls) == 2, "the other side really read verb by verb"
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("tokens", [3, 30])
@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"dora", "pvera"}))  # constant lengths; draws
def test_gradients_are_those_of_the_values(name: str, tokens: int) -> None:
    model = attached(name, dtype=torch.float64)
    x = torch.randn(1, tokens, 24, dtype=torch.float64, requires_grad=True)
    trained = list(weft.parameters(model, "a"))

    def value(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return model(x)

    assert torch.autograd.gradcheck(value, (x, *trained), fast_mode=True)


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_lora_keeps_its_input_and_little_else_with_dropout_too(p: float) -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).train()
    weft.attach(model, weft.LoRA(rank=2, dropout=p), targets=["0"], name="a")
    x = torch.randn(256, 64, requires_grad=True)
    model(x)
    assert kept_bytes(model, x) <= 4 * 256 * (64 + 2) + 4 * 64 * 2, "x, the projection, and the scaled B"


def test_a_gain_keeps_what_comes_next_keeps_anyway() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(64, 64, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(self.up(x))

    model = Gated().train()
    weft.attach(model, METHODS["ia3"], targets=["up"], name="a")
    x = torch.randn(256, 64, requires_grad=True)
    model(x)
    assert kept_bytes(model, x) <= 4 * 256 * 64 + 4 * 64


def test_a_gain_of_zero_still_learns() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).train()
    weft.attach(model, METHODS["ia3"], targets=["0"], name="a")
    (gain,) = weft.parameters(model, "a")
    with torch.no_grad():
        gain.zero_()
    x = torch.randn(5, 4)
    y = model(x)
    assert torch.equal(y, torch.zeros(5, 3)) or y.abs().max() < 1e-18
    y.sum().backward()
    torch.testing.assert_close(gain.grad, nn.functional.linear(x, model[0].weight, model[0].bias).sum(0))  # type: ignore[union-attr,arg-type]


def test_an_output_changed_in_place_is_an_error_that_says_where() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)).train()
    weft.attach(model, METHODS["ia3"], targets=["0"], name="a")
    with pytest.raises(RuntimeError, match=r"after 0 changes its output in place.*inplace=False"):
        model(torch.randn(5, 4)).sum().backward()


def test_dropout_drops_with_its_probability_and_independently() -> None:
    torch.manual_seed(0)
    for p in (0.05, 0.5, 0.9):
        kept = Dropout(p).of(torch.ones(400, 500))
        assert set(kept.unique().tolist()) == {0.0, 1.0}
        assert abs(1 - kept.mean().item() - p) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
        neighbours = (1 - kept[:, :-1]) * (1 - kept[:, 1:])
        assert abs(neighbours.mean().item() - p * p) < 6 * (p * p / neighbours.numel()) ** 0.5
    assert not Dropout(1.0).of(torch.ones(3)).any()


def test_dropout_is_found_again_and_differs_from_call_to_call() -> None:
    torch.manual_seed(0)
    one, two = Dropout(0.3), Dropout(0.3)
    x = torch.randn(50, 40)
    assert torch.equal(one.of(x), one.of(x))
    assert not torch.equal(one.of(x), two.of(x))
    torch.manual_seed(0)
    assert Dropout(0.3).seed == one.seed, "a restored random state brings the same masks"


def test_dropout_in_training_is_that_of_the_update_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6)).double().train()
    weft.attach(model, weft.LoRA(rank=2, dropout=0.5), targets=["0"], name="a")
    a, b = weft.parameters(model, "a")
    with torch.no_grad():
        b.normal_()
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)

    def value(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return model(x)

    assert torch.autograd.gradcheck(value, (x, a, b))
    torch.manual_seed(5)
    dropped = 2 * Dropout(0.5).of(x.detach())
    frozen = nn.functional.linear(x, model[0].weight, model[0].bias)  # type: ignore[arg-type]
    torch.testing.assert_close(value(x), frozen + 8 * dropped @ a.mT @ b.mT)


def test_an_input_is_cast_once_for_all_that_read_it_under_autocast() -> None:
    model, x = attached("lora"), torch.randn(5, 24, requires_grad=True) + 0
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.bfloat16
        casts = [t for t in _saved(model, x) if t.dtype == torch.bfloat16 and t.shape == (5, 24)]
    assert len({t.data_ptr() for t in casts}) == 1


def _saved(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        model(x)
    return kept


def test_a_shared_projection_serves_graphs_with_backwards_of_their_own() -> None:
    model, leaf = attached("vera"), torch.randn(4, 24, requires_grad=True)
    alone = [torch.autograd.grad(read(leaf).sum(), leaf)[0] for read in (model.q, model.k)]
    x = leaf + 0
    sums = [read(x).sum() for read in (model.q, model.k)]
    for each, wanted in zip(sums, alone, strict=True):
        torch.testing.assert_close(torch.autograd.grad(each, x)[0], wanted)


def test_a_body_may_use_its_values_as_tensors() -> None:
    """Plug-ins add, index and call torch functions on what verbs give."""
    op = fused.TrainOp(_op(), {}, dict)
    x = torch.randn(3, 24)
    y = op(x)
    wanted = y.tensor()
    for made in (y + 1, 1 + y, y * 2, 2 * y, -y, y - 1, 1 - y, y / 2, y[0], torch.tanh(y), y.softmax(-1), y @ y.mT):
        assert isinstance(made, torch.Tensor)
    torch.testing.assert_close(y - 0 * y, wanted)
    assert y.shape == (3, 16)


def _op() -> Any:
    model = attached("lora")
    return model.q.seats["weight"].op  # type: ignore[union-attr]
