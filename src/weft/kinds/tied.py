"""Tied weights: one parameter that several modules hold, adapted for all of them or for one of them only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from weft.core.affine import Affine
from weft.core.route import Route
from weft.errors import AdapterError
from weft.kinds.seat import Seat, Weave, Woven, WovenWeight, swap

Place = tuple[str, nn.Module, str]
"""A site's address, its module, and the parameter that holds its weight."""


class Follower:
    """The seat of a module that shares its weight with an adapted one: it reads what that seat makes of the weight."""

    bias_param = ""  # its bias is its own

    def __init__(self, module: nn.Module, address: str, param: str, leader: Seat):
        self.module, self.param, self.leader, self.weave = module, param, leader, leader.weave
        self.site = dataclasses.replace(leader.site, address=address)
        self.adapters = leader.adapters
        self.inner_forward = module.__dict__.get("forward")
        self.held: list[Affine] | None = None

    def used(self) -> bool:
        return self.leader.used()

    def weight(self) -> Tensor:
        return self.leader.weight()

    def oriented(self, weight: Tensor) -> Tensor:
        return self.leader.oriented(weight)

    def value(self, route: Route) -> Affine:
        return self.leader.value(route)


@dataclass(frozen=True)
class Untied:
    """What `retie` needs to undo `untie`."""

    seat: Seat
    original: nn.Parameter
    configs: tuple[Any, ...]


def check_ties(places: Sequence[Place], modules: Mapping[str, nn.Module], tied: str) -> None:
    """Raise AdapterError, before anything is changed, for a tied weight that `tied` does not settle."""
    if tied not in ("refuse", "share", "separate"):
        raise ValueError(f"tied={tied!r}: expected 'refuse', 'share' or 'separate'")
    targeted = {(id(m), p) for _, m, p in places}
    for (address, module, param), others in _tied(places, modules):
        seat = module.seats.get(param) if isinstance(module, Woven) else None
        if isinstance(seat, Follower):
            raise AdapterError(
                f"{address} reads the adapted weight of {seat.leader.site.address} (tied='share'): adapt that one"
            )
        paths = ", ".join(p for p, _, _ in others)
        if tied == "refuse":
            raise AdapterError(
                f"{address} shares its weight with {paths}: adapting one would leave the other as it is. "
                "Say tied='share' to adapt both together, or tied='separate' to adapt only this one"
            )
        if seat is not None and bool(seat.followers) != (tied == "share"):
            mode = "share" if seat.followers else "separate"
            raise AdapterError(f"{address} is adapted with tied={mode!r} already; a weight has one way of being tied")
        for path, other, name in others if tied == "share" else ():
            taken = isinstance(other, Woven) and not isinstance(other.seats.get(name), Follower)
            if (id(other), name) in targeted or taken:
                raise AdapterError(
                    f"{address} and {path} hold one weight, and tied='share' lets both see one adapter: "
                    "adapt only one of them, or say tied='separate'"
                )


def share_ties(places: Sequence[Place], modules: Mapping[str, nn.Module], weave: Weave) -> None:
    """Let every module that holds a tied weight read it through the adapted seat."""
    for (address, _, _), others in _tied(places, modules):
        leader = weave.seats[address]
        for path, other, name in others:
            if isinstance(other, Woven):  # follows already, since an earlier adapter
                continue
            follower = Follower(other, path, name, leader)
            other.__dict__["seats"] = {name: follower}
            swap(other, WovenWeight, (name,))
            leader.followers.append(follower)


def untie(model: nn.Module, seat: Seat, modules: Mapping[str, nn.Module]) -> Untied | None:
    """Give a seat a weight of its own, if it shares one that is adapted for it only; `retie` is the inverse."""
    original = seat.module._parameters.get(seat.param)
    if original is None or seat.followers:
        return None
    holders = [m for _, m, _ in _holders(modules, original)]
    if len(holders) < 2:
        return None
    seat.module._parameters[seat.param] = nn.Parameter(original.detach().clone(), requires_grad=original.requires_grad)
    configs = tuple(_tied_configs(model, holders))
    for config in configs:  # or the merged model would be saved and loaded with one weight for both
        config.tie_word_embeddings = False
    return Untied(seat, original, configs)


def retie(untied: Untied) -> None:
    """The very parameter that was shared comes back."""
    untied.seat.module._parameters[untied.seat.param] = untied.original
    for config in untied.configs:
        config.tie_word_embeddings = True


def _holders(modules: Mapping[str, nn.Module], weight: Tensor) -> list[tuple[str, nn.Module, str]]:
    return [(path, m, n) for path, m in modules.items() for n, t in m._parameters.items() if t is weight]


def _tied(places: Sequence[Place], modules: Mapping[str, nn.Module]) -> Iterator[tuple[Place, list[Place]]]:
    """The places whose weight has other holders, with these (their path, module and parameter)."""
    counts: dict[int, int] = {}
    for module in modules.values():
        for p in module._parameters.values():
            counts[id(p)] = counts.get(id(p), 0) + 1
    for address, module, param in places:
        weight = module._parameters.get(param)
        if weight is not None and counts.get(id(weight), 0) > 1:
            others = [h for h in _holders(modules, weight) if (h[1], h[2]) != (module, param)]
            yield (address, module, param), others


def _tied_configs(model: nn.Module, holders: Sequence[nn.Module]) -> Iterator[Any]:
    """The configurations that say that the output head is the input embedding, where these are the two."""
    seen = set()
    for part in model.modules():
        get, config = getattr(part, "get_output_embeddings", None), getattr(part, "config", None)
        if get is None or config is None or not any(get() is h for h in holders):
            continue
        text = getattr(config, "get_text_config", lambda config=config: config)()
        for each in (config, text):
            if getattr(each, "tie_word_embeddings", False) and id(each) not in seen:
                seen.add(id(each))
                yield each
