"""The attention core (scores, softmax, dropout, weighted sum) of marked modules, computed again in the backward.

transformers hands every attention module the function that computes its core, by the name of the implementation. That
function is wrapped here, once and for all implementations; modules that are not marked are not affected.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from weft.kinds.seat import base_class

__all__ = ["can_recompute", "mark", "timed"]

_MARK = "recomputes_core"
_seconds: list[Callable[[], float]] = []  # the clock of a measurement that is under way
_spent: dict[int, float] = {}


def can_recompute(layers: Iterable[nn.Module]) -> bool:
    """Whether some module in these layers takes its attention core from transformers' interface."""
    return any(
        hasattr(sys.modules.get(base_class(module).__module__), "ALL_ATTENTION_FUNCTIONS")
        for layer in layers
        for module in layer.modules()
    )


def mark(layer: nn.Module, *, again: bool) -> None:
    """Compute the attention core in this layer again in the backward, or keep what it keeps."""
    if again:
        _install()
    for module in layer.modules():
        if again and module._modules:  # an attention holds its projections
            module.__dict__[_MARK] = True
        else:
            module.__dict__.pop(_MARK, None)


@contextmanager
def timed(clock: Callable[[], float]) -> Iterator[dict[int, float]]:
    """Seconds that attention cores take inside the `with`, by the id of their module."""
    _install()
    _spent.clear()
    _seconds.append(clock)
    try:
        yield _spent
    finally:
        _seconds.clear()


def _attend(attend: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if getattr(module, _MARK, False) and torch.is_grad_enabled():
        return checkpoint(attend, module, *args, use_reentrant=False, **kwargs)
    if not _seconds:
        return attend(module, *args, **kwargs)
    started = _seconds[0]()
    result = attend(module, *args, **kwargs)
    _spent[id(module)] = _spent.get(id(module), 0.0) + _seconds[0]() - started
    return result


def _install() -> None:
    """Wrap what looks attention functions up; a second time does nothing."""
    from transformers.modeling_utils import AttentionInterface

    original = AttentionInterface.get_interface
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return partial(_attend, original(self, attn_implementation, default))

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]
