"""Which changes of a recipe make it fit a limit of memory and of time, cheapest in speed first."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.errors import WeftError
from weft.plan.forecast import Forecast
from weft.recipe import Recipe
from weft.units import readable_bytes, readable_seconds

__all__ = ["Changed", "Limits", "changes", "find_fit", "parse_seconds", "with_keys"]

Foresee = Callable[[Recipe], Forecast]
_MOST_FORECASTS = 24


@dataclass(frozen=True)
class Limits:
    """The most bytes and seconds that a run may take; None: any."""

    memory_bytes: int | None = None
    seconds: float | None = None

    def over(self, forecast: Forecast) -> float:
        """How far a forecast is beyond the limits: 1 is at them, less is inside."""
        shares = [1e-9]
        if self.memory_bytes is not None:
            shares.append(forecast.memory_bytes / self.memory_bytes)
        if self.seconds is not None:
            shares.append(forecast.seconds / self.seconds)
        return max(shares)


@dataclass(frozen=True)
class Changed:
    """A recipe with some keys changed, and its forecast."""

    keys: Mapping[str, Any]
    recipe: Recipe
    forecast: Forecast

    def __str__(self) -> str:
        keys = " ".join(f"{key}={value if value is not None else 'null'}" for key, value in self.keys.items())
        memory, seconds = readable_bytes(self.forecast.memory_bytes), readable_seconds(self.forecast.seconds)
        return f"{keys or '(as it is)'}: {memory}, {seconds}"


def find_fit(recipe: Recipe, foresee: Foresee, limits: Limits) -> tuple[list[Changed], bool]:
    """Changes that make a recipe fit, fastest first; or, with False, those that come nearest.

    Every single change is forecast; then those that lower what is over a limit are added to one another, the one that
    costs the least time for what it saves first, until all fits.
    """
    start = Changed({}, recipe, foresee(recipe))
    if limits.over(start.forecast) <= 1:
        return [start], True
    single = [c for keys in changes(recipe) if (c := _try(recipe, keys, foresee)) is not None]
    fitting = [c for c in single if limits.over(c.forecast) <= 1]
    if fitting:
        return sorted(fitting, key=lambda c: c.forecast.seconds), True
    useful = [c for c in single if limits.over(c.forecast) < limits.over(start.forecast)]
    useful.sort(key=lambda c: _price(c, start, limits))
    best, tried = start, len(single)
    for change in useful:
        if tried >= _MOST_FORECASTS or change.keys.keys() & best.keys.keys():
            continue
        tried += 1
        more = _try(recipe, {**best.keys, **change.keys}, foresee)
        if more is not None and limits.over(more.forecast) < limits.over(best.forecast):
            best = more
        if limits.over(best.forecast) <= 1:
            return [best], True
    return [best], False


def parse_seconds(text: str) -> float:
    """A duration such as 90s, 45min, 2h or 1h30min, in seconds. Raises ValueError for anything else."""
    found = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)(?:min|m))?(?:([\d.]+)s?)?", text.strip().lower().replace(" ", ""))
    if found is None or not any(found.groups()):
        raise ValueError(f"{text!r} is no duration: write it as 90s, 45min, 2h or 1h30min")
    return sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True))


def changes(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Changes that leave what is learnt nearly or exactly as it was, each a mapping of keys."""
    train, base = recipe.train, recipe.base
    if train.packing is False or train.bucket_by_length:
        yield {"train.packing": None, "train.bucket_by_length": False}
    if train.loss_chunk == 0:
        yield {"train.loss_chunk": None}
    if train.activations == "keep" and train.activation_budget is None:
        yield {"train.activations": "attention"}
        yield {"train.activations": "recompute"}
    for size in _halves(train.batch_size):  # the same rows in a step
        yield {"train.batch_size": size, "train.accumulate": train.accumulate * train.batch_size // size}
    if recipe.method["name"] == "full":
        yield {"method": {"name": "lora", "rank": 16}}
    if base.dtype == "float32" and base.quantize is None:
        yield {"base.dtype": "bfloat16"}
    if base.quantize is None:
        yield {"base.quantize": "packed-int8"}
        yield {"base.quantize": "nf4"}
    if train.accumulate == 1 and not train.optimizer_in_backward and train.precision != "float16":
        yield {"train.optimizer_in_backward": True, "train.clip_norm": None}


def _halves(size: int) -> Sequence[int]:
    found = []
    while size % 2 == 0 and size > 1:
        size //= 2
        found.append(size)
    return found


def _price(change: Changed, start: Changed, limits: Limits) -> float:
    """Time lost for each part of the excess that is saved."""
    saved = limits.over(start.forecast) - limits.over(change.forecast)
    return (change.forecast.seconds / max(start.forecast.seconds, 1e-9) - 1) / max(saved, 1e-9)


def _try(recipe: Recipe, keys: Mapping[str, Any], foresee: Foresee) -> Changed | None:
    """The forecast with some keys changed; None where the recipe or the model does not allow that."""
    try:
        changed = with_keys(recipe, keys)
        return Changed(keys, changed, foresee(changed))
    except (WeftError, ValueError, TypeError, RuntimeError, ImportError):
        return None


def with_keys(recipe: Recipe, keys: Mapping[str, Any]) -> Recipe:
    """The recipe with dotted keys set; ValueError for values that do not go together."""
    tree = recipe.model_dump(mode="json")
    for key, value in keys.items():
        target = tree
        *sections, last = key.split(".")
        for section in sections:
            target = target[section]
        target[last] = value
    return Recipe.model_validate(tree)
