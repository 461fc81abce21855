"""Cosine: half a wave from the peak down (Loshchilov and Hutter 2016, without restarts)."""

from dataclasses import dataclass

from weft.core import option
from weft.tune.schedules.schedule import Schedule, half_wave

__all__ = ["Cosine"]


@dataclass(frozen=True)
class Cosine(Schedule):
    """floor + (1 - floor) (1 + cos(pi progress)) / 2. Loshchilov and Hutter 2016, arXiv 1608.03983."""

    name = "cosine"
    what = "half a wave down"
    paper = "1608.03983"
    floor: float = option(0.0, help="share of the peak at the end", minimum=0, maximum=1)

    def factor(self, progress: float) -> float:
        return half_wave(progress, 1.0, self.floor)
