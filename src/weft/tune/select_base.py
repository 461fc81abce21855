"""Choosing among bases: short fine-tunes on growing parts of the data, and the law that extrapolates them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from weft.errors import RecipeError
from weft.plan.data import count_rows
from weft.plan.laws import Fit, fit_rectified
from weft.recipe import Recipe
from weft.tune.progress import stderr_console
from weft.tune.run import tune

__all__ = ["Candidate", "select_base"]

_PARTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
_FEWEST_ROWS = 8


@dataclass(frozen=True)
class Candidate:
    """A base: its validation losses by rows, and the rectified law through them, asked at all rows of the recipe."""

    base: str
    points: tuple[tuple[float, float], ...]
    fit: Fit

    def row(self) -> tuple[str, ...]:
        """Base, extrapolated loss with its range, the largest error of the fit, the losses that it is made of."""
        fit = self.fit
        measured = ", ".join(f"{int(rows)}: {loss:.4f}" for rows, loss in self.points)
        law = f"{fit.constants['b']:.3g} / ({fit.constants['d']:.3g} + D^{fit.constants['beta']:.3g})"
        return (
            self.base, f"{fit.prediction:.4f}", f"{fit.low:.4f} to {fit.high:.4f}", f"{fit.error:.1%}",
            f"{law} + {fit.constants['e']:.4f}", measured,
        )  # fmt: skip


def select_base(recipe: Recipe, bases: Sequence[str], *, console: Console | None = None) -> list[Candidate]:
    """Bases of a recipe by the loss that they would reach on all its data, best first.

    Each is tuned on 1/32, 1/16, 1/8 and 1/4 of the rows, as the recipe says otherwise, and its loss on the validation
    data is extrapolated by the rectified law (Lin et al. 2024, arXiv 2402.02314). Losses are in bits per byte where the
    data is text, since tokens differ from base to base. Raises RecipeError without validation data, or with few rows.
    """
    if recipe.data.validation is None:
        raise RecipeError("--select-base compares losses on held-out rows: give the recipe data.validation")
    total = recipe.data.limit or count_rows(recipe.data.train)
    if total is None or total * _PARTS[0] < _FEWEST_ROWS:
        raise RecipeError(
            f"--select-base tunes on {_PARTS[0]:.3f} of the rows and more, and of {total} these are fewer than "
            f"{_FEWEST_ROWS}: give more rows, in .jsonl or .parquet"
        )
    console = console or stderr_console()
    found = [_candidate(recipe, base, total, lambda text: console.print(text, markup=False)) for base in bases]
    return sorted(found, key=lambda candidate: candidate.fit.prediction)


def _candidate(recipe: Recipe, base: str, total: int, say: Callable[[str], None]) -> Candidate:
    points = []
    for part in _PARTS:
        rows = round(total * part)
        loss = _loss(recipe, base, rows)
        say(f"{base}: {rows} rows, validation loss {loss:.4f}")
        points.append((float(rows), loss))
    return Candidate(base, tuple(points), fit_rectified(points, at=total))


def _loss(recipe: Recipe, base: str, rows: int) -> float:
    """The validation loss after one short run, of which nothing is kept."""
    with tempfile.TemporaryDirectory(prefix="weft-select-") as folder:
        tree: dict[str, Any] = recipe.model_dump(mode="json")
        tree["base"] |= {"model": base}
        tree["data"] |= {"limit": rows, "test": None}
        tree |= {"output": str(Path(folder) / "run"), "forgetting": None, "check": None}
        tree["report"] |= {"html": False, "examples": 0, "tensorboard": False, "forecast": False}
        tree["train"] |= {"checkpoint_every": None, "evaluate_every": None}
        result = tune(Recipe.model_validate(tree), console=Console(quiet=True))
    figures = result.after["validation"]
    return float(figures.get("bits_per_byte", figures["loss"]))
