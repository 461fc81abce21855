"""Which layers stand for others."""

from __future__ import annotations

from weft.plan.depth import shorten


def test_alike_layers_are_three() -> None:
    depth = shorten(["a"] * 22)
    assert depth.kept == (0, 1, 21)
    assert depth.extra == {1: 19}


def test_unlike_layers_stay() -> None:
    assert shorten("abc").kept == (0, 1, 2)
    assert shorten([]).kept == ()
    assert shorten("aaa").extra == {}


def test_layers_in_turn() -> None:
    depth = shorten("ab" * 6)
    assert depth.kept == (0, 1, 2, 3, 10, 11)
    assert depth.extra == {2: 3, 3: 3}
    assert len(depth.kept) + sum(depth.extra.values()) == 12
