"""Optimisers by name: what torch, bitsandbytes and pytorch-optimizer keep, and our own where none is kept."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from weft.optim.choice import Choice, Groups, Pair, Setting, Trained, choices, resolve
from weft.optim.own import Own
from weft.optim.state import flatten_state, held_bytes, restore_state, state_bytes, state_tensors
from weft.optim.zeroth_order import ZerothOrder

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")  # a file registers what it defines

__all__ = [
    "Choice",
    "Groups",
    "Own",
    "Pair",
    "Setting",
    "Trained",
    "ZerothOrder",
    "choices",
    "flatten_state",
    "held_bytes",
    "resolve",
    "restore_state",
    "state_bytes",
    "state_tensors",
]
