"""How past runs correct a forecast: robustly, by similar runs only, and little while there are few."""

from __future__ import annotations

from weft.plan.cache import append_record, cache_folder, read_json, read_records, write_json
from weft.plan.history import Correction, correct, distance, doubt

FACTS = {"machine": "m", "method": "lora", "dtype": "float32", "quantize": None, "num_frozen": 10**6, "tokens": 1000}


def runs(*ratios: float, **facts):
    return [{"facts": {**FACTS, **facts}, "memory": r, "time": 2 * r} for r in ratios]


def test_nothing_known_changes_nothing() -> None:
    assert correct(FACTS, []) == Correction()
    assert "no similar run" in str(correct(FACTS, []))
    assert correct(FACTS, runs(1.5, machine="other")) == Correction()


def test_many_runs_count_in_full_and_few_in_part() -> None:
    one, many = correct(FACTS, runs(1.2)), correct(FACTS, runs(*[1.2] * 7))
    assert 1 < one.memory < many.memory < 1.2
    assert many.num_runs == 7
    assert one.time > one.memory
    assert "7 similar past runs" in str(many)


def test_one_disturbed_run_does_not_matter() -> None:
    calm = correct(FACTS, runs(*[1.1] * 6))
    assert correct(FACTS, runs(*[1.1] * 6, 3.5)).memory < 1.02 * calm.memory
    assert correct(FACTS, runs(*[1.1] * 6, 50.0)).memory <= calm.memory


def test_nearer_runs_are_taken_first() -> None:
    found = correct(FACTS, runs(*[1.1] * 7) + runs(*[2.0] * 7, method="dora"))
    assert found.memory < 1.11
    assert distance(FACTS, {**FACTS, "num_frozen": 10**8}) == 2
    assert correct(FACTS, runs(2.0, num_frozen=10**10)) == Correction()


def test_a_run_without_a_time_still_tells_memory() -> None:
    found = correct(FACTS, [{"facts": FACTS, "memory": 1.3}])
    assert found.memory > 1
    assert found.time == 1


def test_a_run_of_the_very_same_kind_counts_for_more() -> None:
    same, similar = correct(FACTS, runs(2.0)), correct(FACTS, runs(2.0, method="dora"))
    assert 1.5 < same.memory < 2
    assert 1 < similar.memory < 1.3


def test_times_are_carried_over_to_another_calibration() -> None:
    """A run that took twice the time of rates that were themselves three times too slow."""
    old = [{"facts": {**FACTS, "reference_seconds": 3.0}, "time": 0.4} for _ in range(7)]
    now = {**FACTS, "reference_seconds": 1.0}
    assert correct(now, old).time > 1.15
    assert correct({**now, "reference_seconds": 3.0}, old).time < 0.5
    assert correct(FACTS, old).time < 0.5  # nothing to carry it by


def test_a_doubtful_calibration() -> None:
    run = {
        "facts": {**FACTS, "calibrated": "monday"}, "time": 1.0, "forecast": {"tokens_per_second": 100.0},
        "measured": {"tokens_per_second": 300.0, "seconds": 60.0},
    }  # fmt: skip
    right = {**run, "measured": {"tokens_per_second": 110.0, "seconds": 60.0}}
    disturbed = {key: value for key, value in run.items() if key != "time"}
    assert doubt([run], machine="m", calibrated="monday") == 100 / 300
    assert doubt([run, right], machine="m", calibrated="monday") is None
    assert doubt([run], machine="m", calibrated="tuesday") is None
    assert doubt([run], machine="other", calibrated="monday") is None
    assert doubt([disturbed], machine="m", calibrated="monday") is None
    assert doubt([], machine="m", calibrated="monday") is None


def test_the_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "deep" / "cache"))
    assert read_records() == []
    assert read_json("machine.json") == {}
    append_record({"memory": 1.0})
    append_record({"memory": 2.0})
    with (cache_folder() / "runs.jsonl").open("a") as file:
        file.write('{"memory": 3')  # a kill
    assert [r["memory"] for r in read_records()] == [1.0, 2.0]
    write_json("machine.json", {"a": 1})
    assert read_json("machine.json") == {"a": 1}
    monkeypatch.delenv("WEFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(cache_folder()) == "/x/weft"
