"""Which layers keep their activations, recompute those of their attention core, or recompute all of them.

Recomputing changes no number: random states and autocast are replayed. Whole layers: Chen et al. 2016,
arXiv 1604.06174; the attention core only: Korthikanti et al. 2022, arXiv 2205.05198.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

from torch import nn
from torch.utils.checkpoint import checkpoint

from weft.errors import WeftError
from weft.tune.activations import core

__all__ = ["CHOICES", "Choice", "keep_activations", "layers_of", "set_activations"]

Choice = Literal["keep", "attention", "recompute"]
CHOICES: tuple[Choice, ...] = get_args(Choice)

# not re-entrant: no input has to require a gradient, so nothing below the lowest adapted module is differentiated
_again = partial(checkpoint, use_reentrant=False)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers that a transformers model can recompute, in order; [] for a model without such."""
    known = sys.modules.get("transformers.modeling_layers")
    kind = getattr(known, "GradientCheckpointingLayer", None)
    if kind is None:
        return []
    found: list[nn.Module] = [m for m in model.modules() if isinstance(m, kind)]
    inner = {id(m) for layer in found for m in layer.modules() if m is not layer}
    return [layer for layer in found if id(layer) not in inner]


def set_activations(model: nn.Module, choice: Choice | Sequence[Choice]) -> None:
    """One choice for all layers of the model, or one for each. `keep_activations` is the inverse.

    Raises WeftError for a model that cannot.
    """
    layers = layers_of(model)
    choices = [choice] * len(layers) if isinstance(choice, str) else list(choice)
    assert len(choices) == len(layers), f"{len(choices)} choices for {len(layers)} layers"
    wanted = choice if isinstance(choice, str) else "recompute"
    if not layers and wanted != "keep":
        raise WeftError(
            f"train.activations: a {type(model).__name__} has no layers that transformers can recompute: "
            "set activations to keep"
        )
    if "attention" in choices and not core.can_recompute(layers):
        raise WeftError(
            f"train.activations: the layers of a {type(model).__name__} compute their attention themselves, so its "
            "core cannot be recomputed alone: set activations to recompute or keep"
        )
    for layer, each in zip(layers, choices, strict=True):
        layer.__dict__["gradient_checkpointing"] = each == "recompute"
        layer.__dict__["_gradient_checkpointing_func"] = _again
        core.mark(layer, again=each == "attention")


def keep_activations(model: nn.Module) -> None:
    """Keep all activations again."""
    for layer in layers_of(model):
        layer.__dict__.pop("gradient_checkpointing", None)
        layer.__dict__.pop("_gradient_checkpointing_func", None)
        core.mark(layer, again=False)
