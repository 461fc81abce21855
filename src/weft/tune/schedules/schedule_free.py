"""Schedule-free: the peak throughout, with an optimiser that averages weights instead (Defazio et al. 2024)."""

from dataclasses import dataclass

from weft.tune.schedules.schedule import Schedule

__all__ = ["ScheduleFree"]


@dataclass(frozen=True)
class ScheduleFree(Schedule):
    """1 at every point of the run. Defazio et al. 2024, arXiv 2405.15682."""

    name = "schedule-free"
    what = "the peak throughout; for the optimizers schedulefree-adamw and schedulefree-sgd, which average weights"
    paper = "2405.15682"

    def factor(self, progress: float) -> float:  # noqa: ARG002  it does not look at it
        return 1.0
