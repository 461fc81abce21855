"""The registry of methods by name: built in, from plug-in packages, and the caller's own."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from weft.core.method import Method, hints, registered
from weft.core.router import Expert, Router, experts
from weft.errors import nearest

__all__ = ["as_declared", "method_class", "method_from_spec", "methods"]


@cache
def _load() -> None:
    import_module("weft.methods")  # importing the rooms registers every built-in method
    import_module("weft.routers")
    for entry in entry_points(group="weft.methods"):
        entry.load()


def methods() -> dict[str, type[Method]]:
    """Every registered method by name: built in, from packages with a `weft.methods` entry point, and the caller's."""
    _load()
    return registered()


def method_class(name: str) -> type[Method]:
    """The method called `name`; ValueError names the nearest one."""
    known = methods()
    if name not in known:
        raise ValueError(f"there is no method {name!r}; {nearest(name, known)}")
    return known[name]


def method_from_spec(spec: Mapping[str, Any]) -> Method:
    """The method that `Method.spec` described, or a recipe's `method:` section."""
    options = dict(spec)
    cls = method_class(options.pop("name"))
    known = [f.name for f in dataclasses.fields(cls)]
    for key in options:
        if key not in known:
            raise ValueError(f"{cls.name} has no option {key!r}; {nearest(key, known)}")
    return cls(**as_declared(cls, options))


def as_declared(cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a file holds them, with tuples where `cls` declares tuples and the file has lists."""
    declared = hints(cls)

    def wants_tuple(key: str) -> bool:
        return any(typing.get_origin(h) is tuple for h in (declared[key], *typing.get_args(declared[key])))

    found: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) and wants_tuple(key) else v for key, v in options.items()
    }
    if issubclass(cls, Router) and isinstance(found.get("experts"), Mapping):
        found["experts"] = _experts(found["experts"])
    return found


def _experts(spec: Mapping[str, Any]) -> tuple[Expert, ...]:
    """{name: specification}, or the specification of a method and a `count`."""
    if isinstance(spec.get("name"), str):
        options = dict(spec)
        count = options.pop("count", None)
        if type(count) is not int or count < 1:
            raise ValueError(f"experts: {spec['name']} needs a count, how many of them to make, and has {count!r}")
        return experts(method_from_spec(options), count)
    for name, each in spec.items():
        if not isinstance(each, Mapping) or "name" not in each:
            raise ValueError(f"experts: {name} should say a method by name and its options, and is {each!r}")
    return tuple(Expert(name, method_from_spec(each)) for name, each in spec.items())
