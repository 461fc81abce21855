"""Choosing ranks and bits: the smallest within a bound, and under a budget what loses least, as a full search finds."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from weft.compressing.rungs import Rung, Unreachable, under, within

LADDER = {"a": [Rung(10, 0.9, 1), Rung(20, 0.5, 2), Rung(25, 0.6, 3), Rung(40, 0.1, 4)], "b": [Rung(5, 0.3, "x")]}


def test_within_a_bound_each_site_is_as_small_as_can_be() -> None:
    assert {a: r.setting for a, r in within(LADDER, 0.6).items()} == {"a": 2, "b": "x"}
    assert {a: r.setting for a, r in within(LADDER, 0.4).items()} == {"a": 4, "b": "x"}
    with pytest.raises(Unreachable, match=r"at least 30.000% is lost at b, more than 20.000%"):
        within(LADDER, 0.2)


def test_a_budget_that_is_too_small_is_refused() -> None:
    assert {r.setting for r in under(LADDER, {"a": 1.0, "b": 1.0}, 15).values()} == {1, "x"}
    with pytest.raises(Unreachable, match="takes 15 bytes, more than 14"):
        under(LADDER, {"a": 1.0, "b": 1.0}, 14)


def test_a_budget_of_ranks_keeps_the_largest_singular_values() -> None:
    draw = torch.Generator().manual_seed(0)
    values = {
        a: torch.rand(4, generator=draw).sort(descending=True).values * scale for a, scale in (("a", 3.0), ("b", 1.0))
    }
    norms = {a: s.norm().item() for a, s in values.items()}
    ladder = {a: [Rung(r, (s[r:].norm() / s.norm()).item(), r) for r in range(1, 5)] for a, s in values.items()}
    for budget in range(2, 9):
        found = under(ladder, norms, budget)
        assert sum(r.num_bytes for r in found.values()) == budget
        best = max(
            (sum(values[a][:r].square().sum().item() for a, r in zip("ab", ranks, strict=True)), ranks)
            for ranks in product(range(1, 5), repeat=2)
            if sum(ranks) <= budget
        )
        assert tuple(found[a].setting for a in "ab") == best[1]


def test_a_step_that_pays_late_is_taken_whole() -> None:
    late = [Rung(1, 1.0, 1), Rung(2, 0.99, 2), Rung(3, 0.0, 3)]  # the second byte alone saves next to nothing
    even = [Rung(1, 1.0, 1), Rung(3, 0.8, 3)]
    assert under({"a": late, "b": even}, {"a": 1.0, "b": 1.0}, 4)["a"].setting == 3
