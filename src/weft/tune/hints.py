"""What the published laws say of a recipe whose values are far from theirs."""

from __future__ import annotations

from weft.plan.laws import step_law_batch, step_law_rate
from weft.recipe import Recipe

__all__ = ["law_hints"]

_FAR = 4.0
_LARGE_RANK = 64


def law_hints(recipe: Recipe, *, num_parameters: int, tokens_per_step: float, num_steps: int) -> list[str]:
    """One line for each value that is far from a law that holds for it; num_parameters: without embeddings."""
    found, method = [], recipe.method
    tokens = tokens_per_step * num_steps
    if method["name"] == "full" and recipe.targets in (None, "all-linear"):
        rate, batch = step_law_rate(num_parameters, tokens), step_law_batch(tokens)
        if not 1 / _FAR < recipe.train.learning_rate / rate < _FAR:
            found.append(
                f"hint: train.learning_rate is {recipe.train.learning_rate:g}; the Step Law gives {rate:.1e} for "
                "training all weights from scratch (from a good base, less is usual)"
            )
        if not 1 / _FAR < tokens_per_step / batch < _FAR:
            found.append(
                f"hint: a step sees {tokens_per_step:,.0f} tokens; the Step Law gives {batch:,.0f} for training all "
                "weights from scratch"
            )
    rank = method.get("rank")
    if isinstance(rank, int) and rank >= _LARGE_RANK:
        found.append(
            f"hint: method.rank is {rank}; the joint law of fine-tuning found that a larger adapter helps little (its "
            "exponent is near 0), where a larger base helps most"
        )
    return found
