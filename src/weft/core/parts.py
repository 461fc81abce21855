"""Routes for parts of a model or of its input: by layer, and by span of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from weft.core.op import Op
from weft.core.site import Site

__all__ = ["Layers", "Split"]


@dataclass(frozen=True)
class Layers:
    """One route for each range of layers: {"0-3": route, "4-7": route, "9": route}; the base in all others."""

    parts: tuple[tuple[frozenset[int], Any], ...]

    def __init__(self, routes: Mapping[str, Any]):
        from weft.core.route import as_route

        parts = tuple((_numbers(text), as_route(route)) for text, route in routes.items())
        taken: set[int] = set()
        for (numbers, _), text in zip(parts, routes, strict=True):
            if taken & numbers:
                raise ValueError(f"layers {text!r} names layer {min(taken & numbers)}, which another range has already")
            taken |= numbers
        object.__setattr__(self, "parts", parts)

    @property
    def routes(self) -> tuple[Any, ...]:
        """The routes of all ranges."""
        return tuple(route for _, route in self.parts)

    def at(self, site: Site) -> Any:
        """The route of a site; None, the base, outside all ranges."""
        return next((route for numbers, route in self.parts if site.layer in numbers), None)


@dataclass(frozen=True)
class Split:
    """One route for each span of tokens: ((route, tokens), ...), from a row's first token on; None: all the rest."""

    parts: tuple[tuple[Any, int | None], ...]

    def __init__(self, *parts: tuple[Any, int | None]):
        from weft.core.route import as_route

        sizes = [size for _, size in parts]
        if not parts or None in sizes[:-1] or any(size is not None and size < 1 for size in sizes):
            raise ValueError(f"spans of {sizes} tokens: each takes at least one, and None, the rest, comes last")
        object.__setattr__(self, "parts", tuple((as_route(route), size) for route, size in parts))

    @property
    def routes(self) -> tuple[Any, ...]:
        """The routes of all spans."""
        return tuple(route for route, _ in self.parts)

    def cut(self, x: Tensor, op: Op) -> list[tuple[Any, Tensor]]:
        """The pieces of x [B, T, ...] along its tokens, each with its route; the base behind the last span."""
        site = op.site
        if site.mixes_tokens or site.kind in ("attention", "input", "side", "experts"):
            raise TypeError(
                f"{site.address} is of kind {site.kind} and mixes tokens or has none: spans of a row cannot use "
                "different adapters there; split rows, or adapt other modules"
            )
        if x.ndim != (3 if x.is_floating_point() else 2):
            raise ValueError(
                f"{site.address} sees {[*x.shape]}, which are no rows of tokens: it cannot be split by span"
            )
        start, found = op.num_seen(), []
        stop = start + x.shape[1]
        place = 0
        for route, size in (*self.parts, (None, None)):
            end = stop if size is None else place + size
            low, high = max(place, start), min(end, stop)
            if low < high:
                found.append((route, x[:, low - start : high - start]))
            place = end
        return found


def _numbers(text: str) -> frozenset[int]:
    """The layers that a text names: "4", "0-3", "0-3,7"."""
    found: set[int] = set()
    for part in str(text).split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()) or (dash and int(high) < int(low)):
            raise ValueError(f"layers {text!r}: expected numbers and ranges, as in '0-3,7'")
        found.update(range(int(low), int(high if dash else low) + 1))
    return frozenset(found)
