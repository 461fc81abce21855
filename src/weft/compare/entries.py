"""What is compared: a list of methods under one recipe, or a list of recipes that share base, data and budget."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.compare.shared import NAME
from weft.errors import RecipeError, nearest
from weft.recipe import Recipe
from weft.registry import method_from_spec, methods
from weft.tune.loop import num_steps
from weft.tune.session import resolve_plan

__all__ = ["Entry", "check_alike", "entries_of_methods", "entries_of_recipes", "method_names", "with_own_targets"]

_SHARED = (
    "base", "task", "data", "forgetting", "preference", "save_modules", "train.batch_size", "train.accumulate",
    "train.seed", "train.threads", "train.precision", "train.loss_chunk",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One line of the comparison. note: what a reader should know of it."""

    name: str
    recipe: Recipe
    note: str = ""


def method_names(text: str) -> list[str]:
    """`lora, dora` or `all` as names. Raises RecipeError naming the nearest method for one that is not known."""
    known = methods()
    named = [name.strip() for name in text.split(",") if name.strip()]
    names = list(known) if named == ["all"] else named
    for name in names:
        if name not in known:
            raise RecipeError(f"there is no method '{name}'; {nearest(name, known)}")
    return names


def entries_of_methods(recipe: Recipe, chosen: str | Sequence[str | Mapping[str, Any]]) -> list[Entry]:
    """The recipe with each method. A name alone stands for the method at its own options, or at those of the recipe.

    chosen: names, as in "lora,dora" or "all", or a list of names and of mappings as a recipe's `method`.
    """
    own, entries = recipe.method, []
    for each in method_names(chosen) if isinstance(chosen, str) else chosen:
        if isinstance(each, str):
            (name,) = method_names(each)
            method = dict(own) if name == own["name"] else {"name": name}
        else:
            method_from_spec(each)  # it says what is wrong with an option
            method = dict(each)
            options = [f"{key}={_short(value)}" for key, value in each.items() if key != "name"]
            name = " ".join([method["name"], *options])
        entries.append(Entry(name, recipe.model_copy(update={"method": method})))
    return _told_apart(entries)


def with_own_targets(model: Any, entry: Entry) -> Entry:
    """The entry with its method's own targets where the recipe's do not suit it, as a note then says.

    Raises what `weft.resolve` says about the recipe's targets where the method's own do not do either.
    """
    recipe = entry.recipe
    try:
        resolve_plan(model, recipe, name=NAME)
    except ValueError as error:
        cls = methods()[recipe.method["name"]]
        own = recipe.model_copy(update={"targets": None, "layers": None})
        try:
            plan = resolve_plan(model, own, name=NAME)
        except ValueError:
            raise error from None
        at = ", ".join(sorted({site.site.kind for site in plan.sites}))
        note = f"at its own targets, {cls.default_targets} ({at}): the recipe's do not suit it"
        return Entry(entry.name, own, note)
    return entry


def entries_of_recipes(recipes: Sequence[Recipe]) -> list[Entry]:
    """One entry for each recipe, named after it."""
    return _told_apart([Entry(Path(str(recipe.output)).name, recipe) for recipe in recipes])


def _told_apart(entries: list[Entry]) -> list[Entry]:
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"two of what is compared are called {name!r}: rename one, or give it another output")
    if not entries:
        raise RecipeError("no method is named; as in --methods lora,dora")
    return entries


def check_alike(entries: Sequence[Entry], num_rows: int) -> None:
    """RecipeError naming the key in which two recipes differ that what is compared must share."""
    first = entries[0]
    for entry in entries[1:]:
        for key in _SHARED:
            here, there = _value(entry.recipe, key), _value(first.recipe, key)
            if here != there:
                raise RecipeError(
                    f"{entry.name}: {key} is {here!r}, and {there!r} in {first.name}: what is compared shares base, "
                    f"data and budget; change it for all, as in {key}=..."
                )
        here, there = (num_steps(e.recipe.train, num_rows) for e in (entry, first))
        if here != there:
            raise RecipeError(
                f"{entry.name} has {here} steps, and {first.name} {there}: what is compared has one budget; give "
                "--steps"
            )


def _value(recipe: Recipe, key: str) -> Any:
    found: Any = recipe
    for part in key.split("."):
        found = getattr(found, part)
    return found.model_dump(mode="json") if hasattr(found, "model_dump") else found


def _short(value: Any) -> str:
    """A value as it stands in a name: a long one cut, which names a file too."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:16]}...{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"
