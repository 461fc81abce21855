"""Settling in: the input of a model learns what adapters put before it and before its attentions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from weft.core.site import Site
from weft.errors import AdapterError
from weft.kinds.entry import InputSeat, WovenEntry, argument_names, is_backbone
from weft.kinds.seat import Weave, Woven, base_class, swap, unswap
from weft.kinds.side import leave_sides, settle_sides
from weft.kinds.virtual import VirtualSeat, measure

__all__ = ["check_places", "input_of", "leave", "leave_sides", "settle"]


def input_of(path: str, modules: Mapping[str, nn.Module]) -> str:
    """The path of the backbone that an attention is a part of; ValueError where there is none that takes positions."""
    for outer, module in modules.items():
        if outer and not path.startswith(f"{outer}."):
            continue
        if is_backbone(module, outer.rpartition(".")[2]) and "position_ids" in argument_names(base_class(module)):
            return outer
    raise ValueError(
        "no module around it takes input_ids, inputs_embeds and position_ids, and a prefix must move the positions; "
        "encoder-decoder models and bare layers have none"
    )


def check_places(places: Iterable[tuple[str, nn.Module, type]]) -> None:
    """AdapterError when a module (address, module, mixin) would have to be read in two ways at once."""
    ways: dict[nn.Module, type] = {}
    for address, module, mixin in places:
        woven = type(module).__bases__[0] if isinstance(module, Woven) else module.__dict__.get("inner_mixin")
        now = woven or ways.setdefault(module, mixin)
        if now is not mixin:
            raise AdapterError(
                f"{address}: another adapter sits on this module as a whole, inside it or through its weight, and one "
                "module cannot be adapted in both ways; choose other targets for one of the two"
            )


def settle(model: nn.Module, modules: Mapping[str, nn.Module], weave: Weave, name: str) -> None:
    """Let the model's input and its layers know about an adapter that has just been attached."""
    settle_sides(modules, weave)
    weave.causal = any(getattr(m, "is_causal", False) for m in modules.values()) or _generates(model)
    surveys = any(s.adapters[name].method.surveys for s in weave.seats.values() if name in s.adapters)
    (weave.surveyors.add if surveys else weave.surveyors.discard)(name)
    own = {s.site.address: s for s in weave.seats.values() if isinstance(s, VirtualSeat) and name in s.adapters}
    if not own:
        return
    for address, seat in own.items():
        measure(seat, name)
        if isinstance(seat, InputSeat):
            weave.entry = seat
        elif weave.entry is None:
            weave.entry = _enter(input_of(address.removesuffix(f".{seat.param}"), modules), modules, weave)
    weave.entry.root_names = argument_names(base_class(model))
    head = getattr(model, "get_output_embeddings", None)
    weave.entry.head = head() if head is not None else None
    weave.entry.attentions = [s for s in weave.seats.values() if s.kind == "attention"]


def _generates(model: nn.Module) -> bool:
    """Whether a model writes one token after another, so that its tokens know no later ones."""
    can = getattr(model, "can_generate", None)
    return bool(can()) if can is not None else False


def _enter(path: str, modules: Mapping[str, nn.Module], weave: Weave) -> InputSeat:
    """A seat at an input that has no virtual tokens of its own, only attentions with a prefix; not among the seats."""
    module, address = modules[path], f"{path}.input" if path else "input"
    seat = InputSeat(module, Site(address, "input", **InputSeat.shape(module, "input")), weave)
    module.__dict__["seats"], module.__dict__["seat"] = {"input": seat}, seat
    swap(module, WovenEntry)
    return seat


def leave(weave: Weave) -> None:
    """Give the input its own class back once nothing comes before it or its attentions."""
    entry = weave.entry
    if entry is None or entry.used():
        return
    if "seats" in entry.module.__dict__:
        unswap(entry.module)
    weave.entry = None
