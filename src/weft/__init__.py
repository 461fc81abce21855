"""Weft: adapt pretrained networks, and prove that an adapter behaves the same wherever it runs."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
_PUBLIC = {
    "attach": "weft.attach", "detach": "weft.attach", "use": "weft.attach", "using": "weft.attach",
    "merge": "weft.attach", "unmerge": "weft.attach", "parameters": "weft.attach", "adapters": "weft.attach",
    "given": "weft.conditions", "resolve": "weft.targets", "candidates": "weft.targets",
    "combination": "weft.recipe.combinations",
    "Method": "weft.core", "option": "weft.core", "Stack": "weft.core", "Layers": "weft.core", "Split": "weft.core",
    "methods": "weft.registry", "check_method": "weft.checks", "load_base": "weft.base",
    "save": "weft.interop.folder", "load": "weft.interop.folder",
    "parity": "weft.parity", "cost": "weft.cost", "tune": "weft.tune", "plan": "weft.tune", "tune_many": "weft.tune",
    "compare": "weft.compare", "combine": "weft.combining",
    "cluster": "weft.library", "similarity": "weft.library", "Library": "weft.library",
    "mean_hidden_state": "weft.library",
    "join": "weft.joining", "experts": "weft.core.router", "recording": "weft.core.choices",
}  # fmt: skip

__all__ = ["__version__"] + list(_PUBLIC)  # and every method's class, found by name when it is asked for


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    from weft.registry import methods

    for cls in methods().values():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module 'weft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Public(ModuleType):
    """Importing `weft.attach` would bind the room over the function of the same name; the public name wins."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Public
