"""Losses, one file each. A file in this folder is found by being here; its objective by being defined."""

from importlib import import_module
from pkgutil import iter_modules

from weft.objectives.objective import LossSum, Objective, get, names

__all__ = ["LossSum", "Objective", "get", "names"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
