"""The machine's speed: kept when it was quiet, measured again when it was busy or when a run proves it wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from weft.plan.cache import append_record, read_json
from weft.plan.calibration import CLASSES, Rates, machine_key
from weft.plan.load import Load
from weft.plan.speed import step_seconds
from weft.plan.trace import Call, Trace
from weft.tune import calibrate
from weft.tune.calibrate import _solved, calibrated, settled_seconds

CPU = torch.device("cpu")
QUIET, BUSY = Load(others=0.0, cores=2, threads=2), Load(others=1.0, cores=2, threads=2)


def rates(seconds: float) -> Rates:
    matmul = {d: [[64, 64, 64, seconds]] for d in ("float32", "bfloat16")}
    return Rates(matmul, {c: [[1e3, seconds]] for c in CLASSES}, seconds)


class Machine:
    """A machine that is as busy, and as fast, as a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.load, self.seconds, self.measured = QUIET, 1.0, 0
        machine = self

        class Meter:
            def __init__(self, threads: int):
                pass

            def load(self) -> Load:
                return machine.load

        monkeypatch.setattr(calibrate, "LoadMeter", Meter)
        monkeypatch.setattr(calibrate, "measure", self._measure)
        monkeypatch.setattr(calibrate, "_proved", lambda found, _: replace(found, reference_seconds=self.seconds))
        monkeypatch.setattr(calibrate, "_LOOK_SECONDS", 0.0)

    def _measure(self, _: torch.device) -> Rates:
        self.measured += 1
        return rates(self.seconds)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    return Machine(monkeypatch)


def test_a_quiet_machine_is_measured_once(machine: Machine) -> None:
    first = calibrated(CPU)
    assert (first.busy, first.notes, machine.measured) == ("", (), 1)
    again = calibrated(CPU)
    assert machine.measured == 1
    assert (again.measured, again.reference_seconds) == (first.measured, 1.0)
    calibrated(CPU, recalibrate=True)
    assert machine.measured == 2


def test_a_busy_machine_is_measured_twice_and_again_later(machine: Machine) -> None:
    machine.load, machine.seconds = BUSY, 3.0
    found = calibrated(CPU)
    assert machine.measured == 2
    assert "other processes used 1.0 of its 2 processors" in found.notes[0]
    assert "rough" in calibrated(CPU).notes[0]
    assert machine.measured == 2  # still busy: measuring again would say no more
    machine.load, machine.seconds = QUIET, 1.0
    quiet = calibrated(CPU)
    assert (quiet.notes, quiet.reference_seconds, machine.measured) == ((), 1.0, 3)
    assert read_json("machine.json")[machine_key(CPU)]["busy"] == ""


def test_what_was_measured_quietly_is_not_lost_to_a_busy_moment(machine: Machine) -> None:
    calibrated(CPU)
    machine.load, machine.seconds = BUSY, 3.0
    found = calibrated(CPU, recalibrate=True)
    assert found.reference_seconds == 1.0
    assert "the speed from before is kept" in found.notes[0]
    machine.load = QUIET
    assert calibrated(CPU).notes == ()


def test_a_run_that_was_far_off_is_reason_enough(machine: Machine) -> None:
    found = calibrated(CPU)
    record = {
        "facts": {"machine": machine_key(CPU), "calibrated": found.measured}, "time": 3.0,
        "forecast": {"tokens_per_second": 300.0}, "measured": {"tokens_per_second": 100.0, "seconds": 60.0},
    }  # fmt: skip
    append_record({**record, "measured": {"tokens_per_second": 250.0, "seconds": 60.0}})
    assert calibrated(CPU).notes == ()
    append_record({**record, "measured": {"tokens_per_second": 100.0, "seconds": 0.5}})  # too short to say anything
    assert calibrated(CPU).notes == ()
    append_record(record)
    assert "3.0 x its forecast time" in calibrated(CPU).notes[0]
    assert machine.measured == 2


def test_rates_of_another_version_are_measured_again(machine: Machine) -> None:
    calibrate.write_json("machine.json", {machine_key(CPU): {"unknown": 1}})
    calibrated(CPU)
    assert machine.measured == 1


def test_steps_that_were_disturbed_do_not_count() -> None:
    assert settled_seconds([(1.0, 0.99), (1.1, 1.09), (1.2, 1.19), (5.0, 1.3)]) == pytest.approx(1.1)
    assert settled_seconds([(5.0, 1.3), (4.0, 1.2), (3.0, 1.4)]) == pytest.approx(1.2)


def test_two_steps_tell_overhead_from_work() -> None:
    """Both come out as they were put in, whatever the two steps have of each."""
    known = rates(1e-9)
    passes = {name: [[1e3, 1e-6], [1e9, 1.0]] for name in known.passes}
    known = replace(known, passes=passes, call_seconds=1e-9)
    small, large = (traced_calls(n) for n in (10**3, 10**7))

    def real(trace: Trace) -> float:
        return step_seconds(trace, {}, replace(known, call_seconds=3e-5, scale=1.25))[0]

    found = _solved(known, (real(small), small, {}), (real(large), large, {}))
    assert (found.call_seconds, found.scale) == (pytest.approx(3e-5), pytest.approx(1.25))
    assert found.reference_seconds == real(large)
    disturbed = _solved(known, (real(large), small, {}), (real(small), large, {}))
    assert disturbed.call_seconds > 0
    assert disturbed.scale > 0


def traced_calls(size: int) -> Trace:
    found = Trace()
    shape = ((size,), 4)
    found.calls[Call("aten::mul.Tensor", (shape, shape), (shape,), False), None, False] = 7
    found.calls[Call("aten::t.default", (shape,), (shape,), True), None, False] = 4
    return found


def test_the_faster_of_two_measurements_counts() -> None:
    slow, fast = rates(2.0), rates(1.0)
    mixed = replace(slow, call_seconds=0.5)
    assert slow.fastest(fast) == replace(fast)
    assert mixed.fastest(fast).call_seconds == 0.5
