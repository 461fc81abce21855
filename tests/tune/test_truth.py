"""What training took beside its forecast: said, kept, and not taken for the machine's speed when it was disturbed."""

from __future__ import annotations

from typing import Any

import pytest

from weft.plan.cache import read_records
from weft.plan.forecast import Forecast
from weft.plan.history import Correction, correct
from weft.plan.load import Load
from weft.plan.memory import Memory
from weft.tune.truth import Watched

FACTS = {"machine": "m", "calibrated": "monday", "reference_seconds": 0.1, "num_frozen": 10**6, "tokens": 100}


class Known:
    """A peak and a load that a test knows."""

    def __init__(self, held: int, load: Load):
        self._held, self._load = held, load

    def bytes(self) -> int:
        return self._held

    def load(self) -> Load:
        return self._load


def watched(load: Load, correction: Correction | None = None) -> Watched:
    forecast = Forecast(
        memory=Memory(weights=600, activations=400), seconds=10.0, num_steps=10, tokens_per_second=100.0, num_trained=1,
        num_frozen=1, disk_bytes=1, tokens=100, flops_per_step=1, correction=correction or Correction(), facts=FACTS,
    )  # fmt: skip
    known: Any = Known(1500, load)
    return Watched(forecast, known, known)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))


def test_forecast_and_truth_are_said_and_kept() -> None:
    said = watched(Load()).remember(num_steps=10, num_tokens=2000, seconds=10.0)
    assert said is not None
    assert "tokens/s 100 and 200" in said
    assert said.endswith("kept for the next forecast")
    (record,) = read_records()
    assert record["memory"] == 1.5
    assert record["time"] == 0.5
    assert record["measured"]["seconds"] == 10.0


def test_the_second_forecast_is_nearer_than_the_first() -> None:
    watched(Load()).remember(num_steps=10, num_tokens=2000, seconds=10.0)
    found = correct(FACTS, read_records())
    assert 1.25 < found.memory <= 1.5
    assert 0.5 <= found.time < 0.7
    watched(Load(), found).remember(num_steps=10, num_tokens=2000, seconds=10.0)
    assert read_records()[1]["memory"] == 1.5  # of the forecast before it was corrected
    assert correct(FACTS, read_records()).memory > found.memory


def test_a_disturbed_run_says_nothing_about_speed() -> None:
    busy = Load(others=1.0, cores=2, threads=2)
    said = watched(busy).remember(num_steps=10, num_tokens=2000, seconds=10.0)
    assert said is not None
    assert "but for the speed: other processes used 1.0 of its 2 processors" in said
    (record,) = read_records()
    assert "time" not in record
    assert correct(FACTS, read_records()).time == 1
    assert correct(FACTS, read_records()).memory > 1


def test_a_short_run_says_nothing_about_speed() -> None:
    watched(Load()).remember(num_steps=2, num_tokens=2000, seconds=10.0)
    assert "time" not in read_records()[0]
