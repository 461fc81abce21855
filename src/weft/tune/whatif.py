"""What a recipe would take if it were another: what makes it fit, and tables over its keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from weft.errors import RecipeError
from weft.plan.fit import Changed, Limits, find_fit, with_keys
from weft.plan.forecast import Forecast
from weft.plan.plot import plot
from weft.recipe import Recipe, to_yaml
from weft.tune.ahead import foresee, sampled
from weft.tune.schedules import schedule_curve
from weft.units import readable_bytes, readable_seconds

__all__ = ["Fitting", "compare", "draw", "fit_recipe", "parse_table", "table_rows", "write_fit"]


@dataclass(frozen=True)
class Fitting:
    """Changes that make a recipe fit, fastest first; or, where `fits` is False, those that come nearest."""

    changed: tuple[Changed, ...]
    fits: bool

    def __str__(self) -> str:
        if self.fits and not self.changed[0].keys:
            return "it fits as it is"
        if not self.fits:
            return f"nothing that is known makes it fit; nearest comes {self.changed[0]}"
        return "\n".join(["it fits with one of these, fastest first:", *(f"  {c}" for c in self.changed)])


def fit_recipe(recipe: Recipe, limits: Limits) -> Fitting:
    """What to change so that a recipe fits the limits."""
    tokenizer, splits, share = sampled(recipe)

    def forecast(other: Recipe) -> Forecast:
        return foresee(other, tokenizer, splits, share=share)

    found, fits = find_fit(recipe, forecast, limits)
    return Fitting(tuple(found), fits)


def write_fit(changed: Changed, path: Path) -> Path:
    """Write a changed recipe beside the one that it came from, which stays as it is: my.yaml gives my.fit.yaml."""
    target = path.with_name(f"{path.stem}.fit.yaml")
    head = "".join(f"# {key}: {value}\n" for key, value in changed.keys.items())
    temporary = target.with_suffix(".tmp")
    temporary.write_text(
        f"# {path.name}, made to fit by `weft plan`; changed:\n{head}{to_yaml(changed.recipe)}", "utf-8"
    )
    temporary.replace(target)
    return target


def parse_table(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`method.rank=4,8` as {"method.rank": [4, 8]}. Raises RecipeError for text of another form."""
    found = {}
    for text in texts:
        key, separator, values = text.partition("=")
        if not separator or not values:
            raise RecipeError(f"--table {text}: write a key and its values, as in method.rank=4,8,16")
        found[key.strip()] = [yaml.safe_load(value) for value in values.split(",")]
    return found


def compare(recipe: Recipe, values: Mapping[str, Sequence[Any]]) -> dict[str, Forecast | str]:
    """The forecast for every combination of values of some keys, by its name; in words where there can be none."""
    tokenizer, splits, share = sampled(recipe)
    found: dict[str, Forecast | str] = {}
    for chosen in product(*values.values()):
        keys = dict(zip(values, chosen, strict=True))
        name = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in keys.items())
        try:
            found[name] = foresee(_changed(recipe, keys), tokenizer, splits, share=share)
        except (ValueError, TypeError, KeyError) as error:
            found[name] = str(error).splitlines()[0]
    return found


def _changed(recipe: Recipe, keys: Mapping[str, Any]) -> Recipe:
    """A method's name alone starts from its own options."""
    keys = dict(keys)
    name = keys.pop("method.name", keys.pop("method", None))
    if name is not None:
        rank = {"rank": recipe.method["rank"]} if "rank" in recipe.method and name == recipe.method["name"] else {}
        recipe = recipe.model_copy(update={"method": {"name": name, **rank}})
    return with_keys(recipe, keys)


def table_rows(found: Mapping[str, Forecast | str]) -> list[tuple[str, ...]]:
    """The table of `compare`: a head, and a row for each combination."""
    rows: list[tuple[str, ...]] = [("", "memory", "tokens/s", "training", "trained", "disk")]
    for name, f in found.items():
        if isinstance(f, str):
            rows.append((name, "-", "-", f, "", ""))
        else:
            rows.append(
                (
                    name, readable_bytes(f.memory_bytes), f"{f.tokens_per_second:,.0f}", readable_seconds(f.seconds),
                    f"{f.num_trained:,}", readable_bytes(f.disk_bytes),
                )
            )  # fmt: skip
    return rows


def draw(path: Path, recipe: Recipe, forecasts: Mapping[str, Forecast]) -> Path:
    """The plot of forecasts and of the recipe's learning rate."""
    steps = next(iter(forecasts.values())).num_steps
    return plot(path, forecasts, schedule_curve(recipe.train, steps))
