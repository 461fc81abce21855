"""Infinite: down to a constant rate that can go on for ever, and a short anneal at the end of a run."""

from dataclasses import dataclass
from typing import Literal

from weft.core import option
from weft.tune.schedules.schedule import Schedule, half_wave

__all__ = ["Infinite"]

_STEEPNESS = 10.0
"""How fast 1 / sqrt(1 + a x) falls over the cool-down; the paper leaves a to the user."""


@dataclass(frozen=True)
class Infinite(Schedule):
    """Cool-down from 1 to `hold`, then `hold`, then hold (floor / hold)^x over the last share, x from 0 to 1.

    Ibrahim et al. 2024, arXiv 2403.08763, section 7. A run that others will go on from has anneal: 0, and those have
    cooldown: 0 and a peak that is the constant rate.
    """

    name = "infinite"
    what = "down to a constant rate, held, and a short anneal at the end"
    paper = "2403.08763"
    cooldown: float = option(
        0.3, help="share of the steps after warm-up that fall to the constant", minimum=0, maximum=1
    )
    hold: float = option(0.5, help="the constant rate, as a share of the peak", above=0, maximum=1)
    anneal: float = option(0.1, help="share of the steps at the end that fall to the floor", minimum=0, maximum=1)
    floor: float = option(0.01, help="share of the peak at the end of the anneal", above=0, maximum=1)
    shape: Literal["cosine", "inverse-sqrt"] = option("cosine", help="how the cool-down falls")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cooldown + self.anneal > 1:
            raise ValueError(f"infinite: cooldown={self.cooldown} and anneal={self.anneal} are more than the whole run")

    def factor(self, progress: float) -> float:
        if progress < self.cooldown:
            return self._cooled(progress / self.cooldown)
        if progress < 1.0 - self.anneal:
            return self.hold
        return self.hold * (self.floor / self.hold) ** ((progress - 1.0 + self.anneal) / self.anneal)

    def _cooled(self, x: float) -> float:
        if self.shape == "cosine":
            return half_wave(x, 1.0, self.hold)
        fallen, most = (1 + _STEEPNESS * x) ** -0.5 - 1, (1 + _STEEPNESS) ** -0.5 - 1
        return 1.0 + (self.hold - 1.0) * fallen / most
