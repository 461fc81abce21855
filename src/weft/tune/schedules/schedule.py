"""The protocol of a schedule: options in a frozen dataclass, and a pure function of how far the run has come."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from weft.core.method import check_options

__all__ = ["Schedule", "half_wave"]


@dataclass(frozen=True)
class Schedule:
    """Shares of the peak over a run. Subclass it with a `name` in a file of this folder: that registers it."""

    name: ClassVar[str]
    what: ClassVar[str]
    paper: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_options(self)

    def begins(self) -> float:
        """The share from which the warm-up rises."""
        return 0.0

    def factor(self, progress: float) -> float:
        """The share at a point of the run after its warm-up, from 0 up to, not including, 1."""
        raise NotImplementedError


def half_wave(progress: float, high: float, low: float) -> float:
    """From high to low along half a cosine."""
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * progress))
