"""Recomputing activations in the backward instead of keeping them, where a model knows how."""

from __future__ import annotations

from typing import Any

from torch import nn

from weft.errors import WeftError

__all__ = ["keep_activations", "recompute_activations"]


def recompute_activations(model: nn.Module) -> None:
    """Keep a layer's input only. Not re-entrant: then no input needs a gradient, and random states are replayed.

    Raises WeftError for a model that cannot.
    """
    _method(model, "enable")({"use_reentrant": False})


def keep_activations(model: nn.Module) -> None:
    """The inverse of `recompute_activations`."""
    _method(model, "disable")()


def _method(model: nn.Module, act: str) -> Any:
    # from transformers 5.23 on, and before
    names = (f"activation_checkpointing_{act}", f"gradient_checkpointing_{act}")
    found = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if found is None:
        raise WeftError(f"train.gradient_checkpointing: a {type(model).__name__} cannot recompute its activations")
    return found
