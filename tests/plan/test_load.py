"""What other processes take: seen while they run, and counted only where it slows this one down."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from weft.plan import load as counting
from weft.plan.load import Load, LoadMeter


@pytest.mark.parametrize(
    ("load", "share"),
    [
        (Load(waited=0.0, others=0.02, cores=2, threads=2), 0.01),
        (Load(waited=0.0, others=1.0, cores=2, threads=2), 0.5),
        (Load(waited=0.3, others=0.4, cores=2, threads=2), 0.3),
        (Load(waited=0.0, others=1.5, cores=16, threads=8), 0.0),  # there is room for both
        (Load(waited=0.0, others=9.0, cores=16, threads=8), 0.875),
        (Load(waited=0.5, others=0.0, cores=2, threads=4), 0.0),  # its own threads are in one another's way
        (Load(waited=0.0, others=5.0, cores=4, threads=1), 1.0),
    ],
)
def test_what_it_costs(load: Load, share: float) -> None:
    assert load.share == pytest.approx(share)


def test_it_says_what_was_in_the_way() -> None:
    assert "1.2 of its 2 processors" in str(Load(waited=0.1, others=1.2, cores=2, threads=1))
    assert "wait for 40% of the time" in str(Load(waited=0.4, others=0.0, cores=2, threads=1))


def test_another_process_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "print('up', flush=True)\nwhile True: pass"], stdout=-1) as other:
        try:
            assert other.stdout is not None
            other.stdout.readline()
            meter = LoadMeter(1)
            time.sleep(0.5)
            load = meter.load()
        finally:
            other.kill()
    assert load.others > 0.3
    assert load.cores >= 1
    assert 0 <= load.share <= 1


def test_the_process_itself_is_not_another(monkeypatch) -> None:
    readings = iter([(0.0, 1.0, 50.0, 0.0), (10.0, 9.0, 60.0, 1.0)])
    monkeypatch.setattr(counting, "_reading", lambda cores: next(readings))
    monkeypatch.setattr(counting, "_cores", lambda: [0, 1])
    load = LoadMeter(1).load()
    assert load.others == pytest.approx(0.2)  # 10 s on processors, 8 of them its own, in 10 s
    assert load.waited == pytest.approx(1 / 9)
