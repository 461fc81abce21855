"""Schedules: their values at the ends and at the corners, their options, and that no step has a rate of zero."""

from __future__ import annotations

import math

import pytest

from weft.errors import WeftError
from weft.recipe import Train
from weft.recipe.describe import all_keys
from weft.tune.schedules import learning_rate, names, num_warmup_steps, resolve_schedule, schedule_curve


def rates(schedule, *, num_steps: int = 100, warmup: float = 0.1, peak: float = 2.0) -> list[float]:
    return [learning_rate(schedule, i, num_steps=num_steps, peak=peak, warmup=warmup) for i in range(num_steps)]


@pytest.mark.parametrize("schedule", names())
def test_rises_to_the_peak_after_the_warmup_and_never_to_zero(schedule):
    values, low = rates(schedule), 2.0 * resolve_schedule(schedule).begins()
    assert values[:10] == pytest.approx([low + (2.0 - low) * (i + 1) / 11 for i in range(10)])
    assert values[10] == 2.0
    assert max(values) == 2.0
    assert min(values) > 0
    assert values[11:] == sorted(values[11:], reverse=True)


def test_ends_and_middles():
    assert rates("constant")[-1] == 2.0
    assert rates("schedule-free")[-1] == 2.0
    assert rates("linear")[55] == pytest.approx(1.0)
    assert rates("linear")[-1] == pytest.approx(2.0 / 90)
    assert rates("cosine")[55] == pytest.approx(1.0)
    assert rates("cosine")[-1] == pytest.approx(1.0 - 0.99939, abs=1e-3)
    wsd = rates("wsd", warmup=0)
    assert wsd[:81] == pytest.approx([2.0] * 81)
    assert wsd[90] == pytest.approx(1.0)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_a_floor_is_where_it_ends(schedule):
    values = rates({"name": schedule, "floor": 0.25}, num_steps=10_000, warmup=0)
    assert values[-1] == pytest.approx(0.5, abs=2e-3)
    assert min(values) >= 0.5


def test_wsd_decays_over_a_share_and_in_a_shape():
    half = rates({"name": "wsd", "decay": 0.5}, warmup=0)
    assert half[:51] == [2.0] * 51
    assert half[75] == pytest.approx(1.0)
    root = rates({"name": "wsd", "decay": 0.5, "shape": "sqrt"}, warmup=0)
    assert root[75] == pytest.approx(2.0 * (1 - math.sqrt(0.5)))
    falling = rates({"name": "wsd", "decay": 0.5, "shape": "exponential", "floor": 0.01}, warmup=0)
    assert falling[75] == pytest.approx(2.0 * 0.1)
    with pytest.raises(WeftError, match="never reaches a floor of 0"):
        resolve_schedule({"name": "wsd", "shape": "exponential"})


def test_rewarm_starts_where_the_last_run_ended():
    """A cosine with a floor, and then a run that goes on from it: no jump, up to the peak, and down to the floor."""
    first = rates({"name": "cosine", "floor": 0.1}, num_steps=1000)
    second = rates("rewarm", num_steps=1000)
    assert second[0] == pytest.approx(first[-1], rel=0.12)
    assert second[0] == pytest.approx(2.0 * (0.1 + 0.9 / 101))
    assert second[100] == 2.0
    assert second[-1] == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize("shape", ["cosine", "inverse-sqrt"])
def test_infinite_cools_holds_and_anneals(shape):
    spec = {"name": "infinite", "cooldown": 0.4, "hold": 0.5, "anneal": 0.2, "floor": 0.005, "shape": shape}
    values = rates(spec, warmup=0)
    x = 0.5
    if shape == "cosine":
        middle = 1.0 + (2.0 - 1.0) * (1 + math.cos(math.pi * x)) / 2
    else:
        middle = 2.0 + (1.0 - 2.0) * (1 / math.sqrt(1 + 10 * x) - 1) / (1 / math.sqrt(11) - 1)
    assert values[20] == pytest.approx(middle)
    assert values[40:81] == pytest.approx([1.0] * 41)
    assert values[90] == pytest.approx(0.1)
    open_ended = rates({**spec, "anneal": 0}, warmup=0)
    assert open_ended[-1] == 1.0
    assert rates({"name": "infinite", "cooldown": 0, "hold": 1.0, "anneal": 0}, warmup=0) == [2.0] * 100
    with pytest.raises(WeftError, match="more than the whole run"):
        resolve_schedule({"name": "infinite", "cooldown": 0.7, "anneal": 0.4})


def test_warmup_is_a_share_below_one_and_a_count_from_one_on():
    assert num_warmup_steps(0.03, 100) == 3
    assert num_warmup_steps(7, 100) == 7
    assert num_warmup_steps(500, 100) == 99  # the last step still has the peak
    assert num_warmup_steps(0.5, 1) == 0


def test_the_curve_is_the_rate_of_every_step():
    train = Train(learning_rate=2.0, warmup=0.1, schedule={"name": "wsd", "decay": 0.5})
    assert schedule_curve(train, 100) == rates({"name": "wsd", "decay": 0.5})


def test_the_schema_names_the_files_and_what_is_wrong_is_said():
    described = dict(all_keys(Train))["schedule"].description
    assert all(name in described for name in names())
    with pytest.raises(WeftError, match=r"train.schedule: there is no schedule 'cosin'; did you mean 'cosine'"):
        learning_rate("cosin", 0, num_steps=1, peak=1.0)
    with pytest.raises(WeftError, match=r"wsd has no option 'decai'; did you mean 'decay'"):
        resolve_schedule({"name": "wsd", "decai": 0.1})
    with pytest.raises(WeftError, match=r"cosine.floor=1.5: must be at most 1"):
        resolve_schedule({"name": "cosine", "floor": 1.5})
    with pytest.raises(ValueError, match="options stand beside a name"):
        Train(schedule={"decay": 0.1})
