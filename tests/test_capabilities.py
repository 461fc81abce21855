"""Capabilities are found, not believed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from weft.capabilities import capabilities, in_short
from weft.checks import MethodError
from weft.core import Method, option
from weft.core.method import _METHODS
from weft.registry import methods


@pytest.fixture
def unregistered():
    before = dict(_METHODS)
    yield
    _METHODS.clear()
    _METHODS.update(before)


@pytest.mark.parametrize("name", [n for n, cls in methods().items() if cls.__module__.startswith("weft.methods.")])
def test_every_kind_is_proved_and_every_option_described(name: str) -> None:
    found = capabilities(methods()[name])
    assert set(found.merges) == set(found.rows) == set(found.kinds)
    assert found.summary
    assert "=" in found.equation
    assert all(option.help and option.type for option in found.options)
    assert len(str(found).splitlines()) > 5


def test_what_cannot_merge_says_why() -> None:
    assert "gelu" in capabilities(methods()["bottleneck"]).merges["linear"]
    assert "virtual tokens" in capabilities(methods()["prefix"]).merges["attention"]
    assert in_short(capabilities(methods()["bias_tuning"]).merges) == "conv, norm"
    assert in_short(capabilities(methods()["lora"]).merges) == "yes"


def test_a_method_that_breaks_its_promise_is_an_error(unregistered) -> None:
    @dataclass(frozen=True)
    class Loud(Method):
        """y = 2 W x + d."""

        name = "loud_for_a_test"
        kinds = frozenset({"linear"})
        size: int = option(1, help="nothing")

        def init(self, site, op):
            return {"d": site.zeros(site.out_features)}

        def forward(self, c, x, op):
            return op.shift(op(x), c["d"]) if type(op).__name__ != "WeightOp" else op(x)

    with pytest.raises(MethodError, match="merged and live differ"):
        capabilities(Loud)
