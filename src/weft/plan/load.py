"""How far other processes are in the way of what is measured: the processors that they hold meanwhile."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["Load", "LoadMeter"]

_TASKS = Path("/proc/self/task")
_LEFT_ALONE = 0.25  # of a processor that this process does not use, others may have so much before they slow it down


@dataclass(frozen=True)
class Load:
    """What others took while something ran.

    waited: share of the time in which this process's threads wanted a processor and had none. others: processors that
    other processes, and other guests of the same host, kept busy, of `cores`. threads: of this process.
    """

    waited: float = 0.0
    others: float = 0.0
    cores: int = 1
    threads: int = 1

    @property
    def share(self) -> float:
        """The part of the time, 0 to 1, that others are likely to have cost."""
        taken = max(self.others - _LEFT_ALONE * max(self.cores - self.threads, 0), 0.0)
        waited = self.waited if self.threads <= self.cores else 0.0  # its own threads wait for one another
        return min(max(taken / self.threads, waited), 1.0)

    def __str__(self) -> str:
        if self.waited > self.others / self.threads:
            return f"other processes made it wait for {self.waited:.0%} of the time"
        return f"other processes used {self.others:.1f} of its {self.cores} processors"


class LoadMeter:
    """Counts from when it was made. threads: how many the process works with."""

    def __init__(self, threads: int):
        self._threads, self._cores = threads, _cores()
        self._wall, self._own, self._all, self._delay = _reading(self._cores)

    def load(self) -> Load:
        """What others took until now."""
        wall, own, everything, delay = _reading(self._cores)
        wall, own = max(wall - self._wall, 1e-9), max(own - self._own, 0.0)
        delay = max(delay - self._delay, 0.0)
        others = max(everything - self._all - own, 0.0) / wall
        return Load(delay / max(delay + own, 1e-9), others, len(self._cores), self._threads)


def _cores() -> list[int]:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(psutil.cpu_count() or 1))


def _reading(cores: list[int]) -> tuple[float, float, float, float]:
    """Seconds: of the clock, of this process on processors, of all processes on these, and of waiting for one."""
    every, busy = psutil.cpu_times(percpu=True), 0.0
    for number in cores:
        if number < len(every):
            one = every[number]
            idle = one.idle + getattr(one, "iowait", 0.0)
            guests = getattr(one, "guest", 0.0) + getattr(one, "guest_nice", 0.0)  # counted as user time already
            busy += sum(one) - idle - guests
    return time.perf_counter(), time.process_time(), busy, _delay()


def _delay() -> float:
    """Seconds that the threads of this process were ready to run and did not; 0 where the system does not say."""
    total = 0
    for task in _TASKS.iterdir() if _TASKS.is_dir() else ():
        with contextlib.suppress(OSError, ValueError, IndexError):
            total += int((task / "schedstat").read_text(encoding="ascii").split()[1])
    return total / 1e9
