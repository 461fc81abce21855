"""What routers choose, while somebody records it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Choices", "is_recorded", "note", "recording", "unrecorded"]


@dataclass
class Choices:
    """What routers chose while they were recorded: by address, the names of the experts and their gates."""

    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    calls: dict[str, list[Tensor]] = field(default_factory=dict)

    def gates(self, address: str) -> Tensor:
        """Of all tokens that came by, in their order, [N, K]."""
        return torch.cat([g.flatten(0, -2) for g in self.calls[address]])

    def shares(self, tokens: Tensor | None = None) -> dict[str, dict[str, float]]:
        """By address, how much each expert counted, of all of them together. tokens: which count, [N]; None: all."""
        found = {}
        for address, names in self.names.items():
            gates = self.gates(address)
            if tokens is not None and len(tokens) == len(gates):
                gates = gates[tokens]
            total = gates.abs().sum(0)
            found[address] = dict(zip(names, (total / total.sum().clamp_min(1e-12)).tolist(), strict=True))
        return found


_recordings: list[Choices] = []


@contextmanager
def unrecorded() -> Iterator[None]:
    """Nothing inside the `with` counts as a choice: a map is only looked at."""
    before, _recordings[:] = [*_recordings], []
    try:
        yield
    finally:
        _recordings[:] = before


@contextmanager
def recording() -> Iterator[Choices]:
    """Record what every router chooses inside the `with`, on the CPU."""
    found = Choices()
    _recordings.append(found)
    try:
        yield found
    finally:
        _recordings.remove(found)


def is_recorded() -> bool:
    """Whether anybody records what is chosen now."""
    return bool(_recordings)


def note(address: str, names: tuple[str, ...], gates: Tensor, x: Tensor) -> None:
    """Show the gates of a call at a site to those who record: [K], or a row for every token of x."""
    for found in _recordings:
        nested = found.names.get(address, names) != names  # a router that is another's expert, at the same site
        key = f"{address} ({', '.join(names)})" if nested else address
        found.names[key] = names
        every = gates.detach().float().expand(*x.shape[:-1], -1).cpu()
        found.calls.setdefault(key, []).append(every)
