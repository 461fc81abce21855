"""Constant: the peak throughout."""

from dataclasses import dataclass

from weft.tune.schedules.schedule import Schedule

__all__ = ["Constant"]


@dataclass(frozen=True)
class Constant(Schedule):
    """1 at every point of the run."""

    name = "constant"
    what = "the peak throughout"

    def factor(self, progress: float) -> float:  # noqa: ARG002  it does not look at it
        return 1.0
