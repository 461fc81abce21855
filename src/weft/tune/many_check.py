"""Which recipes can be trained in one batch: what they must share, and what works on one adapter alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weft.core import Method
from weft.errors import WeftError
from weft.recipe import Recipe
from weft.tune.optimizers import check_optimizer
from weft.tune.session import Session

__all__ = ["check_sessions", "check_together"]

_SHARED = (
    "base", "task", "train.threads", "train.precision", "train.loss_chunk", "train.activations",
    "train.offload_activations",
)  # fmt: skip
"""What the one forward and backward of a step does for all of them."""

_ALONE: dict[str, tuple[Any, str]] = {
    "activation_budget": (None, "it is fitted to the batch of one run; set activations instead"),
    "optimizer_in_backward": (False, "a batch's gradients are shared out after the backward; set it to false"),
    "master_weights": (False, "the trained tensors of all runs are rows of one; set it to false"),
    "adapter_bits": (None, "it swaps one adapter's tensors around its own update; set it to null"),
    "mixout": (0.0, "it changes one adapter's tensors around its own forward; set it to 0"),
    "coto": (0.0, "it takes one adapter's layers out around its own forward; set it to 0"),
    "allora": (None, "it scales each adapter's gradient inside the backward; set it to null"),
    "merge_every": (None, "it writes into the base that the others use; set it to null"),
    "sharding": ("none", "several adapters at once train in one process; set it to none"),
    "correct_steps": (0, "it trains one adapter against the base before quantising; set it to 0"),
    "compile": (False, "the batch changes whenever a run ends; set it to false"),
}


def check_together(recipes: Sequence[Recipe]) -> None:
    """WeftError naming the recipe and the key for what cannot be done in one batch."""
    if not recipes:
        raise WeftError("there is no recipe to train: give one or more")
    for recipe in recipes:
        for key in _SHARED:
            here, first = _value(recipe, key), _value(recipes[0], key)
            if here != first:
                raise WeftError(
                    f"{_name(recipe)}: {key} is {here!r}, and {first!r} in {_name(recipes[0])}: recipes that are "
                    "trained in one batch share it; make them equal, or train them one by one"
                )
        for key, (plain, why) in _ALONE.items():
            if getattr(recipe.train, key) != plain:
                raise WeftError(f"{_name(recipe)}: train.{key} is for a run of its own: {why}")
        if recipe.train.packing:
            raise WeftError(
                f"{_name(recipe)}: train.packing puts several rows into one, and here every row has its own adapter; "
                "set it to null"
            )
        if recipe.task != "causal-lm":
            raise WeftError(
                f"{_name(recipe)}: task {recipe.task} has one head or reference for a whole batch; train it on its own"
            )
        if check_optimizer(recipe.train).forward_only:
            raise WeftError(
                f"{_name(recipe)}: train.optimizer {recipe.train.optimizer!r} learns from forwards of its own; choose "
                "one that uses gradients"
            )


def check_sessions(sessions: Sequence[Session]) -> None:
    """WeftError for two runs that would be one, and for starts that rewrite or need a base of their own."""
    for n, session in enumerate(sessions):
        for other in sessions[:n]:
            if session.folder.resolve() == other.folder.resolve():
                raise WeftError(f"two recipes write into {session.folder}: give each an output of its own")
            if session.name == other.name:
                raise WeftError(
                    f"{session.folder} and {other.folder} both make an adapter called {session.name!r}, after the last "
                    "part of their output: give these other names"
                )
        for method in {planned.method for planned in session.plan.sites}:
            if type(method).evolve is not Method.evolve or type(method).penalty is not Method.penalty:
                raise WeftError(
                    f"{session.name}: {method.name} minimises a loss of its own or changes its tensors between steps, "
                    "which runs that share their steps cannot have; train it on its own"
                )
        if any("original" in planned.method.needs() for planned in session.plan.sites):
            raise WeftError(
                f"{session.name}: its start makes up for what quantising loses, and may rewrite the base that the "
                "other runs use; train it on its own"
            )


def _value(recipe: Recipe, key: str) -> Any:
    found: Any = recipe
    for part in key.split("."):
        found = getattr(found, part)
    return found.model_dump() if hasattr(found, "model_dump") else found


def _name(recipe: Recipe) -> str:
    return recipe.output or "a recipe without output"
