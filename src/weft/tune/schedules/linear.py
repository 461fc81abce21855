"""Linear: a straight line from the peak down."""

from dataclasses import dataclass

from weft.core import option
from weft.tune.schedules.schedule import Schedule

__all__ = ["Linear"]


@dataclass(frozen=True)
class Linear(Schedule):
    """1 - (1 - floor) progress."""

    name = "linear"
    what = "a straight line down"
    floor: float = option(0.0, help="share of the peak at the end", minimum=0, maximum=1)

    def factor(self, progress: float) -> float:
        return 1.0 - (1.0 - self.floor) * progress
