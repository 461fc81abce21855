"""What past runs on this machine teach: forecasts are multiplied by how far off those of similar runs were."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

__all__ = ["Correction", "correct", "distance"]

_NEAREST = 7
_FARTHEST = 3.0
_DOUBT = 2  # runs that say "no change" and are always there: few real ones move a forecast little
_LARGEST = 4.0  # a run that was off by more than this was disturbed


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
    """How unlike two runs are: by method, task, number formats, packing, and the sizes of base and batch."""
    apart = 1.5 * (a.get("method") != b.get("method")) + 2.0 * (a.get("dtype") != b.get("dtype"))
    apart += 2.0 * (a.get("quantize") != b.get("quantize")) + 1.0 * (a.get("packed") != b.get("packed"))
    apart += 1.0 * (a.get("activations") != b.get("activations"))
    for key in ("num_frozen", "tokens"):
        apart += abs(math.log10(max(a.get(key) or 1, 1) / max(b.get(key) or 1, 1)))
    return apart


def correct(facts: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> Correction:
    """The correction for a run of these facts.

    runs: records with `facts`, and `memory` and `time` as ratios of what was measured to what was forecast before any
    correction. The median of the nearest ones counts, pulled towards 1 while they are few.
    """
    here = (r for r in runs if r.get("facts", {}).get("machine") == facts.get("machine"))
    same = [r for r in here if _log(r, "memory") or _log(r, "time")]
    ranked = sorted(((distance(facts, r["facts"]), -i) for i, r in enumerate(same)))
    near = [same[-i] for apart, i in ranked if apart <= _FARTHEST][:_NEAREST]
    return Correction(_ratio(near, "memory"), _ratio(near, "time"), len(near))


def _ratio(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    logs = [value for r in runs for value in _log(r, key)]
    if not logs:
        return 1.0
    return math.exp(median(logs) * len(logs) / (len(logs) + _DOUBT))


def _log(run: Mapping[str, Any], key: str) -> list[float]:
    """The logarithm of a ratio, unless the run has none or was disturbed."""
    ratio = run.get(key)
    return [math.log(ratio)] if isinstance(ratio, int | float) and 1 / _LARGEST < ratio < _LARGEST else []
