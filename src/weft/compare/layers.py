"""SubTuning's search: which layers are worth training, chosen one after another by short trainings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

from rich.console import Console

from weft.compare.journal import Journal, digest
from weft.compare.runs import trial
from weft.compare.shared import NAME, Shared, share
from weft.errors import RecipeError
from weft.recipe import Recipe, load_recipe, resolve_method
from weft.registry import methods as registered
from weft.tune.loop import num_steps
from weft.tune.progress import stderr_console
from weft.tune.session import resolve_plan, threads
from weft.tune.stop import Stop

__all__ = ["ChosenLayers", "choose_layers"]


@dataclass(frozen=True)
class ChosenLayers:
    """Layers in the order in which they were chosen.

    losses: of the base, then with the first of them, the first two, ... rounds: what every other layer would have come
    to in each round, the one that ended the search too.
    """

    layers: tuple[int, ...]
    losses: tuple[float, ...]
    rounds: tuple[Mapping[int, float], ...]

    def recipe(self, recipe: Recipe) -> Recipe:
        """A recipe with these layers."""
        return recipe.model_copy(update={"layers": tuple(sorted(self.layers))})


def choose_layers(
    recipe: Recipe | str | Path,
    *,
    most: int | None = None,
    least_gain: float = 0.0,
    output: str | Path = "runs/layers",
    console: Console | None = None,
) -> ChosenLayers:
    """Choose the layers that a recipe's method adapts, greedily: each is the one that lowers the loss most beside those
    before it, with all trained anew (Kaplun et al. 2023, SubTuning, arXiv 2302.06354, with `method: {name: full}`).

    Every candidate is trained as the recipe says and measured on rows that it was not trained on: the validation rows,
    or a tenth of the training rows where the recipe has no test rows beside them. That is N (N + 1) / 2 runs for all of
    N layers; what is done is kept in `output`, and the same call goes on.

    most: how many layers at most; None: as long as it helps. least_gain: what a further layer must lower the loss by,
    in nats. Raises RecipeError for targets that lie in no numbered layers.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if (most is not None and most < 1) or least_gain < 0:
        raise RecipeError(f"most={most} must be at least 1, and least_gain={least_gain} at least 0")
    console = console or stderr_console()
    journal = Journal(Path(output))
    with threads(recipe.train.threads), Stop() as stop:
        shared = share(recipe, lambda text: console.print(text, markup=False))
        numbers = [site.site.layer for site in resolve_plan(shared.model, recipe, name=NAME).sites]
        left = {number for number in numbers if number is not None}
        if not left:
            raise RecipeError("no target of this recipe lies in a numbered layer: there is nothing to choose from")
        chosen: list[int] = []
        losses: list[float] = [shared.losses(shared.chosen_on).mean]
        rounds: list[dict[int, float]] = []
        while left and len(chosen) < (most or len(left) + len(chosen)):
            tried = {layer: _loss(shared, recipe, [*chosen, layer], journal, stop) for layer in sorted(left)}
            rounds.append(tried)
            best = min(tried, key=tried.__getitem__)
            told = ", ".join(f"{layer}: {loss:.4f}" for layer, loss in tried.items())
            shared.say(f"layers {[*sorted(chosen)]} have loss {losses[-1]:.4f}; with one more, {told}")
            if not losses[-1] - tried[best] > least_gain:
                break
            chosen.append(best)
            losses.append(tried[best])
            left.discard(best)
    return ChosenLayers(tuple(chosen), tuple(losses), tuple(rounds))


def _loss(shared: Shared, recipe: Recipe, layers: list[int], journal: Journal, stop: Any) -> float:
    """The loss with some layers trained; infinite where that failed to be a number."""
    tried = recipe.model_copy(update={"layers": tuple(sorted(layers))})
    kept = tried.model_dump(mode="json", exclude={"output", "report", "check"})
    kept["method"] = resolve_method(tried.method, registered()).spec()
    kept["train"]["steps"] = num_steps(tried.train, len(shared.trial_rows))
    key = f"layers-{'-'.join(map(str, tried.layers or ()))}-{digest([kept, shared.identity])}"
    found = journal.get(key)
    if found is None:
        found = journal.put(key, {"loss": trial(shared, tried, stop, {}, lambda *_: True)})
    loss = found["loss"]
    return loss if loss is not None and isfinite(loss) else inf
