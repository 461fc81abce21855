"""What to recompute so that kept activations fit a byte limit at the least time: exact, for a chain of layers.

Bartan et al. 2023 (Moccasin), arXiv 2304.14463, state the problem for any graph as a constraint program. The layers of
a transformer are a chain, in which each choice only adds to what later layers find occupied: dynamic programming over
the bytes kept so far solves it, to the grid that bytes are counted on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weft.errors import WeftError
from weft.tune.activations import core
from weft.tune.activations.kept import kept_bytes
from weft.tune.activations.layers import Choice, keep_activations, layers_of, set_activations

__all__ = ["Chosen", "Cost", "choose", "measure_costs"]

_GRID = 4096  # steps in which bytes are counted; each layer is rounded up, so the limit holds


@dataclass(frozen=True)
class Cost:
    """One layer: what it keeps under each choice, and the seconds that the choice costs in the backward."""

    kept_bytes: dict[Choice, int]
    seconds: dict[Choice, float]

    @property
    def whole_bytes(self) -> int:
        """What is there while the layer is differentiated, whatever was chosen."""
        return max(self.kept_bytes.values())


@dataclass(frozen=True)
class Chosen:
    """A choice for each layer; the most bytes that are there at once, and the seconds of recomputing."""

    choices: tuple[Choice, ...]
    peak_bytes: int
    seconds: float


def choose(costs: Sequence[Cost], limit: int, *, outside: int = 0) -> Chosen | None:
    """The choices of least time whose activations fit `limit` bytes at every moment; None when there are none.

    When layer i is differentiated, what the layers before it kept is there, and all of its own. outside: bytes kept
    before the first layer, all the time.
    """
    unit = max(limit / _GRID, 1.0)
    states: dict[int, tuple[float, tuple[Choice, ...]]] = {_up(outside, unit): (0.0, ())}
    for cost in costs:
        reached: dict[int, tuple[float, tuple[Choice, ...]]] = {}
        for kept, (seconds, choices) in states.items():
            if (kept + _up(cost.whole_bytes, unit)) * unit > limit:
                continue
            for choice, size in cost.kept_bytes.items():
                at, time_ = kept + _up(size, unit), seconds + cost.seconds[choice]
                if at not in reached or time_ < reached[at][0]:
                    reached[at] = (time_, (*choices, choice))
        states = _undominated(reached)
    if not states:
        return None
    seconds, choices = min(states.values(), key=lambda state: state[0])
    return Chosen(choices, peak_bytes(costs, choices, outside=outside), seconds)


def peak_bytes(costs: Sequence[Cost], choices: Sequence[Choice], *, outside: int = 0) -> int:
    """The most bytes of activations that are there at once under given choices."""
    kept, peak = outside, outside
    for cost, choice in zip(costs, choices, strict=True):
        peak = max(peak, kept + cost.whole_bytes)
        kept += cost.kept_bytes[choice]
    return max(peak, kept)


def measure_costs(model: nn.Module, forward: Callable[[], Any]) -> tuple[list[Cost], int]:
    """The cost of every layer under every choice that the model knows, and what is kept outside of them.

    forward: a call of the model on the largest batch; it runs once for each choice, and once to warm up. Raises
    WeftError for a model without layers that can be recomputed. All activations are kept again afterwards.
    """
    layers = layers_of(model)
    if not layers:
        raise WeftError(
            f"train.activation_budget: a {type(model).__name__} has no layers that transformers can recompute: set it "
            "to null"
        )
    with torch.no_grad():
        forward()
    known: list[Choice] = ["keep", "recompute"]
    if core.can_recompute(layers):
        known.insert(1, "attention")
    found, outside = {}, 0
    try:
        for choice in known:
            set_activations(model, choice)
            kept = kept_bytes(model, forward, layers=layers)
            found[choice], outside = kept.layers, max(outside, kept.outside)
        keep_activations(model)
        whole, attention = _seconds(model, forward, layers)
    finally:
        keep_activations(model)
    costs = []
    for i in range(len(layers)):
        again: dict[Choice, float] = {"keep": 0.0, "attention": attention[i], "recompute": whole[i]}
        costs.append(Cost({c: found[c][i] for c in known}, {c: again[c] for c in known}))
    return costs, outside


def fit(model: nn.Module, forward: Callable[[], Any], limit: int) -> Chosen:
    """Measure, choose and set; raises WeftError when the limit is too small even with everything recomputed."""
    costs, outside = measure_costs(model, forward)
    chosen = choose(costs, limit, outside=outside)
    if chosen is None:
        least = peak_bytes(costs, ["recompute"] * len(costs), outside=outside)
        raise WeftError(
            f"train.activation_budget: {limit:,} bytes; the largest batch needs {least:,} even when every layer is "
            "recomputed: give at least that, or lower train.batch_size or data.max_length"
        )
    set_activations(model, chosen.choices)
    return chosen


def _undominated(states: dict[int, tuple[float, tuple[Choice, ...]]]) -> dict[int, tuple[float, tuple[Choice, ...]]]:
    """Without those that keep more and are no faster than another one."""
    kept, fastest = {}, float("inf")
    for at in sorted(states):
        if states[at][0] < fastest:
            kept[at], fastest = states[at], states[at][0]
    return kept


def _up(size: int, unit: float) -> int:
    return -int(-size // unit)


@torch.no_grad()
def _seconds(
    model: nn.Module, forward: Callable[[], Any], layers: Sequence[nn.Module]
) -> tuple[list[float], list[float]]:
    """How long the forward of each layer takes, and the attention core in it."""
    device = next(model.parameters()).device

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    started, spent = [0.0] * len(layers), [0.0] * len(layers)

    def begin(index: int) -> Callable[..., None]:
        return lambda *_: started.__setitem__(index, clock())

    def end(index: int) -> Callable[..., None]:
        return lambda *_: spent.__setitem__(index, clock() - started[index])

    handles = [layer.register_forward_pre_hook(begin(i)) for i, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(end(i)) for i, layer in enumerate(layers)]
    try:
        with core.timed(clock) as cores:
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return spent, [sum(cores.get(id(m), 0.0) for m in layer.modules()) for layer in layers]
