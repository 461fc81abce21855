"""Re-warm: for going on from a run that has ended, up from its last rate to the peak, and down again."""

from dataclasses import dataclass

from weft.core import option
from weft.tune.schedules.schedule import Schedule, half_wave

__all__ = ["Rewarm"]


@dataclass(frozen=True)
class Rewarm(Schedule):
    """The warm-up rises from `start` instead of zero; then half a wave from 1 to `floor`.

    Ibrahim et al. 2024, arXiv 2403.08763, section 5: re-warming and re-decaying; `train.warmup` is how long it rises.
    """

    name = "rewarm"
    what = "up again from the last run's rate, then half a wave down"
    paper = "2403.08763"
    start: float = option(0.1, help="share of the peak at which the last run ended", minimum=0, maximum=1)
    floor: float = option(0.1, help="share of the peak at the end", minimum=0, maximum=1)

    def begins(self) -> float:
        return self.start

    def factor(self, progress: float) -> float:
        return half_wave(progress, 1.0, self.floor)
