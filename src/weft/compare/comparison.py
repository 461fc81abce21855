"""`compare`: methods or recipes on one base, data, budget and seeds, in one process that can be stopped at any time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from weft.compare.entries import Entry, check_alike, entries_of_methods, entries_of_recipes, with_own_targets
from weft.compare.figures import Comparison, summarise
from weft.compare.journal import Journal, digest
from weft.compare.matching import Match, match_size
from weft.compare.runs import Trained, final, trained, trial
from weft.compare.search import RUNGS, Budget, choose_rate, open_searches
from weft.compare.settings import Settings
from weft.compare.shared import Shared, share
from weft.compare.timing import step_ratio
from weft.errors import RecipeError, nearest
from weft.recipe import Recipe, load_recipe, resolve_method
from weft.registry import methods as registered
from weft.tune.ahead import foresee_memory
from weft.tune.loop import num_steps
from weft.tune.machine import DISK_ERRORS
from weft.tune.outcome import write_json
from weft.tune.progress import stderr_console
from weft.tune.session import resolve_plan, threads
from weft.tune.stop import Interrupted, Stop
from weft.units import readable_seconds

__all__ = ["compare"]

_LEAST_STEPS = 4  # of a trial: one for each quarter


def compare(
    recipes: Recipe | str | Path | Sequence[Recipe | str | Path],
    methods: str | Sequence[str | Mapping[str, Any]] | None = None,
    *,
    output: str | Path = "runs/compare",
    settings: Settings = Settings(),  # noqa: B008  frozen
    console: Console | None = None,
) -> Comparison:
    """Train several methods (or recipes) alike, and say which differences between them are real.

    recipes: one recipe with `methods`, or several recipes that share base, data and budget, without.
    methods: "lora,dora", "all", or a list of names and of mappings as a recipe's `method`.
    output: gets compare.json, compare.html, and what is needed to go on: calling this again repeats nothing that is
        done, and gives the same losses to the bit.
    A method that fails is a row with its error. Raises RecipeError for what cannot be compared, and Interrupted after
    Ctrl-C or SIGTERM, when compare.json and compare.html hold what is done.
    """
    console = console or stderr_console()
    entries = _entries(recipes, methods, settings)
    folder = Path(output)
    journal = Journal(folder)

    def say(text: str) -> None:
        console.print(text, markup=False)

    with threads(entries[0].recipe.train.threads), Stop() as stop:
        shared = share(entries[0].recipe, say, rows=settings.rows)
        check_alike(entries, len(shared.session.splits.train))
        work = _Work(shared, settings, journal, stop, say, folder, [_Row(entry) for entry in entries])
        try:
            work.go()
        except (Interrupted, KeyboardInterrupt):
            done, total = work.counts()
            said = f"; what they say is in {work.write(finished=False).page}" if done else ""
            raise Interrupted(f"stopped with {done} of {total} runs done{said}; the same command goes on") from None
        return work.write(finished=True)


def _entries(recipes: Any, methods: str | Sequence[str | Mapping[str, Any]] | None, settings: Settings) -> list[Entry]:
    given = [recipes] if isinstance(recipes, Recipe | str | Path) else list(recipes)
    if not given:
        raise RecipeError("there is nothing to compare: give one recipe and methods, or several recipes")
    loaded = [each if isinstance(each, Recipe) else load_recipe(each) for each in given]
    if settings.steps is not None:
        steps = {"steps": settings.steps, "epochs": None}
        loaded = [r.model_copy(update={"train": r.train.model_copy(update=steps)}) for r in loaded]
    if methods is not None and len(loaded) > 1:
        raise RecipeError(f"methods are compared under one recipe, and {len(loaded)} are given: give one of the two")
    if methods is None and len(loaded) == 1:
        raise RecipeError("one recipe is nothing to compare: name methods, as in --methods lora,dora, or more recipes")
    if methods is None:
        entries = entries_of_recipes(loaded)
    else:
        entries = entries_of_methods(loaded[0], methods)
    names = [entry.name for entry in entries]
    if settings.reference is not None and settings.reference not in names:
        raise RecipeError(f"reference {settings.reference!r} is not compared; {nearest(settings.reference, names)}")
    return entries


@dataclass
class _Row:
    """An entry and what is known of it so far."""

    entry: Entry
    match: dict[str, Any] | None = None
    search: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    runs: dict[int, dict[str, Any]] = field(default_factory=dict)
    error: str | None = None


@dataclass
class _Work:
    """Everything that is to be done, in order; each finished piece is in the journal."""

    shared: Shared
    settings: Settings
    journal: Journal
    stop: Stop
    say: Callable[[str], None]
    folder: Path
    rows: list[_Row]
    began: float = field(default_factory=time.perf_counter)
    num_made: int = 0

    def go(self) -> None:
        """All seeds of all rows: first every row with the first seed."""
        shared, settings = self.shared, self.settings
        self.say(
            f"the base on {len(shared.measured):,} {shared.measured_name} rows: loss {shared.base_losses.mean:.4f}"
        )
        for line in shared.said:
            self.say(line)
        _ = shared.base_like_losses, shared.packed_from, shared.identity  # while nothing is attached
        reference = next((r for r in self.rows if r.entry.name == settings.reference), self.rows[0])
        with open_searches(self.folder / "search.db") if settings.trials else nullcontext() as storage:
            for i in range(settings.seeds):
                for row in [reference, *(r for r in self.rows if r is not reference)]:
                    if row.error is None:
                        self.attempt(row, partial(self.one, row, i, reference, storage))

    def attempt(self, row: _Row, act: Callable[[], None]) -> None:
        """What fails is the row's error; a wish to stop is not."""
        if self.stop.requested:
            raise Interrupted(f"stopped by {self.stop.requested}")
        try:
            act()
        except (Interrupted, KeyboardInterrupt):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:  # it would fail the others too
                raise
            row.error = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.say(f"{row.entry.name}: failed: {row.error}")
            self.shared.clear()

    def one(self, row: _Row, index: int, reference: _Row, storage: Any) -> None:
        """One run of one row, with what comes before its first."""
        if index == 0:
            row.entry = with_own_targets(self.shared.model, row.entry)
            self.matched(row, reference)
            self.searched(row, storage)
        recipe = self.recipe(row, index)
        key = f"{row.entry.name}-seed{recipe.train.seed}-{self.key(recipe)}"
        found = self.journal.get(key)
        if found is None:
            found = self.journal.put(
                key, final(self.shared, recipe, self.stop, self.looking(row) if index == 0 else None)
            )
            self.num_made += 1
            self.told(row, recipe, found)
        row.runs[recipe.train.seed] = found
        row.facts |= {k: found[k] for k in ("step_ratio", "memory", "memory_by") if k in found}

    def key(self, recipe: Recipe, **more: Any) -> str:
        """What a result depends on, in sixteen letters."""
        kept = recipe.model_dump(mode="json", exclude={"output", "report", "check"})
        kept["method"] = resolve_method(recipe.method, registered()).spec()  # its defaults may be other ones some day
        kept["train"]["steps"] = num_steps(recipe.train, len(self.shared.session.splits.train))
        return digest([kept, self.shared.identity, more])

    def recipe(self, row: _Row, index: int) -> Recipe:
        """The recipe of one run, with the rate and the seed that it gets."""
        train = row.entry.recipe.train
        rate = train.learning_rate if row.search is None else row.search["rate"]
        changed = train.model_copy(update={"learning_rate": rate, "seed": train.seed + index})
        return row.entry.recipe.model_copy(update={"train": changed})

    def matched(self, row: _Row, reference: _Row) -> None:
        """Give the row the size of the reference, in what is to be equal."""
        by, settings = self.settings.match, self.settings
        if by is None:
            return
        target: float | None = None
        if row is not reference and reference.match is not None:
            target = reference.match["reached"]
        if row is not reference and target is None:
            raise RecipeError(f"there is nothing to match: {reference.entry.name} failed")
        key = f"{row.entry.name}-size-{self.key(row.entry.recipe, match=by, target=target, tolerance=settings.allowed)}"
        found = self.journal.get(key)
        if found is None:
            found = self.journal.put(key, self.sized(row, target))
        row.match = found
        recipe = row.entry.recipe.model_copy(update={"method": dict(found["method"])})
        row.entry = Entry(row.entry.name, recipe, row.entry.note)

    def sized(self, row: _Row, target: float | None) -> dict[str, Any]:
        """A search for a size, as JSON."""
        recipe, by = row.entry.recipe, self.settings.match
        assert by is not None

        def with_method(method: Any) -> Recipe:
            return recipe.model_copy(update={"method": dict(method)})

        def parameters(method: Any) -> float:
            return float(resolve_plan(self.shared.model, with_method(method), name="size").num_parameters)

        def memory(method: Any) -> float:
            return float(self.forecast_bytes(with_method(method)))

        def seconds(method: Any) -> float:
            once = with_method(method)
            short = once.model_copy(update={"train": once.train.model_copy(update={"steps": 1, "epochs": None})})
            with trained(self.shared, short, self.stop) as run:
                return step_ratio(self.shared, run, pairs=self.settings.pairs)

        measure = {"parameters": parameters, "memory": memory, "time": seconds}[by]
        unit = {"parameters": "parameters", "memory": "bytes above the weights", "time": "times the frozen step"}[by]
        if target is None:
            own = measure(recipe.method)
            match = Match(recipe.method, None, own, own)
        else:
            match = match_size(
                recipe.method, measure, parameters=parameters, target=target, tolerance=self.settings.allowed, unit=unit
            )
        what = "as it is" if match.option is None else f"{match.option}={match.method[match.option]}"
        self.say(f"{row.entry.name}: {what}, {match.reached:,.4g} {unit}")
        return {
            "by": by, "method": dict(match.method), "option": match.option, "target": match.target,
            "reached": match.reached, "tolerance": self.settings.allowed,
        }  # fmt: skip

    def searched(self, row: _Row, storage: Any) -> None:
        """Choose the row's learning rate."""
        settings, recipe = self.settings, row.entry.recipe
        if not settings.trials:
            return
        total = num_steps(recipe.train, len(self.shared.session.splits.train))
        steps = max(round(total * settings.trial_share), min(_LEAST_STEPS, total))
        rungs = {steps * 2**rung // 2**RUNGS: 2**rung for rung in range(RUNGS)}
        budget = Budget(settings.trials, steps, settings.rates)

        def run(rate: float, look: Callable[[int, float], bool]) -> float | None:
            short = recipe.train.model_copy(update={"learning_rate": rate, "steps": steps, "epochs": None})
            return trial(
                self.shared, recipe.model_copy(update={"train": short}), self.stop,
                {step: rung for step, rung in rungs.items() if 0 < step < steps}, look,
            )  # fmt: skip

        name = row.entry.name
        choice = choose_rate(
            storage, f"{name}-{self.key(recipe, steps=steps, rates=settings.rates)}", budget, run,
            rate=recipe.train.learning_rate, seed=recipe.train.seed, say=lambda text: self.say(f"{name}: {text}"),
        )  # fmt: skip
        row.search = {"rate": choice.rate, "steps": steps, "trials": list(choice.trials)}

    def looking(self, row: _Row) -> Callable[[Trained], dict[str, Any]]:
        """What is found out once for each row, while its adapter is attached."""

        def look(run: Trained) -> dict[str, Any]:
            found: dict[str, Any] = {"memory": run.memory_bytes, "memory_by": "measured"}
            try:
                if run.memory_bytes is None:
                    found = {"memory": self.forecast_bytes(row.entry.recipe), "memory_by": "forecast"}
                found["step_ratio"] = step_ratio(self.shared, run, pairs=self.settings.pairs)
            except Exception as error:  # the losses are what a run is for
                self.say(f"{row.entry.name}: not all of its cost is known: {error}")
            return found

        return look

    def forecast_bytes(self, recipe: Recipe) -> int:
        """The peak of a step above the weights, counted on tensors without numbers."""
        session = self.shared.session
        found = foresee_memory(recipe, session.tokenizer, session.splits)
        return found.total - found.weights - found.process

    def counts(self) -> tuple[int, int]:
        """Runs that are done, and all of them."""
        return sum(len(row.runs) for row in self.rows), len(self.rows) * self.settings.seeds

    def told(self, row: _Row, recipe: Recipe, found: dict[str, Any]) -> None:
        """One line about a run that has ended."""
        done, total = self.counts()
        left = (time.perf_counter() - self.began) / self.num_made * (total - done - 1)
        gain = self.shared.base_losses.mean - found["loss"]
        self.say(
            f"[{done + 1}/{total}] {row.entry.name} seed {recipe.train.seed}: gain {gain:.4f}, rate "
            f"{recipe.train.learning_rate:.2g}; about {readable_seconds(left)} left"
        )

    def write(self, *, finished: bool) -> Comparison:
        """compare.json and compare.html, of all that is known."""
        found = summarise(self.shared, self.settings, self.rows, self.folder, finished=finished)
        write_json(self.folder / "compare.json", found.as_dict())
        from weft.compare.page import write_page

        write_page(found.page, found.as_dict())
        return found
