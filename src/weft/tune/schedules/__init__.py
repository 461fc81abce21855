"""Learning-rate schedules. A file in this folder is found by being here; its class says shares of the peak."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from weft.errors import WeftError, nearest
from weft.optim.choice import with_options
from weft.tune.schedules.schedule import Schedule

if TYPE_CHECKING:
    from weft.recipe import Train

__all__ = [
    "Schedule", "learning_rate", "names", "num_warmup_steps", "resolve_schedule", "schedule_curve", "schedules",
]  # fmt: skip

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
_SCHEDULES: dict[str, type[Schedule]] = {cls.name: cls for cls in Schedule.__subclasses__()}


def names() -> tuple[str, ...]:
    """Every schedule that there is."""
    return tuple(sorted(_SCHEDULES))


def schedules() -> dict[str, type[Schedule]]:
    """Every schedule by name."""
    return dict(sorted(_SCHEDULES.items()))


def resolve_schedule(spec: str | Mapping[str, Any]) -> Schedule:
    """The schedule that a name, or a mapping of `name` and options, describes; WeftError says what is wrong."""
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if name not in _SCHEDULES:
        raise WeftError(f"train.schedule: there is no schedule {name!r}; {nearest(str(name), _SCHEDULES)}")
    found: Schedule = with_options(_SCHEDULES[name], options, where="train.schedule")
    return found


def num_warmup_steps(warmup: float, num_steps: int) -> int:
    """Steps of rising rate: a share of all steps below 1, a count from 1 on; never the whole run."""
    steps = round(warmup * num_steps) if warmup < 1 else round(warmup)
    return min(steps, max(num_steps - 1, 0))


def learning_rate(
    schedule: str | Mapping[str, Any], step: int, *, num_steps: int, peak: float, warmup: float = 0.0
) -> float:
    """The rate of step 0, 1, ... num_steps - 1: a pure function, so a resumed run needs nothing but its step.

    It rises linearly and reaches `peak` at the first step after the warm-up; no step has a rate of zero.
    """
    chosen = _resolved(json.dumps(schedule if isinstance(schedule, str) else dict(schedule), sort_keys=True))
    rising = num_warmup_steps(warmup, num_steps)
    if step < rising:
        low = chosen.begins()
        return peak * (low + (1 - low) * (step + 1) / (rising + 1))
    return peak * chosen.factor((step - rising) / max(num_steps - rising, 1))


def schedule_curve(train: Train, num_steps: int) -> list[float]:
    """The learning rate of every step of a run."""
    peak, warmup = train.learning_rate, train.warmup
    return [
        learning_rate(train.schedule, step, num_steps=num_steps, peak=peak, warmup=warmup) for step in range(num_steps)
    ]


@lru_cache(64)
def _resolved(spec: str) -> Schedule:
    return resolve_schedule(json.loads(spec))
