"""Choosing how much of an adapter is kept at each site: the smallest that loses little, or the best that is small."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Chosen", "Ladder", "Rung", "Unreachable", "under", "within"]


@dataclass(frozen=True)
class Rung:
    """One way to keep a site: its size, what it loses there, and the setting that makes it (a rank, bits, ...)."""

    num_bytes: int
    loss: float
    setting: Any


Ladder = Mapping[str, Sequence[Rung]]
"""By address, what can be chosen there."""
Chosen = dict[str, Rung]


class Unreachable(ValueError):
    """No choice is as good, or as small, as was asked for."""


def within(ladder: Ladder, bound: float) -> Chosen:
    """At every site the smallest that loses at most `bound`. Unreachable names the site that loses most."""
    found: Chosen = {}
    for address, rungs in ladder.items():
        good = [r for r in rungs if r.loss <= bound]
        if good:
            found[address] = min(good, key=lambda r: (r.num_bytes, r.loss))
    if len(found) < len(ladder):
        least = {a: min(r.loss for r in rungs) for a, rungs in ladder.items() if a not in found}
        worst = max(least, key=lambda a: least[a])
        raise Unreachable(f"at least {least[worst]:.3%} is lost at {worst}, more than {bound:.3%}")
    return found


def under(ladder: Ladder, norms: Mapping[str, float], budget: int) -> Chosen:
    """The choice of at most `budget` bytes in all that loses least: of the sum of (loss x norm)^2 over the sites.

    Each site starts at its smallest, and what lowers the sum most for a byte comes first. With ranks to choose from
    this keeps the largest singular values of all sites, for what they cost. Steps that a site's later ones would make
    look dear are taken together with these, so that the order is that of the lower convex hull.
    Unreachable where the smallest choice is larger.
    """
    hulls = {a: _hull((r.num_bytes, (r.loss * norms[a]) ** 2, r) for r in rungs) for a, rungs in ladder.items()}
    found = {a: hull[0][2] for a, hull in hulls.items()}
    left = budget - sum(r.num_bytes for r in found.values())
    if left < 0:
        raise Unreachable(f"the smallest that there is takes {budget - left:,} bytes, more than {budget:,}")
    steps = [_step(a, hull, 0) for a, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, address, k = heapq.heappop(steps)
        hull = hulls[address]
        cost = hull[k + 1][0] - hull[k][0]
        if cost > left:  # smaller steps elsewhere may still fit
            continue
        left -= cost
        found[address] = hull[k + 1][2]
        if k + 2 < len(hull):
            heapq.heappush(steps, _step(address, hull, k + 1))
    return found


_Point = tuple[int, float, Rung]


def _hull(points: Iterable[_Point]) -> list[_Point]:
    """The points below which no mixture of two others is, by size; from the smallest to the one that loses least."""
    kept: list[_Point] = []
    for size, error, rung in sorted(points, key=lambda p: (p[0], p[1])):
        if kept and error >= kept[-1][1]:
            continue
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) <= _slope(kept[-1], (size, error, rung)):
            kept.pop()
        if kept and kept[-1][0] == size:
            kept.pop()
        kept.append((size, error, rung))
    return kept


def _slope(p: _Point, q: _Point) -> float:
    """What of the error a byte saves on the way from p to q."""
    return (p[1] - q[1]) / max(q[0] - p[0], 1)


def _step(address: str, hull: Sequence[_Point], k: int) -> tuple[float, str, int]:
    return -_slope(hull[k], hull[k + 1]), address, k
