"""A survey: the base runs over a batch before the adapters do, and these read what it made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from weft.kinds.entry import argument_names
from weft.kinds.seat import base_class

__all__ = ["survey"]

_CACHES = ("past_key_values", "layer_past")
_twins: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""Of the cache of an adapted model, the one of its base."""


@torch.no_grad()
def survey(model: Any, forward: Callable[..., Any], given: Mapping[str, Any]) -> Tensor:
    """The last hidden states [B, T, C] of the base, with no adapter in use, for what the model is called with.

    Only its backbone runs: the head would take as much memory as in the pass that follows. Behind a cache the base has
    one of its own. Raises ValueError where that cannot follow the model's, and for a model without hidden states.
    """
    backbone, weave = getattr(model, "base_model", model), model.weave
    here, there = argument_names(model.base_class), argument_names(base_class(backbone))
    wanted = {k: v for k, v in given.items() if k in there or k not in here}  # its own, and what is passed on unnamed
    wanted.pop("return_dict", None)
    if "use_cache" in there:
        wanted["use_cache"] = False
    for name in _CACHES:
        if given.get(name) is not None:
            wanted |= {name: _twin(given[name], weave.expand, backbone.config), "use_cache": True}
    before, weave.route = weave.route, None
    try:
        result = (forward if backbone is model else backbone)(**wanted)
    finally:
        weave.route = before
    states = getattr(result, "last_hidden_state", None)
    if not isinstance(states, Tensor):
        raise ValueError(f"{model.base_class.__name__} tells no last hidden state, and this adapter reads the base's")
    return states


def _twin(cache: Any, expand: int, config: Any) -> Any:
    """The cache that the base has beside the model's, for the same tokens."""
    from transformers.cache_utils import DynamicCache

    if not isinstance(cache, DynamicCache) or expand > 1:
        raise ValueError(
            "this adapter reads what the base makes of a text, for which the base has a cache of its own beside the "
            f"model's: it follows a DynamicCache with one row per prompt, and this is a {type(cache).__name__} with "
            f"{expand}; generate without beams and one sequence per prompt, or with use_cache=False"
        )
    if cache not in _twins:
        _twins[cache] = DynamicCache(config=config)
    twin = _twins[cache]
    if twin.get_seq_length() != cache.get_seq_length():
        raise ValueError(
            f"the cache holds {cache.get_seq_length()} tokens, the base alone has read {twin.get_seq_length()}, and "
            "this adapter reads what it makes of all: begin the text with an empty DynamicCache under this route"
        )
    return twin
