"""Learning-rate schedules. A file in this folder is found by being here; its `factor` falls from 1 over the run."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules

from weft.errors import WeftError, nearest

__all__ = ["Factor", "learning_rate", "names", "num_warmup_steps"]

Factor = Callable[[float], float]

_FACTORS: dict[str, Factor] = {
    module.name: import_module(f"{__name__}.{module.name}").factor for module in iter_modules(__path__)
}


def names() -> tuple[str, ...]:
    """Every schedule that there is."""
    return tuple(sorted(_FACTORS))


def num_warmup_steps(warmup: float, num_steps: int) -> int:
    """Steps of rising rate: a share of all steps below 1, a count from 1 on; never the whole run."""
    steps = round(warmup * num_steps) if warmup < 1 else round(warmup)
    return min(steps, max(num_steps - 1, 0))


def learning_rate(schedule: str, step: int, *, num_steps: int, peak: float, warmup: float = 0.0) -> float:
    """The rate of step 0, 1, ... num_steps - 1: a pure function, so a resumed run needs nothing but its step.

    It rises linearly and reaches `peak` at the first step after the warm-up; no step has a rate of zero.
    """
    if schedule not in _FACTORS:
        raise WeftError(f"there is no schedule '{schedule}'; {nearest(schedule, _FACTORS)}")
    rising = num_warmup_steps(warmup, num_steps)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    return peak * _FACTORS[schedule]((step - rising) / max(num_steps - rising, 1))
