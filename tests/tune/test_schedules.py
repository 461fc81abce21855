"""Schedules: their values at the ends and at the corners, and that no step has a rate of zero."""

from __future__ import annotations

import pytest

from weft.errors import WeftError
from weft.recipe import Train
from weft.recipe.describe import all_keys, expected
from weft.tune.schedules import learning_rate, names, num_warmup_steps


def rates(schedule: str, *, num_steps: int = 100, warmup: float = 0.1, peak: float = 2.0) -> list[float]:
    return [learning_rate(schedule, i, num_steps=num_steps, peak=peak, warmup=warmup) for i in range(num_steps)]


@pytest.mark.parametrize("schedule", names())
def test_rises_to_the_peak_after_the_warmup_and_never_to_zero(schedule):
    values = rates(schedule)
    assert values[:10] == pytest.approx([2.0 * (i + 1) / 11 for i in range(10)])
    assert values[10] == 2.0
    assert max(values) == 2.0
    assert min(values) > 0
    assert values[11:] == sorted(values[11:], reverse=True)


def test_ends_and_middles():
    assert rates("constant")[-1] == 2.0
    assert rates("linear")[55] == pytest.approx(1.0)
    assert rates("linear")[-1] == pytest.approx(2.0 / 90)
    assert rates("cosine")[55] == pytest.approx(1.0)
    assert rates("cosine")[-1] == pytest.approx(1.0 - 0.99939, abs=1e-3)
    wsd = rates("wsd", warmup=0)
    assert wsd[:81] == pytest.approx([2.0] * 81)
    assert wsd[90] == pytest.approx(1.0)


def test_warmup_is_a_share_below_one_and_a_count_from_one_on():
    assert num_warmup_steps(0.03, 100) == 3
    assert num_warmup_steps(7, 100) == 7
    assert num_warmup_steps(500, 100) == 99  # the last step still has the peak
    assert num_warmup_steps(0.5, 1) == 0


def test_the_schema_names_the_files_and_a_wrong_name_is_an_error():
    field = dict(all_keys(Train))["schedule"]
    assert set(expected(field).removeprefix("one of ").split(", ")) == set(names())
    with pytest.raises(WeftError, match="did you mean 'cosine'"):
        learning_rate("cosin", 0, num_steps=1, peak=1.0)
