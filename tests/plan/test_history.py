"""How past runs correct a forecast: robustly, by similar runs only, and little while there are few."""

from __future__ import annotations

from weft.plan.cache import append_record, cache_folder, read_json, read_records, write_json
from weft.plan.history import Correction, correct, distance

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
