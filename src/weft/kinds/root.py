"""The model itself: checks that a route fits the batch and that every adapted module is really used."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from weft.core.route import Rows, names, reads_places
from weft.kinds.call import Call, Prompts
from weft.kinds.entry import InputSeat, argument_names
from weft.kinds.probe import NeverCalled, can_repeat, check_used, random_states, tensors
from weft.kinds.seat import Container, Weave, _rebuild
from weft.kinds.survey import survey
from weft.kinds.text import Text, remember

__all__ = ["NeverCalled", "WovenGenerator", "WovenRoot"]


_INPUTS = ("input_ids", "inputs_embeds", "pixel_values")
"""Arguments that have one row per entry of the batch; others (position_ids [1, T]) may not, and may be given first."""


class WovenRoot:
    """Mixin of the class of a model that adapters are attached to."""

    base_class: ClassVar[type[nn.Module]]
    weave: Weave
    adapters: Container

    def __init__(self, *args: Any, **kwargs: Any):
        # type(model)(config) and from_pretrained make a model without adapters
        self.__class__ = self.base_class  # type: ignore[assignment]
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weave = self.weave
        if isinstance(weave.route, Rows):
            check_rows(self, args, kwargs)
        if weave.route is None or torch.compiler.is_compiling() or not weave.unproved:
            return run(self, *args, **kwargs)
        repeatable, random = can_repeat(kwargs), random_states()
        result = run(self, *args, **kwargs)
        if weave.unproved and repeatable:
            check_used(self, weave, partial(run, self), random, args, kwargs)  # type: ignore[arg-type]
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin, base = type(self).__bases__
        return _rebuild, (base, mixin, type(self).properties), self.__getstate__()  # type: ignore[attr-defined]


class WovenGenerator(WovenRoot):
    """A model that also generates: beams and several sequences per prompt repeat the rows of a route."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.weave.prompts = Prompts.of(args, kwargs)
        try:
            return self.base_class.generate(self, *args, **kwargs)  # type: ignore[attr-defined]
        finally:
            self.weave.expand, self.weave.prompts = 1, None

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        self.weave.expand = kwargs.get("expand_size", args[0] if args else 1)
        return self.base_class._expand_inputs_for_generation(self, *args, **kwargs)  # type: ignore[attr-defined]


def run(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own forward, with virtual tokens at its input where an adapter has some."""
    weave = model.weave
    # kept after the call: a layer that is computed again in the backward is told the same
    if weave.has_blocks and weave.route is not None:
        weave.call = Call.of(model, named(model, args, kwargs))
    if weave.reads_text or reads_places(weave.route):
        weave.text = Text.of(model, named(model, args, kwargs))
    if weave.surveyors and names(weave.route) & weave.surveyors:
        weave.surveyed = survey(model, own_forward(model), named(model, args, kwargs))
    if weave.entry is not None and weave.route is not None:
        result = through(weave.entry, model, args, kwargs)
    else:
        result = own_forward(model)(*args, **kwargs)
    if weave.reads_text:  # under any route: what the base has put into a cache is there for an adapter that goes on
        remember(weave.text, named(model, args, kwargs), result)
    return result


def named(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a model is called with, by name."""
    return {**dict(zip(argument_names(model.base_class), args, strict=False)), **kwargs}


def own_forward(model: Any) -> Callable[..., Any]:
    """The forward that the model had before it was adapted, with what was wrapped around it on the instance."""
    if "inner_mixin" in model.__dict__:  # the model is itself a site
        return partial(model.__dict__["inner_mixin"].forward, model)
    inner: Callable[..., Any] | None = model.__dict__.get("inner_forward")
    # no bound method: after a graph break dynamo (torch 2.13) looks that up by name and finds `forward` above
    return inner if inner is not None else partial(model.base_class.forward, model)


def through(entry: InputSeat, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A model's forward with virtual tokens at its input, which is the model's own or that of a module in it."""
    forward = own_forward(model)
    if entry.module is model:
        return entry.enter(args, kwargs)
    return entry.around(forward, args, kwargs)


def check_rows(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A route with one adapter per row must have as many rows as the batch; ValueError otherwise."""
    named = [kwargs[k] for k in _INPUTS if kwargs.get(k) is not None]
    first = next((t for t in tensors((args, named, list(kwargs.values()))) if t.ndim), None)
    rows, weave = model.weave.route, model.weave
    if isinstance(rows, Rows) and first is not None:
        dim = 1 if first.ndim == 3 and getattr(model, "batch_first", True) is False else 0
        rows.for_leading(first.shape[dim], exact=True, expand=weave.expand)
