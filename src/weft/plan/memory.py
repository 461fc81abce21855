"""The highest point of a traced step, and what holds the memory there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields

from weft.plan.trace import Phase, Trace

__all__ = ["Memory", "peak"]


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step, by what they are for.

    activations: what layers keep for the backward. loss: what the head and the loss keep. workspace: what single
    operations hold at that moment. process: what the libraries take beside tensors. allocator: what the C library keeps
    of memory that was given back.
    """

    weights: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    loss: int = 0
    workspace: int = 0
    process: int = 0
    allocator: int = 0

    @property
    def tensors(self) -> int:
        """All that a step makes: neither weights nor what the process holds beside tensors."""
        return self.total - self.weights - self.process - self.allocator

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))


def peak(trace: Trace, extra: Mapping[int, int]) -> Memory:
    """The peak of a step through all layers, from one through some of which `extra[layer]` more are alike.

    Outside of the layer's own forward and backward every copy of it holds what the traced one keeps. Inside, one copy
    is at work, and all others hold what it keeps before or after, whichever is more.
    """
    alive: set[int] = set()
    kept = _kept(trace, extra)
    total = 0
    tagged: dict[int | None, int] = defaultdict(int)
    best, moment = -1, 0
    around = _around(trace, kept)
    for position, (sign, index, phase) in enumerate(trace.events):
        stored = trace.stored[index]
        total += sign * stored.size
        if index in kept:
            tagged[stored.layer] += sign * stored.size
        here = total + sum(
            n * around.get(phase, tagged[x]) if phase.layer == x else n * tagged[x] for x, n in extra.items()
        )
        if here > best:
            best, moment = here, position
    for sign, index, _ in trace.events[: moment + 1]:
        alive.add(index) if sign > 0 else alive.discard(index)
    copies = {i: 1 + extra[trace.stored[i].layer] for i in kept}  # type: ignore[index]
    return _split(trace, alive, trace.events[moment][2], copies, best)


def _kept(trace: Trace, extra: Mapping[int, int]) -> set[int]:
    """What each of the copies of a layer holds beyond its own turn.

    Not what is made and given back in one sweep, forward or backward, such as the gradient that a layer hands on: there
    is one of these, not one for every copy.
    """
    kept = {i for i, stored in enumerate(trace.stored) if stored.layer in extra}
    for sign, index, phase in trace.events:
        born = trace.stored[index].phase.name
        if sign < 0 and born == phase.name and born in ("forward", "backward"):
            kept.discard(index)
    return kept


def _around(trace: Trace, kept: set[int]) -> dict[Phase, int]:
    """For the phases of layers that stand for others: what each copy keeps before or after it, whichever is more."""
    held: dict[int | None, int] = defaultdict(int)
    before: dict[Phase, int] = {}
    after: dict[Phase, int] = {}
    layers = {trace.stored[i].layer for i in kept}
    for sign, index, phase in trace.events:
        if phase.layer in layers:
            before.setdefault(phase, held[phase.layer])
        if index in kept:
            held[trace.stored[index].layer] += sign * trace.stored[index].size
        if phase.layer in layers:
            after[phase] = held[phase.layer]
    return {phase: max(size, after[phase]) for phase, size in before.items()}


def _split(trace: Trace, alive: set[int], now: Phase, copies: Mapping[int, int], best: int) -> Memory:
    sizes: dict[str, int] = defaultdict(int)
    for index in alive:
        stored = trace.stored[index]
        sizes[_kind(stored.kind, stored.phase, now)] += stored.size * copies.get(index, 1)
    known = sum(size for kind, size in sizes.items() if kind != "workspace")
    sizes["workspace"] = max(best - known, 0)
    return Memory(**sizes)


def _kind(kind: str, born: Phase, now: Phase) -> str:
    if kind:
        return kind
    if born.name == "forward" and now != born:
        return "activations"
    return "loss" if born.name == "head" else "workspace"
