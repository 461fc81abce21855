"""What past runs on this machine teach: forecasts are multiplied by how far off those of similar runs were."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

__all__ = ["Correction", "correct", "distance", "doubt"]

_NEAREST = 7
_FARTHEST = 3.0
_DOUBT = 2.0  # runs that say "no change" and are always there: few real ones move a forecast little
_DOUBT_OF_THE_SAME = 0.5  # where a run of the very same kind is known
_SAME = 0.1
_LARGEST = 4.0  # a run that was off by more than this was disturbed
_WRONG = 1.5  # a run that is off by more than this makes a calibration doubtful
_LONG_SECONDS = 5.0  # a shorter run says little


@dataclass(frozen=True)
class Correction:
    """Factors for memory and time, and how many past runs they are from."""

    memory: float = 1.0
    time: float = 1.0
    num_runs: int = 0

    def __str__(self) -> str:
        if not self.num_runs:
            return "not corrected: no similar run on this machine is known yet"
        return (
            f"corrected by {self.num_runs} similar past runs on this machine: memory x {self.memory:.3f}, "
            f"time x {self.time:.3f}"
        )


def distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """How unlike two runs are: by method, number formats, packing, allocator, and the sizes of base and batch."""
    apart = 1.5 * (a.get("method") != b.get("method")) + 2.0 * (a.get("dtype") != b.get("dtype"))
    apart += 2.0 * (a.get("quantize") != b.get("quantize")) + 1.0 * (a.get("packed") != b.get("packed"))
    apart += 1.0 * (a.get("activations") != b.get("activations")) + 2.0 * (a.get("allocator") != b.get("allocator"))
    for key in ("num_frozen", "tokens"):
        apart += abs(math.log10(max(a.get(key) or 1, 1) / max(b.get(key) or 1, 1)))
    return apart


def correct(facts: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> Correction:
    """The correction for a run of these facts.

    runs: records with `facts`, and `memory` and `time` as ratios of what was measured to what was forecast before any
    correction. The median of the nearest ones counts, pulled towards 1 while they are few. A ratio of times is one of
    its own calibration, and is carried over to that of `facts` by their `reference_seconds`.
    """
    here = [r for r in runs if r.get("facts", {}).get("machine") == facts.get("machine")]
    ratios = [(_log(r.get("memory")), _log(_carried(r, facts))) for r in here]
    ranked = sorted((distance(facts, r["facts"]), -i) for i, r in enumerate(here) if any(ratios[i]))
    near = [(apart, ratios[-i]) for apart, i in ranked if apart <= _FARTHEST][:_NEAREST]
    doubt = _DOUBT_OF_THE_SAME if near and near[0][0] <= _SAME else _DOUBT
    memory = _ratio([x for _, (found, _) in near for x in found], doubt)
    return Correction(memory, _ratio([x for _, (_, found) in near for x in found], doubt), len(near))


def doubt(runs: Sequence[Mapping[str, Any]], *, machine: str, calibrated: str) -> float | None:
    """How many times as long as was forecast the last run took that went by a calibration, where that is too far off.

    calibrated: when the calibration was made. None: it was close, or there was no such run.
    """
    for run in reversed(runs):
        facts, measured = run.get("facts", {}), run.get("measured", {})
        mine = facts.get("machine") == machine and facts.get("calibrated") == calibrated
        if mine and "time" in run and measured.get("seconds", 0) >= _LONG_SECONDS:
            ratio = run["forecast"]["tokens_per_second"] / max(measured["tokens_per_second"], 1e-9)
            return None if 1 / _WRONG <= ratio <= _WRONG else ratio
    return None


def _carried(run: Mapping[str, Any], facts: Mapping[str, Any]) -> float | None:
    """What a run's ratio of times would be under the calibration of `facts`."""
    then, now = run["facts"].get("reference_seconds"), facts.get("reference_seconds")
    ratio = run.get("time")
    return ratio * then / now if ratio and then and now else ratio


def _ratio(logs: Sequence[float], doubt: float) -> float:
    return math.exp(median(logs) * len(logs) / (len(logs) + doubt)) if logs else 1.0


def _log(ratio: object) -> list[float]:
    """The logarithm of a ratio, unless there is none or the run was disturbed."""
    return [math.log(ratio)] if isinstance(ratio, int | float) and 1 / _LARGEST < ratio < _LARGEST else []
