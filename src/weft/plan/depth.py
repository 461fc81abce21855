"""Which layers of a deep model stand for the others, so that a step through a few says what one through all takes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Depth", "shorten"]

_KEPT = 3  # of layers that are alike: the first and the last, whose neighbours differ, and one that stands for the rest


@dataclass(frozen=True)
class Depth:
    """kept: the layers that are run. extra: how many more times the layers that stand for others count."""

    kept: tuple[int, ...]
    extra: Mapping[int, int]


def shorten(signatures: Sequence[Hashable]) -> Depth:
    """Of the layers with one signature at most three stay, and the second stands for those that go."""
    groups: dict[Hashable, list[int]] = {}
    for number, signature in enumerate(signatures):
        groups.setdefault(signature, []).append(number)
    kept: list[int] = []
    extra = {}
    for numbers in groups.values():
        if len(numbers) <= _KEPT:
            kept += numbers
            continue
        kept += [numbers[0], numbers[1], numbers[-1]]
        extra[numbers[1]] = len(numbers) - _KEPT
    return Depth(tuple(sorted(kept)), extra)
