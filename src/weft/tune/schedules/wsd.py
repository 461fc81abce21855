"""Warm-up, stable, decay: the peak, then down over the last share of the run."""

from dataclasses import dataclass
from typing import Literal

from weft.core import option
from weft.tune.schedules.schedule import Schedule

__all__ = ["WSD"]


@dataclass(frozen=True)
class WSD(Schedule):
    """1, and over the last share of the run, x from 0 to 1: floor + (1 - floor) (1 - x), or (1 - sqrt x), or floor^x.

    Hu et al. 2024 (MiniCPM), arXiv 2404.06395; the square root: Hägele et al. 2024, arXiv 2405.18392.
    """

    name = "wsd"
    what = "the peak, then down over the last share of the run"
    paper = "2404.06395"
    decay: float = option(0.2, help="share of the steps after warm-up over which the rate falls", above=0, maximum=1)
    shape: Literal["linear", "sqrt", "exponential"] = option("linear", help="how it falls; exponential needs a floor")
    floor: float = option(0.0, help="share of the peak at the end", minimum=0, maximum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape == "exponential" and not self.floor:
            raise ValueError("wsd with shape=exponential never reaches a floor of 0: give a floor, such as 0.1")

    def factor(self, progress: float) -> float:
        x = max(0.0, (progress - (1.0 - self.decay)) / self.decay)
        if self.shape == "exponential":
            return self.floor**x
        return self.floor + (1.0 - self.floor) * (1.0 - (x if self.shape == "linear" else x**0.5))
