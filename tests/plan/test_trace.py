"""The trace of a step on tensors without numbers: live bytes, real masks, deep models by a few layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from weft.plan.memory import peak
from weft.plan.trace import Phase, Stored, Trace

FLOATS = 4


def traced(run, *given) -> Trace:
    trace, fake = Trace(), FakeTensorMode(allow_non_fake_inputs=True)
    with trace.recording(fake):
        run(trace)
    return trace


def test_the_peak_is_the_most_that_is_alive() -> None:
    def run(trace) -> None:
        a = torch.empty(1000)  # 4,000
        b = a + 1  # 8,000
        del a  # 4,000
        c = b.view(10, 100).t()  # no memory of its own
        d = c.contiguous()  # 8,000
        del b, c, d
        torch.empty(100)

    assert peak(traced(run), {}).total == 2 * 1000 * FLOATS


def test_saved_tensors_live_until_the_backward() -> None:
    def run(trace) -> None:
        w = torch.empty(5, 5, requires_grad=True)
        trace.give(w, "weights")
        x = torch.empty(2000, 5)
        trace.phase = Phase("forward", 0)
        loss = (x @ w).exp().sum()
        trace.phase = Phase("backward", 0)
        loss.backward()
        trace.phase = Phase("update")

    found = peak(traced(run), {})
    assert found.weights == 5 * 5 * FLOATS
    assert found.activations >= 2000 * 5 * FLOATS  # exp saves its result


def test_masks_are_real() -> None:
    """How many rows a mask picks is known, though no float is."""
    sizes = []

    def run(trace) -> None:
        labels = torch.tensor([1, -100, 3, -100, 5])
        picked = torch.empty(5, 7)[labels != -100]
        sizes.append(tuple(picked.shape))
        assert (labels != -100).any()
        assert torch.empty(3).sum().item() == 0.5

    traced(run)
    assert sizes == [(3, 7)]


def test_nothing_is_allocated() -> None:
    traced(lambda trace: torch.empty(10**7, 10**5).exp())  # 4 TB


def test_calls_are_counted_by_shape() -> None:
    def run(trace) -> None:
        for _ in range(3):
            torch.empty(4, 5) @ torch.empty(5, 6)

    (found,) = [(c, n) for (c, _, _), n in traced(run).calls.items() if "mm" in c.name]
    assert found[1] == 3
    assert found[0].inputs == (((4, 5), FLOATS), ((5, 6), FLOATS))


class Deep(nn.Module):
    def __init__(self, depth: int):
        super().__init__()
        made = (nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(depth))
        self.layers = nn.ModuleList(made)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def step_peak(depth: int, extra: dict[int, int]) -> int:
    def run(trace) -> None:
        model = Deep(depth)
        for i, layer in enumerate(model.layers):
            for p in layer.parameters():
                trace.give(p, "adapters", i)
                p.register_post_accumulate_grad_hook(trace.gradient)
        handles = trace.watch_layers(dict(enumerate(model.layers)), None)
        model(torch.empty(16, 32)).square().sum().backward()
        trace.phase = Phase("update")
        for handle in handles:
            handle.remove()

    return peak(traced(run), extra).total


@pytest.mark.parametrize("depth", [4, 9, 20])
def test_three_layers_stand_for_many(depth) -> None:
    assert step_peak(3, {1: depth - 3}) == step_peak(depth, {})


def test_the_kinds_add_up_to_the_peak() -> None:
    trace = Trace(stored=[Stored(10, "weights", Phase("start"), None), Stored(5, "", Phase("forward", 0), 0)])
    trace.events = [(1, 0, Phase("start")), (1, 1, Phase("forward", 0)), (-1, 1, Phase("backward", 0))]
    found = peak(trace, {0: 3})
    assert (found.weights, found.workspace) == (10, 20)
